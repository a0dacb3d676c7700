"""What an answer over HTTP looks like: OpenAI's objects, with the loops that the tokens took."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from open_mythos.engine.engine import TokenEvent
from open_mythos.engine.sequence import Sequence as Request
from open_mythos.tokenization.token_text import TokenTexts
from open_mythos.tokenization.tokenizer import TextStream, Tokenizer

DONE = b"data: [DONE]\n\n"
LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON has no number for."""


def sse(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability."""

    token: int
    logprob: float | None
    """None for the first token of a prompt, which nothing precedes."""
    best: dict[int, float] | None
    """The log-probabilities of the best tokens in its place."""
    text: str
    """Text that the token adds: these texts join to the whole text."""
    offset: int
    """Characters before it, in the prompt or in the answer."""


@dataclass(frozen=True)
class Echo:
    """A prompt that is sent back before its answers."""

    text: str
    ids: list[int]
    pieces: list[str]
    """Text that each id adds."""

    @staticmethod
    def of(prompt: str | list[int], ids: list[int], tokenizer: Tokenizer) -> "Echo":
        """The prompt as it was given, or the text of its ids."""
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in ids]
        pieces[-1] += stream.flush()
        return Echo(prompt if isinstance(prompt, str) else "".join(pieces), ids, pieces)

    def scored(self, request: Request | None) -> list[Scored]:
        """Its tokens, as scored by a request that has computed the prompt; none if that was not asked for."""
        if request is None or request.params.prompt_logprobs is None:
            return []
        own, best = [None, *request.prompt_logprobs], [None, *request.prompt_top_logprobs]
        # A normalizer or a special token can make the text of the ids another than the one that was given.
        offsets = [min(n, len(self.text)) for n in accumulate(map(len, self.pieces[:-1]), initial=0)]
        return [Scored(*each) for each in zip(self.ids, own, best, self.pieces, offsets, strict=True)]


@dataclass
class Answer:
    """What has come of one answer."""

    text: str = ""
    finish_reason: str | None = None
    request: Request | None = None
    pieces: list[str] = field(default_factory=list)
    """Text that could be shown with each token."""
    loops: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    n_chars: int = 0
    """Characters that its tokens add to the text, shown or not."""

    def add(self, event: TokenEvent) -> None:
        """Take one more token in, or the end."""
        self.request, self.finish_reason = event.request, event.finish_reason
        self.text += event.text
        if event.token_id is not None:
            self.loops.append(event.loops)
            self.pieces.append(event.text)
            if event.logprob is not None:
                scored = event.token_id, event.logprob, event.top_logprobs, event.token_text, self.n_chars
                self.scored.append(Scored(*scored))
            self.n_chars += len(event.token_text)
        elif event.text and self.pieces:
            self.pieces[-1] += event.text  # what was held back when the answer was cut off

    @property
    def mean_logprob(self) -> float:
        """The log-probability per token."""
        own = [each.logprob for each in self.scored if each.logprob is not None]
        return sum(own) / max(1, len(own))


class Shape:
    """Makes the objects of one call, whether they come at once or in pieces.

    Args:
        chat: whether the call is /v1/chat/completions.
        texts: of the tokens of the vocabulary.
        n_best: how many of the best tokens to tell; None: no log-probabilities.
        show_loops: whether each choice has `loops` and `pieces`.
        echoes: the prompts to send back before their answers, if that was asked for.
        n: answers to each prompt.
    """

    def __init__(
        self,
        model: str,
        texts: TokenTexts,
        chat: bool,
        n_best: int | None,
        show_loops: bool,
        echoes: Sequence[Echo] = (),
        n: int = 1,
    ) -> None:
        self._texts, self._chat, self._n_best, self._show_loops = texts, chat, n_best, show_loops
        self._echoes, self._n = echoes, n
        kind = "chat.completion" if chat else "text_completion"
        name = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self._head = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def echo(self, place: int) -> Echo | None:
        """The prompt that stands before an answer."""
        return self._echoes[place // self._n] if self._echoes else None

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer of a call that is not streamed."""
        choices = []
        for i, answer in enumerate(answers):
            echo, text, scored = self.echo(i), answer.text, answer.scored
            if echo is not None:
                behind = [replace(each, offset=len(echo.text) + each.offset) for each in scored]
                text, scored = echo.text + text, [*echo.scored(answer.request), *behind]
            message = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(i, answer, message if self._chat else {"text": text}, scored))
        return {**self._head, "choices": choices, "usage": usage}

    def opening(self, place: int) -> dict[str, Any] | None:
        """The chunk before the first piece of a chat's answer."""
        if not self._chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": place, "delta": delta, "logprobs": None, "finish_reason": None}])

    def prompt(self, place: int, echo: Echo, request: Request) -> dict[str, Any]:
        """The prompt before the first piece of an answer; `request` has computed it."""
        return self._chunk([self._choice(place, Answer(), {"text": echo.text}, echo.scored(request))])

    def piece(self, place: int, event: TokenEvent, n_chars: int) -> dict[str, Any]:
        """One token; `n_chars`: characters that the tokens of the answer before it have added."""
        echo = self.echo(place)
        part = Answer(n_chars=n_chars if echo is None else len(echo.text) + n_chars)
        part.add(event)
        body = {"delta": {"content": event.text} if event.text else {}} if self._chat else {"text": event.text}
        return self._chunk([self._choice(place, part, body, part.scored)])

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The counts at the end of a stream."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _choice(self, place: int, answer: Answer, body: dict[str, Any], scored: Sequence[Scored]) -> dict[str, Any]:
        logprobs = None
        if self._n_best is not None:
            logprobs = self._of_chat(scored) if self._chat else self._of_completion(scored)
        choice = {"index": place, **body, "logprobs": logprobs, "finish_reason": answer.finish_reason}
        if answer.finish_reason is not None and answer.request is not None:
            choice["stop_reason"] = answer.request.stop_reason
        if self._show_loops:
            choice |= {"loops": answer.loops, "pieces": answer.pieces}
        return choice

    def _of_chat(self, scored: Sequence[Scored]) -> dict[str, Any]:
        content = []
        for each in scored:
            top = [self._token(token, value) for token, value in (each.best or {}).items()]
            content.append({**self._token(each.token, each.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        alone = self._texts[token]
        return {"token": alone.text, "logprob": _finite(logprob), "bytes": list(alone.raw)}

    def _of_completion(self, scored: Sequence[Scored]) -> dict[str, Any]:
        return {
            "tokens": [each.text for each in scored],
            "token_logprobs": [_finite(each.logprob) for each in scored],
            "top_logprobs": [None if each.best is None else self._by_text(each, each.best) for each in scored],
            "text_offset": [each.offset for each in scored],
        }

    def _by_text(self, scored: Scored, best: dict[int, float]) -> dict[str, float | None]:
        """Best first. The token itself goes by the text that it adds, a part of a character by its bytes."""
        by_text: dict[str, float | None] = {}
        for token, value in best.items():
            by_text.setdefault(scored.text if token == scored.token else self._texts[token].name, _finite(value))
        return by_text


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)


def best_of(answers: Sequence[Answer], n: int, n_made: int) -> Sequence[Answer]:
    """Choose, for each prompt, the n of its `n_made` answers with the highest log-probability per token, best first."""
    if n == n_made:
        return answers
    best: list[Answer] = []
    for start in range(0, len(answers), n_made):
        best += sorted(answers[start : start + n_made], key=lambda answer: -answer.mean_logprob)[:n]
    return best


def usage(prompts: Sequence[int], answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens and loops of a call; `prompts`: tokens of each prompt."""
    loops = [n for answer in answers for n in answer.loops]
    # Of the answers to one prompt the first: it stands for what the prompt cost.
    firsts = answers[:: len(answers) // len(prompts)]
    cached = sum(answer.request.n_cached for answer in firsts if answer.request is not None)
    return {
        "prompt_tokens": sum(prompts),
        "completion_tokens": len(loops),
        "total_tokens": sum(prompts) + len(loops),
        "prompt_tokens_details": {"cached_tokens": cached},
        "loops": {"mean": sum(loops) / max(1, len(loops)), "total": sum(loops)},
    }
