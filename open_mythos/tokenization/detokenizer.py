"""Text of tokens that arrive one at a time, in whole characters and up to a stop string."""

from collections.abc import Sequence

from open_mythos.tokenization.tokenizer import Tokenizer


class TextStream:
    """Turns ids that arrive one at a time into text, never showing half a character.

    The pieces that `push` and the final `flush` return join to the `decode` of prompt and ids, less the `decode` of the
    prompt. The work for an id does not grow with the number of ids before it.

    Args:
        prompt_ids: what stands before the ids: some vocabularies decode a token by what precedes it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = _context(tokenizer, prompt_ids)
        self._n_whole = len(self._ids)  # the first of them: those of the last piece that ended in a whole character
        self._n_shown = len(tokenizer.decode(self._ids))  # characters of their text that were given out

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        n_open = len(self._ids) - self._n_whole
        # Of a run of U+FFFD only the last can still become a character: the ones before it are invalid bytes. But
        # vocabularies with a token for each byte write one for each, until up to four of them make a character.
        ready = len(text.rstrip("\ufffd") if n_open < 4 else text.removesuffix("\ufffd"))
        piece = text[self._n_shown : ready]
        self._n_shown = max(self._n_shown, ready)
        if piece and ready == len(text):
            self._ids = self._ids[self._n_whole :]
            self._n_whole = len(self._ids)
            self._n_shown = len(self._tokenizer.decode(self._ids))
        elif ready == len(text) > 0 and self._tokenizer.decode(self._ids[:-1]) == text:
            self._ids.pop()  # a special token, or an id that no token has
        elif n_open >= 16:
            self._forget(text)
        return piece

    def flush(self) -> str:
        """Return the pending text at the end."""
        return self._tokenizer.decode(self._ids)[self._n_shown :]

    def _forget(self, text: str) -> None:
        """Drop the older half of the ids, invalid bytes by now, unless it means something to the other half."""
        half = len(self._ids) // 2
        before = self._tokenizer.decode(self._ids[:half])
        if before + self._tokenizer.decode(self._ids[half:]) == text and len(before) <= self._n_shown:
            self._ids, self._n_whole, self._n_shown = self._ids[half:], 0, self._n_shown - len(before)


def _context(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return the last few ids: enough to show text, and only whole characters where the ids hold such."""
    n = 16
    while n < len(ids) and ("\ufffd" in (text := tokenizer.decode(ids[-n:])) or not text):
        n *= 2
    return list(ids[-n:])


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
        self._stream, self._stops, self._held = TextStream(tokenizer, prompt_ids), tuple(stops), ""

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
        if found := [(text.index(stop), i) for i, stop in enumerate(self._stops) if stop in text]:
            end, i = min(found)
            self.stopped = self._stops[i]
        else:
            begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
            end = len(text) - max(begun, default=0)
            self._held = text[end:]
        return text[:end]
