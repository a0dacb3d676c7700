"""Answers to a list of prompts: the engine behind one call, with the names that users of vLLM know.

llm = LLM("runs/text/final")
for output in llm.generate(["She was ", "Anne had "], SamplingParams(max_tokens=32, temperature=0.7)):
    print(output.prompt, output.outputs[0].text)
"""

import time
import warnings
from collections import abc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_mythos.device import AutoDtype, Device, setup_device
from open_mythos.engine.config import EngineConfig
from open_mythos.engine.engine import Engine
from open_mythos.engine.sequence import Sequence
from open_mythos.generation.prompts import encode_prompt
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.model import OpenMythos
from open_mythos.tokenization.chat_template import Message, end_of_turn, render
from open_mythos.tokenization.token_text import TokenTexts
from open_mythos.tokenization.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Logprob:
    """The log-probability of a token."""

    logprob: float
    decoded_token: str | None
    """The token as text, with the space that a token inside a text may begin with; None without a tokenizer."""


@dataclass(frozen=True)
class CompletionOutput:
    """One answer."""

    index: int
    """Number of the answer among the prompt's `n`."""
    text: str
    """Text up to the stop string, if one was found; empty without a tokenizer."""
    token_ids: list[int]
    loops: list[int]
    """Loops of each token."""
    cumulative_logprob: float | None
    """Sum over the tokens; None unless `logprobs` was asked for."""
    logprobs: list[dict[int, Logprob]] | None
    """For each token: the token itself and the best ones; None unless `logprobs` was asked for."""
    finish_reason: str | None
    """"stop" or "length"."""
    stop_reason: int | str | None
    """The stop string or stop id that ended the answer; None for the tokenizer's end token and for "length"."""


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
    """Prompt tokens that the first answer found in the prefix cache."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each prompt token: the token itself and the best ones; None for the first, which nothing precedes. None
    altogether unless `prompt_logprobs` was asked for."""


