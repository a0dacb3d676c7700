"""What an answer over HTTP looks like: OpenAI's objects, with the loops that the tokens took."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from open_mythos.serve.engine import Request, TokenEvent
from open_mythos.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON has no number for."""


def sse(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@dataclass
class Answer:
    """What has come of one answer."""

    text: str = ""
    finish_reason: str | None = None
    request: Request | None = None
    pieces: list[str] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, float, dict[int, float]]] = field(default_factory=list)
    """(token, its log-probability, those of the best)."""

    def add(self, event: TokenEvent) -> None:
        """Take one more token in, or the end."""
        self.request, self.finish_reason = event.request, event.finish_reason
        self.text += event.text
        if event.token_id is not None:
            self.loops.append(event.loops)
            self.pieces.append(event.text)
            if event.logprob is not None:
                best = {i: max(value, LEAST) for i, value in (event.top_logprobs or {}).items()}
                self.logprobs.append((event.token_id, max(event.logprob, LEAST), best))
        elif event.text and self.pieces:
            self.pieces[-1] += event.text  # what was held back when the answer was cut off


class Shape:
    """Makes the objects of one call, whether they come at once or in pieces.

    Args:
        chat: whether the call is /v1/chat/completions.
        show_loops: whether each choice has `loops` and `pieces`.
    """

    def __init__(self, model: str, tokenizer: Tokenizer, chat: bool, n_best: int | None, show_loops: bool) -> None:
        self._tokenizer, self._chat, self._n_best, self._show_loops = tokenizer, chat, n_best, show_loops
        kind = "chat.completion" if chat else "text_completion"
        name = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self._head = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer of a call that is not streamed."""
        choices = []
        for i, answer in enumerate(answers):
            message = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            choices.append(self._choice(i, answer, message if self._chat else {"text": answer.text}, 0))
        return {**self._head, "choices": choices, "usage": usage}

    def opening(self, place: int) -> dict[str, Any] | None:
        """What stands before the first piece of an answer."""
        if not self._chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": place, "delta": delta, "logprobs": None, "finish_reason": None}])

    def piece(self, place: int, event: TokenEvent, offset: int) -> dict[str, Any]:
        """One token; `offset`: characters of the answer before it."""
        part = Answer()
        part.add(event)
        body = {"delta": {"content": event.text} if event.text else {}} if self._chat else {"text": event.text}
        return self._chunk([self._choice(place, part, body, offset)])

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The counts at the end of a stream."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _choice(self, place: int, answer: Answer, body: dict[str, Any], offset: int) -> dict[str, Any]:
        logprobs = None
        if self._n_best is not None:
            logprobs = self._of_chat(answer) if self._chat else self._of_completion(answer, offset)
        choice = {"index": place, **body, "logprobs": logprobs, "finish_reason": answer.finish_reason}
        if answer.finish_reason is not None and answer.request is not None:
            choice["stop_reason"] = answer.request.stop_reason
        if self._show_loops:
            choice |= {"loops": answer.loops, "pieces": answer.pieces}
        return choice

    def _of_chat(self, answer: Answer) -> dict[str, Any]:
        content = []
        for token, own, best in answer.logprobs:
            top = [self._token(i, value) for i, value in best.items()]
            content.append({**self._token(token, own), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        # Of half a character there is no saying here which half.
        octets = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": octets}

    def _of_completion(self, answer: Answer, offset: int) -> dict[str, Any]:
        offsets = []
        for piece in answer.pieces:
            offsets.append(offset)
            offset += len(piece)
        decode = self._tokenizer.decode
        return {
            "tokens": [decode([token]) for token, _, _ in answer.logprobs],
            "token_logprobs": [own for _, own, _ in answer.logprobs],
            "top_logprobs": [self._by_text(best) for _, _, best in answer.logprobs],
            "text_offset": offsets,
        }

    def _by_text(self, best: dict[int, float]) -> dict[str, float]:
        """Best first; of tokens that share a text, such as parts of characters, the most probable one."""
        told: dict[str, float] = {}
        for token, value in best.items():
            told.setdefault(self._tokenizer.decode([token]), value)
        return told


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
