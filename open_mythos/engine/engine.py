"""The engine: requests in, tokens out, as many at once as there are rows, each at its own depth."""

import os
import time
from collections import abc
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from open_mythos.accounting import kv_bytes_per_token, n_layers
from open_mythos.engine.calibration import measure_costs, run_once, store_weights
from open_mythos.engine.config import EngineConfig
from open_mythos.engine.model_runner import ModelRunner
from open_mythos.engine.paged_kv_cache import PagedKVCache
from open_mythos.engine.readout_policy import StepCosts
from open_mythos.engine.request_checks import Rules, check_request, depth_of
from open_mythos.engine.sampler import SampledToken, SamplerState, log_probabilities, sample_batch
from open_mythos.engine.scheduler import Refill, Scheduler
from open_mythos.engine.sequence import GRID, Sequence
from open_mythos.engine.structured_outputs import Grammars
from open_mythos.generation.prompts import encode_prompt
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.model import OpenMythos
from open_mythos.nn.halting import Fixed, LastDecides
from open_mythos.tokenization.detokenizer import AnswerText
from open_mythos.tokenization.tokenizer import Tokenizer

MEMORY_SHARE = 0.25
"""Share of the free memory for keys and values, unless `kv_tokens` gives their size."""


@dataclass(frozen=True)
class TokenEvent:
    """One more token of a request, or the request's end."""

    request: Sequence
    token_id: int | None
    """None at an end without a token: "abort", "error", and "length" where `max_tokens` is 0."""
    text: str
    """Text that can be shown now; it lags behind the tokens while a character or a stop string is incomplete."""
    loops: int
    token_text: str = ""
    """Text that the token adds, shown yet or not; empty while a character is incomplete."""
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    finish_reason: str | None = None
    """"stop": a stop token or string, or a schema is met; "length": `max_tokens`; "abort": cancelled, or the schema is
    too much work; "error": the logits were NaN."""


