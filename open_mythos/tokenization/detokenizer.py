"""Text of an answer as its tokens arrive, up to a stop string."""

from collections.abc import Sequence

from open_mythos.tokenization.tokenizer import TextStream, Tokenizer


class AnswerText:
    """Text from ids that arrive one at a time, cut before the first stop string.

    The pieces that `push` and the final `flush` return join to the text behind the prompt. None of them holds half a
    character, or what may yet turn out to be a stop string.

    Args:
        stops: strings that end the text. Of several that one id completes, the one that begins first counts.
        prompt_ids: what the answer continues, as in `TextStream`.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), prompt_ids: Sequence[int] = ()) -> None:
        self.stopped: str | None = None
        """Stop string that ended the text; None before that."""
        self.added = ""
        """Text that the last id adds, including a possible beginning of a stop string that `push` has not returned."""
        self._stream = TextStream(tokenizer, prompt_ids)
        self._stops = tuple(stops)
        self._held = ""

    def push(self, token_id: int) -> str:
        """Return the text that is certain with `token_id`; empty once stopped."""
        if self.stopped is not None:
            return ""
        self.added = self._stream.push(token_id)
        return self._take(self.added)

    def flush(self) -> str:
        """Return the pending text at the end. An incomplete character, U+FFFD, may complete a stop string."""
        if self.stopped is not None:
            return ""
        rest = self._stream.flush()
        self.added += rest
        return self._take(rest) + self._held

    def _take(self, piece: str) -> str:
        text, self._held = self._held + piece, ""
        found = [(text.index(stop), i) for i, stop in enumerate(self._stops) if stop in text]
        if found:
            end, i = min(found)
            self.stopped = self._stops[i]
        else:
            end = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            self._held = text[end:]
        return text[:end]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