class LLM:
    """A model that answers lists of prompts, each token at its own depth.

    Args:
        model: a model's folder, such as RUN/final, or a model.
        tokenizer: left out: the folder's. A model without one answers ids with ids.
        device, dtype: those of a folder's model; left out: "auto".
        config: the engine's. A list of prompts of any length may wait here: `max_queue` has no effect.

    Raises:
        TypeError, ValueError: an argument is unusable.
        OSError: the folder is not a model's.
    """

    def __init__(
        self,
        model: str | Path | OpenMythos,
        tokenizer: Tokenizer | None = None,
        *,
        device: Device | None = None,
        dtype: AutoDtype | None = None,
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
            model = OpenMythos.from_pretrained(folder, device=where, dtype=dtype or "auto")
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
        sampling_params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts; nothing starts before all of them have been checked.

        Args:
            prompts: one or a list of: a string, a list of ids, {"prompt": string}, {"prompt_token_ids": ids}.
            sampling_params: for all, or one for each prompt; None: the defaults, which are 16 tokens.
            progress: show a bar with tokens per second and the mean loops of a token.

        Returns:
            One output for each prompt, in their order.

        Raises:
            TypeError, ValueError: a prompt or its parameters are unusable.
            FloatingPointError: the logits of a prompt became NaN; the other answers are dropped.
        """
        given = [_unwrap(prompt, i) for i, prompt in enumerate(_as_list(prompts))]
        answers: list[list[Sequence]] = []
        running: dict[int, Sequence] = {}
        try:
            for i, params in enumerate(_for_each(sampling_params, len(given))):
                ids = encode_prompt(given[i], self.tokenizer, self.model.cfg, f"prompts[{i}]")
                answers.append([])
                # Every answer is a request of its own, with its own seed.
                for number in range(params.n):
                    seq = self.engine.add(ids, params.of_answer(number))
                    running[seq.id] = seq
                    answers[-1].append(seq)
            self._run(running, progress)
        finally:
            for seq in running.values():
                self.engine.cancel(seq)
        return [self._output(prompt, seqs) for prompt, seqs in zip(given, answers, strict=True)]

    def chat(
        self,
        messages: abc.Sequence[Message] | abc.Sequence[abc.Sequence[Message]],
        sampling_params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several with the assistant's next message; otherwise as `generate`.

        Args:
            messages: [{"role": "user", "content": "..."}], or a list of such lists; see tokenization/chat_template.py.
        """
        if self.tokenizer is None:
            raise ValueError("messages need a tokenizer; use LLM(model, tokenizer)")
        is_one = isinstance(messages, abc.Sequence) and bool(messages) and isinstance(messages[0], abc.Mapping)
        conversations: Any = [messages] if is_one else messages
        prompts = [{"prompt_token_ids": render(each, self.tokenizer, reply=True)[0]} for each in conversations]
        # Where the end of a turn is no token, its text ends the answer.
        params, end = _for_each(sampling_params, len(prompts)), end_of_turn(self.tokenizer)
        if isinstance(end, str):
            params = [replace(each, stop=(*each.stop_strings, end)) for each in params]
        return self.generate(prompts, params, progress=progress)

    def _run(self, running: dict[int, Sequence], progress: bool) -> None:
        """Step until every request has left `running`."""
        from open_mythos.reports.terminal import ProgressLine

        n_tokens = n_loops = 0
        began = time.perf_counter()
        with ProgressLine(len(running), "generate", progress, stderr=True, unit="answer") as line:
            while running:
                n_ended = 0
                for event in self.engine.step():
                    if event.token_id is not None:
                        n_tokens, n_loops = n_tokens + 1, n_loops + event.loops
                    if event.finish_reason == "error":
                        raise FloatingPointError(
                            f"the logits behind a prompt of {event.request.n_prompt} tokens are NaN: the "
                            "weights have diverged or overflow; use earlier weights, or float32"
                        )
                    # An interrupted earlier call may have left ends of its own, which do not count.
                    if event.finish_reason is not None and running.pop(event.request.id, None) is not None:
                        n_ended += 1
                seconds = time.perf_counter() - began
                line.advance({"tokens/s": n_tokens / seconds, "loops": n_loops / max(1, n_tokens)}, n_ended)

    def _output(self, prompt: Any, seqs: list[Sequence]) -> RequestOutput:
        self._n_prompts += 1
        first, scored = seqs[0], None
        if first.params.prompt_logprobs is not None:
            ids = first.prompt_ids[1:]
            scored = [None, *self._logprobs(ids, first.prompt_logprobs, first.prompt_top_logprobs)]
        return RequestOutput(
            request_id=str(self._n_prompts - 1),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=list(first.prompt_ids),
            outputs=[self._completion(i, seq) for i, seq in enumerate(seqs)],
            finished=True,
            num_cached_tokens=first.n_cached,
            prompt_logprobs=scored,
        )

    def _completion(self, index: int, seq: Sequence) -> CompletionOutput:
        has_logprobs = seq.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=seq.text,
            token_ids=list(seq.token_ids),
            loops=list(seq.loops),
            cumulative_logprob=sum(seq.logprobs) if has_logprobs else None,
            logprobs=self._logprobs(seq.token_ids, seq.logprobs, seq.top_logprobs) if has_logprobs else None,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )

    def _logprobs(self, ids: list[int], own: list[float], best: list[dict[int, float]]) -> list[dict[int, Logprob]]:
        """Return for each token itself and the best ones, with their texts."""
        texts = self._texts
        return [
            {i: Logprob(value, None if texts is None else texts[i].text) for i, value in {token: p, **top}.items()}
            for token, p, top in zip(ids, own, best, strict=True)
        ]


def _as_list(prompts: Any) -> abc.Sequence[Any]:
    """Return one prompt or several as a list."""
    if isinstance(prompts, str | abc.Mapping):
        return [prompts]
    if not isinstance(prompts, abc.Sequence):
        raise TypeError(f"prompts={prompts!r:.60} must be a string, a list of ids, or a list of such; use ['She was ']")
    return [prompts] if prompts and all(type(i) is int for i in prompts) else prompts


def _unwrap(prompt: Any, place: int) -> Any:
    """Return the text or the ids of a prompt, which may stand in a mapping."""
    if not isinstance(prompt, abc.Mapping):
        return prompt
    given = [prompt[key] for key in ("prompt", "prompt_token_ids") if prompt.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"prompts[{place}] has the keys {', '.join(map(str, prompt))}; give it 'prompt' or 'prompt_token_ids'"
        )
    return given[0]


def _for_each(params: SamplingParams | abc.Sequence[SamplingParams] | None, n_prompts: int) -> list[SamplingParams]:
    """Return one SamplingParams for each prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n_prompts
    if not isinstance(params, abc.Sequence) or not all(isinstance(each, SamplingParams) for each in params):
        raise TypeError(f"sampling_params={params!r:.60} must be SamplingParams, or a list of them")
    if len(params) != n_prompts:
        raise ValueError(f"sampling_params has {len(params)} for {n_prompts} prompts; give one, or one for each")
    return list(params)