class Engine:
    """A model that many requests share. One thread calls its methods, one at a time.

    While the engine is in use the weights must not change, nor rules that requests give as objects: keys and values are
    used again.
    """

    def __init__(
        self,
        model: OpenMythos,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        costs: StepCosts | None = None,
        refill: Refill | None = None,
    ) -> None:
        """Put the model in eval mode, store its weights anew, allocate the pages and measure the costs of a step.

        Args:
            tokenizer: for prompts and stop strings that are text.
            costs: the costs of a step; None: measured now.
            refill: decides when tokens that have left the loop are read out; None: when that costs least.
        """
        config = config or EngineConfig()
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        store_weights(model)
        cfg = model.cfg
        self.n_pages = -(-self._kv_tokens() // config.page_tokens) * n_layers(cfg, cfg.max_loop_iters)
        self.kv = PagedKVCache(cfg, self.n_pages, config.page_tokens, config.max_rows, model.dtype, model.device)
        self.runner = ModelRunner(model, self.kv, config.max_rows, config.batch_invariant)
        run_once(self.runner)
        costs = costs or measure_costs(self.runner)
        self.runner.least_rows = costs.least_rows
        self.scheduler = Scheduler(config, self.n_pages, costs, refill)
        self.rules: Rules = WeakValueDictionary()
        """One object for each exit rule, as long as a request uses it: there is no end of thresholds."""
        self.grammars = None if tokenizer is None else Grammars(tokenizer, cfg.vocab_size)
        self.sequences: dict[int, Sequence] = {}
        """Requests that have not ended, by id."""
        self.cancelled: list[TokenEvent] = []
        """Ends of cancelled requests that `step` has not returned yet."""
        self.n_requests = 0

    def n_tokens_at(self, n_loops: int) -> int:
        """Return the number of tokens that the pages have room for if each may run `n_loops` loops."""
        return self.n_pages // n_layers(self.model.cfg, n_loops) * self.config.page_tokens

    def _kv_tokens(self) -> int:
        cfg, device = self.model.cfg, self.model.device
        if self.config.kv_tokens is not None:
            return self.config.kv_tokens
        each = kv_bytes_per_token(cfg, cfg.max_loop_iters, self.model.dtype.itemsize)
        return max(GRID, min(self.config.max_rows * cfg.max_seq_len, cache_bytes(device) // each))

    @property
    def invariant(self) -> bool:
        """True if equal requests get equal bits whatever runs beside them; False on anything but a CPU."""
        return self.runner.invariance is not None and self.runner.invariance.holds

    @property
    def busy(self) -> bool:
        """True if a request has not ended, or `step` has not returned its end."""
        return bool(self.sequences or self.cancelled)

    def add(self, prompt: str | abc.Sequence[int], params: SamplingParams | None = None) -> Sequence:
        """Queue a request, and return its record.

        Raises:
            TypeError, ValueError: prompt or params are unusable with this model; nothing has been queued.
            ImportError: `json_schema` needs a library that is not installed.
            QueueFull: `max_queue` requests wait already.
        """
        params, cfg, config = params or SamplingParams(), self.model.cfg, self.config
        ids = encode_prompt(prompt, self.tokenizer, cfg)
        check_request(params, len(ids), cfg, has_tokenizer=self.tokenizer is not None)
        rule, n_loops, depth_key = depth_of(params, self.model, self.rules, config.prompts_leave_together)
        matcher = None if params.schema is None or self.grammars is None else self.grammars.matcher(params.schema)
        seq = Sequence(
            id=self.n_requests,
            prompt_ids=ids,
            params=params,
            n_loops=n_loops,
            depth_key=depth_key,
            is_fixed=isinstance(rule, Fixed),
            pages_per_block=n_layers(cfg, n_loops),
            rule=rule,
            sampler=SamplerState.of(params, matcher),
            stop_ids=frozenset(params.stop_token_ids),
            whole_prompt=isinstance(rule, LastDecides),
        )
        if self.tokenizer is not None:
            seq.detokenizer = AnswerText(self.tokenizer, params.stop_strings, ids)
            if self.tokenizer.eos_id is not None and not params.ignore_eos:
                seq.stop_ids |= {self.tokenizer.eos_id}
        self.scheduler.add(seq)
        self.n_requests += 1
        self.sequences[seq.id] = seq
        return seq

    def cancel(self, request: Sequence) -> None:
        """End a request in any phase; its row and pages are free at once. A request that has ended stays as it is."""
        if self.sequences.get(request.id) is request:
            self.cancelled.append(self._end(request, "abort"))

    def step(self) -> list[TokenEvent]:
        """Do one loop for everything in the loop, and the work before and after it; return the new tokens.

        If it raises, every request has ended with "error", and the engine takes new ones.
        """
        if self.model.training:
            raise RuntimeError("the model is in training mode, but the engine answers; call model.eval()")
        try:
            return self._step()
        except BaseException:
            for seq in list(self.sequences.values()):
                self._end(seq, "error")
            self.runner.clear()
            raise

    def _step(self) -> list[TokenEvent]:
        events, self.cancelled = self.cancelled, []
        # 1. Coda, head and sampling for chunks that have left the loop, if the policy says so.
        if exited := self.scheduler.read_out():
            events += self._read_out(exited)
        # 2. Pages out of the way, and back in. A page that goes out may come in again for another sequence.
        output = self.scheduler.schedule()
        for seq, pages in output.swap_out:
            seq.swapped = self.kv.read(pages)
            self.kv.unmap(seq)
        for seq, pages in output.swap_in:
            assert seq.swapped is not None
            self.kv.write(pages, seq.swapped)
            seq.swapped = None
        # 3. Embedding and prelude of the chunks that start, then one loop for all.
        self.runner.start(output.start)
        self.scheduler.after_loop(self.runner.loop())
        return events

    def _read_out(self, seqs: list[Sequence]) -> list[TokenEvent]:
        # Coda for all; log-probabilities of prompts; a new token for those at the end of what is known.
        out = self.runner.read_out(seqs)
        for seq, states in out.states.items():
            self._score_prompt(seq, states)
        yielding = [seq for seq in seqs if seq.yields_token]
        sampled = sample_batch(out.logits, yielding) if yielding else []
        tokens = dict(zip(yielding, zip(sampled, out.loops, strict=True), strict=True))
        events = []
        for seq, is_nan in zip(seqs, out.is_nan, strict=True):
            token, loops = tokens.get(seq, (None, 0))
            if is_nan or (seq in tokens and token is None):
                # The request ends before its pages enter the prefix cache.
                events.append(self._end(seq, "error"))
                continue
            self.scheduler.after_read_out(seq)
            if token is not None:
                events.append(self._append(seq, token, loops) if seq.params.max_tokens else self._end(seq, "length"))
        return events

    def _score_prompt(self, seq: Sequence, states: Tensor) -> None:
        """Add the log-probabilities of the prompt tokens that follow those of a chunk."""
        first, n_best = seq.n_computed, seq.params.prompt_logprobs
        assert n_best is not None
        following = seq.prompt_ids[first + 1 : first + 1 + len(states)]
        # A few positions at a time, because logits are much wider than states.
        for start in range(0, len(following), GRID):
            tokens = following[start : start + GRID]
            logits = self.runner.logits(states[start : start + len(tokens)])
            for scored in log_probabilities(logits, tokens, n_best):
                assert scored.logprob is not None and scored.top_logprobs is not None
                seq.prompt_logprobs.append(scored.logprob)
                seq.prompt_top_logprobs.append(scored.top_logprobs)

    def _append(self, seq: Sequence, sampled: SampledToken, loops: int) -> TokenEvent:
        """Add a token to an answer, and end the answer if the token is its last."""
        token = sampled.token
        assert seq.sampler is not None
        matcher, detokenizer = seq.sampler.matcher, seq.detokenizer
        if matcher is not None and not matcher.take(token):
            # The library limits the work for a token itself.
            return self._end(seq, "abort")
        seq.token_ids.append(token)
        seq.loops.append(loops)
        seq.first_token_s = seq.first_token_s or time.monotonic()
        if sampled.logprob is not None and sampled.top_logprobs is not None:
            seq.logprobs.append(sampled.logprob)
            seq.top_logprobs.append(sampled.top_logprobs)
        text = "" if detokenizer is None else detokenizer.push(token)
        seq.text += text
        # The first of these that holds is the reason of the end: stop string, stop token, schema, length.
        reason = None
        if detokenizer is not None and detokenizer.stopped is not None:
            reason, seq.stop_reason = "stop", detokenizer.stopped
        elif token in seq.stop_ids:
            reason, seq.stop_reason = "stop", token if token in seq.params.stop_token_ids else None
        elif matcher is not None and matcher.done:
            reason = "stop"
        elif len(seq.token_ids) == seq.params.max_tokens:
            reason = "length"
        if reason is not None:
            text += self._end(seq, reason).text
        added = "" if detokenizer is None else detokenizer.added
        return TokenEvent(seq, token, text, loops, added, sampled.logprob, sampled.top_logprobs, reason)

    def _end(self, seq: Sequence, reason: str) -> TokenEvent:
        """Take a request out of the engine; the event has the text that was held back until now."""
        rest = "" if seq.detokenizer is None else seq.detokenizer.flush()
        seq.text += rest
        seq.finish_reason, seq.finished_s = reason, time.monotonic()
        # Objects that only a running request needs are dropped, because callers may store the record of the answer.
        seq.rule = seq.sampler = seq.detokenizer = seq.swapped = None
        self.scheduler.finish(seq)
        self.runner.release(seq)
        del self.sequences[seq.id]
        return TokenEvent(seq, None, rest, 0, finish_reason=reason)


def cache_bytes(device: torch.device) -> int:
    """Return the default size of keys and values in bytes: a share of the free memory of the device."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        # Where the system does not know the free memory, it is a share of all memory.
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return int(MEMORY_SHARE * free)
