"""Answers to a list of prompts: the engine behind one call, in the shape that users of vLLM know.

llm = LLM("runs/text/final")
for output in llm.generate(["She was ", "Anne had "], SamplingParams(max_tokens=32, temperature=0.7)):
    print(output.prompt, output.outputs[0].text)
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from open_mythos.device import Device, Dtype, setup_device
from open_mythos.engine.engine import Engine, EngineConfig, Request
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.model import OpenMythos
from open_mythos.tokenization.chat_template import Message, end_of_turn, render
from open_mythos.tokenization.token_text import TokenTexts
from open_mythos.tokenization.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Logprob:
    """How likely a token was."""

    logprob: float
    decoded_token: str | None
    """The token as text, with the space that a token inside a text may begin with; None without a tokenizer."""


@dataclass(frozen=True)
class CompletionOutput:
    """One answer."""

    index: int
    """Which of the prompt's `n` answers."""
    text: str
    """Up to the stop string, if one was found; empty without a tokenizer."""
    token_ids: list[int]
    loops: list[int]
    """Loops that each token took."""
    cumulative_logprob: float | None
    """The sum over the tokens; None unless `logprobs` was asked for."""
    logprobs: list[dict[int, Logprob]] | None
    """For each token: itself and so many of the best."""
    finish_reason: str | None
    """"stop" or "length"."""
    stop_reason: int | str | None
    """The stop string or stop id that ended it; None for the tokenizer's end token and for "length"."""


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt: str | None
    """None where ids were given."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    """Tokens of the prompt that the first answer found computed."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each token of the prompt: itself and so many of the best; None for the first, which nothing precedes. None
    altogether unless `prompt_logprobs` was asked for."""


class LLM:
    """A model that answers lists of prompts, each token at its own depth.

    Args:
        model: a model's folder, such as RUN/final, or a model.
        tokenizer: left out: the folder's. A model without one answers ids with ids.
        device, dtype: of a folder's model; left out: "auto" and "float32".
        config: of the engine. A list of prompts waits here, however long: `max_queue` is not looked at.

    Raises:
        TypeError, ValueError: an argument is unusable.
        OSError: the folder is none of a model.
    """

    def __init__(
        self,
        model: str | Path | OpenMythos,
        tokenizer: Tokenizer | None = None,
        *,
        device: Device | None = None,
        dtype: Dtype | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        if isinstance(model, OpenMythos):
            if device is not None or dtype is not None:
                raise ValueError(f"device={device!r}, dtype={dtype!r} go with a folder; use model.to(...) on a model")
        else:
            folder = Path(model)
            if not folder.is_dir():
                raise FileNotFoundError(f"folder {folder} does not exist; give a model's folder, such as RUN/final")
            tokenizer = tokenizer or load_tokenizer(folder)
            where = setup_device(device or "auto")
            model = OpenMythos.from_pretrained(folder, device=where, dtype=getattr(torch, dtype or "float32"))
        self.model, self.tokenizer = model, tokenizer
        self.engine = Engine(model, tokenizer, replace(config or EngineConfig(), max_queue=2**31 - 1))
        if self.engine.config.batch_invariant and not self.engine.invariant:
            warnings.warn(
                f"on this machine ({model.device.type}, {model.dtype}) an answer may depend in its last bits, and so a "
                "sampled text, on what else runs; see docs/engine.md, or use batch_invariant=False for speed",
                stacklevel=2,
            )
        self._texts = None if tokenizer is None else TokenTexts(tokenizer)
        self._n_prompts = 0

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts; nothing starts before all of them have been checked.

        Args:
            prompts: one or a list of: a string, a list of ids, {"prompt": string}, {"prompt_token_ids": ids}.
            sampling_params: for all, or one for each prompt; None: the defaults, which are 16 tokens.
            progress: show a bar with tokens per second and the mean loops of a token.

        Returns:
            One for each prompt, in their order.

        Raises:
            TypeError, ValueError: a prompt or its parameters are unusable.
            FloatingPointError: the logits of a prompt became NaN; the other answers are dropped.
        """
        wanted = [_read(prompt, i) for i, prompt in enumerate(_listed(prompts))]
        answers: list[list[Request]] = []
        running: dict[int, Request] = {}
        try:
            for prompt, params in zip(wanted, _for_each(sampling_params, len(wanted)), strict=True):
                answers.append([])
                for i in range(params.n):
                    # The prompt is encoded once.
                    ids = answers[-1][0].prompt_ids if i else prompt
                    request = self.engine.add(ids, params.of_answer(i))
                    running[request.id] = request
                    answers[-1].append(request)
            self._run(running, progress)
        finally:
            for request in running.values():
                self.engine.cancel(request)
        return [self._output(prompt, group) for prompt, group in zip(wanted, answers, strict=True)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """The assistant's next message in one conversation or several; the rest is that of `generate`.

        Args:
            messages: [{"role": "user", "content": "..."}], or a list of such lists; see tokenization/chat_template.py.
        """
        if self.tokenizer is None:
            raise ValueError("messages need a tokenizer; use LLM(model, tokenizer)")
        one = isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        prompts = [{"prompt_token_ids": render(each, self.tokenizer, reply=True)[0]} for each in conversations]
        params, end = _for_each(sampling_params, len(prompts)), end_of_turn(self.tokenizer)
        if isinstance(end, str):
            params = [replace(each, stop=(*each.stop_strings, end)) for each in params]
        return self.generate(prompts, params, progress=progress)

    def _run(self, running: dict[int, Request], progress: bool) -> None:
        """Step until every request has left `running`."""
        from open_mythos.reports.terminal import ProgressLine

        n_tokens = n_loops = 0
        began = time.perf_counter()
        with ProgressLine(len(running), "generate", progress, stderr=True, unit="answer") as line:
            while running:
                ended = 0
                for event in self.engine.step():
                    if event.token_id is not None:
                        n_tokens, n_loops = n_tokens + 1, n_loops + event.loops
                    if event.finish_reason == "error":
                        raise FloatingPointError(
                            f"the logits behind a prompt of {len(event.request.prompt_ids)} tokens are NaN: the "
                            "weights have diverged or overflow; use earlier weights, or float32"
                        )
                    # Those that an earlier call left behind are not in it.
                    if event.finish_reason is not None and running.pop(event.request.id, None) is not None:
                        ended += 1
                seconds = time.perf_counter() - began
                line.advance({"tokens/s": n_tokens / seconds, "loops": n_loops / max(1, n_tokens)}, ended)

    def _output(self, prompt: str | list[int], answers: list[Request]) -> RequestOutput:
        self._n_prompts += 1
        return RequestOutput(
            request_id=str(self._n_prompts - 1),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=list(answers[0].prompt_ids),
            outputs=[self._completion(i, request) for i, request in enumerate(answers)],
            finished=True,
            num_cached_tokens=answers[0].n_cached,
            prompt_logprobs=self._prompt_logprobs(answers[0]),
        )

    def _completion(self, index: int, request: Request) -> CompletionOutput:
        asked = request.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=request.text,
            token_ids=list(request.token_ids),
            loops=list(request.loops),
            cumulative_logprob=sum(request.logprobs) if asked else None,
            logprobs=self._logprobs(request) if asked else None,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )

    def _logprobs(self, request: Request) -> list[dict[int, Logprob]]:
        return self._told(request.token_ids, request.logprobs, request.top_logprobs)

    def _prompt_logprobs(self, request: Request) -> list[dict[int, Logprob] | None] | None:
        if request.params.prompt_logprobs is None:
            return None
        return [None, *self._told(request.prompt_ids[1:], request.prompt_logprobs, request.prompt_top_logprobs)]

    def _told(self, tokens: list[int], logprobs: list[float], best: list[dict[int, float]]) -> list[dict[int, Logprob]]:
        """For each token: itself and the best."""
        texts = self._texts
        return [
            {i: Logprob(value, None if texts is None else texts[i].text) for i, value in {token: own, **top}.items()}
            for token, own, top in zip(tokens, logprobs, best, strict=True)
        ]


def _listed(prompts: Any) -> Sequence[Any]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts={prompts!r:.60} must be a string, a list of ids, or a list of such; use ['She was ']")
    return [prompts] if prompts and all(type(i) is int for i in prompts) else prompts


def _read(prompt: Any, place: int) -> str | list[int]:
    if isinstance(prompt, Mapping):
        known = [prompt[key] for key in ("prompt", "prompt_token_ids") if prompt.get(key) is not None]
        if len(known) != 1:
            raise ValueError(
                f"prompts[{place}] has the keys {', '.join(map(str, prompt))}; give it 'prompt' or 'prompt_token_ids'"
            )
        prompt = known[0]
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or not all(type(i) is int for i in prompt):
        raise TypeError(f"prompts[{place}]={prompt!r:.60} must be a string or a list of ids; use 'She was ' or [1, 2]")
    return list(prompt)


def _for_each(params: SamplingParams | Sequence[SamplingParams] | None, n_prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n_prompts
    if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
        raise TypeError(f"sampling_params={params!r:.60} must be SamplingParams, or a list of them")
    if len(params) != n_prompts:
        raise ValueError(f"sampling_params has {len(params)} for {n_prompts} prompts; give one, or one for each")
    return list(params)
