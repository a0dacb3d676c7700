"""The objects of /v1/completions and /v1/chat/completions: OpenAI's, with the loops that the tokens took."""

import json
import secrets
import time
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Self

from open_mythos.engine.engine import TokenEvent
from open_mythos.engine.sequence import Sequence
from open_mythos.server.protocol import ChatRequest, ChoicesRequest, CompletionRequest, error
from open_mythos.tokenization.detokenizer import TextStream
from open_mythos.tokenization.token_text import TokenTexts
from open_mythos.tokenization.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON has no number for."""


def sse(value: Any, kind: str = "") -> bytes:
    """Write a server-sent event."""
    return b"%bdata: %b\n\n" % (f"event: {kind}\n".encode() if kind else b"", json.dumps(value).encode())


class ScoredToken(NamedTuple):
    """A token with its log-probability."""

    token: int
    logprob: float | None
    """None for the first token of a prompt, which nothing precedes."""
    best: dict[int, float] | None
    """Log-probabilities of the best tokens in its place."""
    text: str
    """Text that the token adds: these texts join to the whole text."""
    offset: int
    """Characters before it, in the prompt or in the answer."""


class Echo:
    """A prompt that is sent back before its answers: the prompt itself, or the text of its ids."""

    def __init__(self, prompt: str | list[int], ids: list[int], tokenizer: Tokenizer) -> None:
        stream = TextStream(tokenizer)
        self._ids, self._pieces = ids, [stream.push(token) for token in ids]
        self._pieces[-1] += stream.flush()
        self.text = prompt if isinstance(prompt, str) else "".join(self._pieces)

    def scored(self, request: Sequence) -> list[ScoredToken]:
        """Return the prompt's tokens as scored by a request; none if no scores were asked for."""
        if request.params.prompt_logprobs is None:
            return []
        own, best = [None, *request.prompt_logprobs], [None, *request.prompt_top_logprobs]
        # A normalizer or a special token can make the text of the ids differ from the prompt.
        offsets = [min(n, len(self.text)) for n in accumulate(map(len, self._pieces[:-1]), initial=0)]
        return [ScoredToken(*each) for each in zip(self._ids, own, best, self._pieces, offsets, strict=True)]


@dataclass
class Answer:
    """One answer, or a part of it, gathered from the engine's events; with an echo it begins with the prompt."""

    echo: Echo | None = None
    offset: int = 0
    """Characters before the next token."""
    text: str = ""
    finish_reason: str | None = None
    request: Sequence | None = None
    pieces: list[str] = field(default_factory=list)
    """Text that could be shown with each token."""
    loops: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)

    def add(self, event: TokenEvent) -> Self:
        """Add one more token, or the end."""
        if self.request is None and self.echo is not None:
            self.scored = self.echo.scored(event.request)
        self.request, self.finish_reason = event.request, event.finish_reason
        self.text += event.text
        if event.token_id is not None:
            self.loops.append(event.loops)
            self.pieces.append(event.text)
            if event.logprob is not None:
                scored = event.token_id, event.logprob, event.top_logprobs, event.token_text, self.offset
                self.scored.append(ScoredToken(*scored))
            self.offset += len(event.token_text)
        elif event.text and self.pieces:
            self.pieces[-1] += event.text  # held back until the answer was cut off
        return self

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token, without the prompt's."""
        own = [each.logprob for each in self.scored[-len(self.loops) :] if each.logprob is not None]
        return sum(own) / max(1, len(own))


class ResponseBuilder:
    """Builds the objects of one call from the engine's events: all at once, or a stream event by event.

    Args:
        prompts: ids of each prompt.
        texts: texts of the tokens of the vocabulary.
    """

    def __init__(
        self, asked: ChoicesRequest, prompts: list[list[int]], model: str, tokenizer: Tokenizer, texts: TokenTexts
    ) -> None:
        self._asked, self._n_prompt, self._texts = asked, [len(ids) for ids in prompts], texts
        self._is_chat = isinstance(asked, ChatRequest)
        given = zip(asked.prompt, prompts, strict=True) if isinstance(asked, CompletionRequest) and asked.echo else ()
        echoes = [Echo(*pair, tokenizer) for pair in given]
        starts = [(echo, len(echo.text), echo.text) for echo in echoes] or [()] * len(prompts)
        self.answers = [Answer(*start) for start in starts for _ in range(asked.n_made)]
        kind, prefix = ("chat.completion", "chatcmpl-") if self._is_chat else ("text_completion", "cmpl-")
        name = prefix + secrets.token_hex(12)
        self._head = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def whole(self) -> dict[str, Any]:
        """Build the answer of a call that is not streamed."""
        made, n, answers = self._asked.n_made, self._asked.n, self.answers
        order = list(range(len(answers)))
        if n < made:
            # The answers to each prompt with the highest log-probability per token, best first.
            groups = [order[start : start + made] for start in range(0, len(order), made)]
            order = [i for group in groups for i in sorted(group, key=lambda i: -answers[i].mean_logprob)[:n]]
        choices = []
        for index, i in enumerate(order):
            text = {"text": answers[i].text}
            message = {"message": {"role": "assistant", "content": answers[i].text, "refusal": None}}
            choices.append(self._choice(index, answers[i], message if self._is_chat else text))
        return {**self._head, "choices": choices, "usage": usage(self._n_prompt, answers)}

    def opening(self) -> list[bytes]:
        """Write the events before the first token of a stream."""
        delta = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._chunk([{"index": i, **delta}]) for i in range(len(self.answers) if self._is_chat else 0)]

    def piece(self, index: int, event: TokenEvent) -> list[bytes]:
        """Write the events of one token; before the first token also that of the prompt, if it is sent back."""
        answer, chunks = self.answers[index], []
        if answer.echo is not None and answer.request is None:
            prompt = Answer(text=answer.echo.text, scored=answer.echo.scored(event.request))
            chunks.append(self._chunk([self._choice(index, prompt, {"text": prompt.text})]))
        part = Answer(offset=answer.offset).add(event)
        answer.add(event)
        shows_every_token = self._asked.return_loops or self._asked.n_best is not None
        if event.text or event.finish_reason is not None or shows_every_token:
            body = {"delta": {"content": event.text} if event.text else {}} if self._is_chat else {"text": event.text}
            chunks.append(self._chunk([self._choice(index, part, body)]))
        return chunks

    def closing(self) -> list[bytes]:
        """Write the events after the last token."""
        options = self._asked.stream_options
        if options is None or not options.include_usage:
            return [DONE]
        return [self._chunk([], usage=usage(self._n_prompt, self.answers)), DONE]

    @staticmethod
    def failed(message: str) -> bytes:
        """Write the event of a stream that breaks off."""
        return sse(error(message, kind="server_error"))

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return sse({**self._head, "object": kind, "choices": choices, **more})

    def _choice(self, index: int, answer: Answer, body: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self._asked.n_best is not None:
            logprobs = self._of_chat(answer.scored) if self._is_chat else self._of_completion(answer.scored)
        choice = {"index": index, **body, "logprobs": logprobs, "finish_reason": answer.finish_reason}
        if answer.finish_reason is not None and answer.request is not None:
            choice["stop_reason"] = answer.request.stop_reason
        if self._asked.return_loops:
            choice |= {"loops": answer.loops, "pieces": answer.pieces}
        return choice

    def _of_chat(self, scored: list[ScoredToken]) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            alone = self._texts[token]
            return {"token": alone.text, "logprob": _finite(logprob), "bytes": list(alone.raw)}

        content = []
        for each in scored:
            top = [entry(token, value) for token, value in (each.best or {}).items()]
            content.append({**entry(each.token, each.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _of_completion(self, scored: list[ScoredToken]) -> dict[str, Any]:
        return {
            "tokens": [each.text for each in scored],
            "token_logprobs": [_finite(each.logprob) for each in scored],
            "top_logprobs": [None if each.best is None else self._by_text(each, each.best) for each in scored],
            "text_offset": [each.offset for each in scored],
        }

    def _by_text(self, scored: ScoredToken, best: dict[int, float]) -> dict[str, float | None]:
        # Best first. The token itself is named by the text that it adds, a part of a character by its bytes.
        by_text: dict[str, float | None] = {}
        for token, value in best.items():
            by_text.setdefault(scored.text if token == scored.token else self._texts[token].name, _finite(value))
        return by_text


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)


def usage(n_prompt: list[int], answers: list[Answer]) -> dict[str, Any]:
    """Count the tokens and loops of a call; `n_prompt`: tokens of each prompt."""
    loops = [n for answer in answers for n in answer.loops]
    # The first answer to each prompt stands for what the prompt cost.
    firsts = answers[:: len(answers) // len(n_prompt)]
    cached = sum(answer.request.n_cached for answer in firsts if answer.request is not None)
    return {
        "prompt_tokens": sum(n_prompt),
        "completion_tokens": len(loops),
        "total_tokens": sum(n_prompt) + len(loops),
        "prompt_tokens_details": {"cached_tokens": cached},
        "loops": {"mean": sum(loops) / max(1, len(loops)), "total": sum(loops)},
    }
