"""The engine: requests in, tokens out, as many at once as there are rows, each at its own depth."""

import os
import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field, fields
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from open_mythos.accounting import kv_bytes_per_token, n_layers
from open_mythos.checks import check_bool, check_int
from open_mythos.engine.calibration import measure_costs, run_once
from open_mythos.engine.model_runner import Chunk, Row, Runner
from open_mythos.engine.paged_kv_cache import PagedKV
from open_mythos.engine.request_checks import Rules, check_length, check_tokens, depth_of, prompt_ids
from open_mythos.engine.sampler import Chosen, Draw, choose, log_probabilities
from open_mythos.engine.scheduler import Limits, Refill, Scheduler
from open_mythos.engine.sequence import GRID, Sequence
from open_mythos.engine.step_costs import StepCosts
from open_mythos.engine.structured_outputs import Grammars, Matcher
from open_mythos.generation.sampling import Sampling, generator_of
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.model import OpenMythos
from open_mythos.nn.halting import Fixed, HaltingRule
from open_mythos.tokenization.detokenizer import AnswerText
from open_mythos.tokenization.tokenizer import Tokenizer

MEMORY_SHARE = 0.25
"""Of the free memory, for keys and values, unless `kv_tokens` says how much."""


@dataclass(frozen=True)
class EngineConfig:
    """How much an engine does at once."""

    max_rows: int = 32
    """Requests that are worked on together."""
    max_queue: int = 1024
    """Requests that wait, at most."""
    kv_tokens: int | None = None
    """Tokens that the pages have room for, at `max_loop_iters` loops each; None: a full context for each row, or what a
    quarter of the free memory holds."""
    page_tokens: int = 16
    """Tokens of a page: 8, 16, 32 or 64."""
    max_prefill_tokens: int = 512
    """Tokens of prompts in the loop at once: more of them let the others wait longer between two tokens."""
    prefix_reuse: bool = True
    """Use the keys and values of equal beginnings again."""
    batch_invariant: bool = True
    """Give every request the same bits whatever else runs, for a little time; see docs/engine.md."""

    def __post_init__(self) -> None:
        check_int("max_rows", self.max_rows, 1, 2**16, "use max_rows=32")
        check_int("max_queue", self.max_queue, 1, 2**31, "use max_queue=1024")
        if self.kv_tokens is not None:
            check_int("kv_tokens", self.kv_tokens, 1, 2**40, "use kv_tokens=None for a quarter of the free memory")
        check_int("page_tokens", self.page_tokens, 8, GRID, "use page_tokens=16")
        if GRID % self.page_tokens:
            raise ValueError(f"page_tokens={self.page_tokens} must be 8, 16, 32 or 64; use page_tokens=16")
        check_int("max_prefill_tokens", self.max_prefill_tokens, GRID, 2**31, "use max_prefill_tokens=512")
        for name in ("prefix_reuse", "batch_invariant"):
            check_bool(name, getattr(self, name))


@dataclass(frozen=True)
class TokenEvent:
    """One more token of a request, or its end."""

    request: "Request"
    token_id: int | None
    """None at an end without a token: "abort", "error", and "length" where no token was asked for."""
    text: str
    """What can be shown now; it may lag behind the tokens while a character or a stop string is incomplete."""
    loops: int
    token_text: str = ""
    """Text that the token adds, shown yet or not; empty while a character is incomplete."""
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    finish_reason: str | None = None
    """"stop": a stop token or string, or a schema is met; "length": `max_tokens`; "abort": cancelled, or its schema is
    too much work; "error": the logits were NaN."""


@dataclass(eq=False)
class Request:
    """What was asked, and the answer so far."""

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    prompt_logprobs: list[float] = field(default_factory=list)
    """Log-probabilities of the prompt's tokens but the first, if they were asked for."""
    prompt_top_logprobs: list[dict[int, float]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    """Of the answer."""
    loops: list[int] = field(default_factory=list)
    """Loops that each of them took: those of the position it was read from."""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop token or string that ended it; None for the tokenizer's end token and any other end."""
    n_cached: int = 0
    """Tokens of the prompt that were found in pages of others."""
    arrived_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(eq=False)
class _Work:
    """A request inside the engine."""

    request: Request
    sequence: Sequence
    rule: HaltingRule
    draw: Draw
    answer: AnswerText | None
    stop_ids: frozenset[int]
    row: Row | None = None
    swapped: Tensor | None = None
    """Its keys and values while it has no pages."""

    @property
    def scores_prompt(self) -> bool:
        """True if tokens of the chunk in work are followed by tokens of the prompt that have to be scored."""
        return self.request.params.prompt_logprobs is not None and self.sequence.in_prompt


class Engine:
    """A model that many requests share. Not for several threads at once: one thread calls its methods, in turn.

    While it lives the weights have to stay as they are, and so have rules that requests give as objects: keys and
    values are used again.

    """

    def __init__(
        self,
        model: OpenMythos,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        costs: StepCosts | None = None,
        refill: Refill | None = None,
    ) -> None:
        """Puts the model in eval mode.

        Args:
            tokenizer: for prompts and stop strings that are text.
            costs: what a step costs; None: measured now.
            refill: when rows that have left the loop are read out; None: when that costs least.
        """
        config = config or EngineConfig()
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        cfg = model.cfg
        self.n_pages = -(-self._kv_tokens() // config.page_tokens) * n_layers(cfg, cfg.max_loop_iters)
        self.kv = PagedKV(cfg, self.n_pages, config.page_tokens, config.max_rows, model.dtype, model.device)
        self.runner = Runner(model, self.kv, config.max_rows, config.batch_invariant)
        limits = Limits(
            max_rows=config.max_rows,
            max_queue=config.max_queue,
            n_pages=self.n_pages,
            page_tokens=config.page_tokens,
            max_prefill_tokens=config.max_prefill_tokens,
            prefix_reuse=config.prefix_reuse,
        )
        run_once(self.runner)
        costs = costs or measure_costs(self.runner)
        self.runner.least_rows = costs.least_rows
        self.scheduler = Scheduler(limits, costs, refill)
        self.rules: Rules = WeakValueDictionary()
        """One object for each way to leave the loop, as long as a request asks for it: thresholds are endless."""
        self.grammars = None if tokenizer is None else Grammars(tokenizer, cfg.vocab_size)
        self.work: dict[Sequence, _Work] = {}
        self.of: dict[Request, _Work] = {}
        self.rows: dict[Row, _Work] = {}
        self.aborted: list[TokenEvent] = []
        self.n_requests = 0

    def n_tokens_at(self, n_loops: int) -> int:
        """Tokens that there is room for where each may take so many loops."""
        return self.n_pages // n_layers(self.model.cfg, n_loops) * self.config.page_tokens

    def _kv_tokens(self) -> int:
        cfg, device = self.model.cfg, self.model.device
        if self.config.kv_tokens is not None:
            return self.config.kv_tokens
        each = kv_bytes_per_token(cfg, cfg.max_loop_iters, self.model.dtype.itemsize)
        return max(GRID, min(self.config.max_rows * cfg.max_seq_len, cache_bytes(device) // each))

    @property
    def invariant(self) -> bool:
        """Whether equal requests get equal bits whatever runs beside them; False on anything but a CPU."""
        return self.runner.invariance is not None and self.runner.invariance.holds

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or in work, or an end has not been told."""
        return bool(self.work or self.aborted)

    def add(self, prompt: str | Ids[int], params: SamplingParams | None = None) -> Request:
        """Queue a request.

        Raises:
            TypeError, ValueError: prompt or params are unusable with this model; nothing has been queued.
            ImportError: `json_schema` needs a library that is not installed.
            QueueFull: `max_queue` requests wait already.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(
                f"n={params.n} is for LLM.generate; add a request for each answer, with seeds of their own"
            )
        cfg = self.model.cfg
        ids = prompt_ids(prompt, self.tokenizer, cfg)
        check_length(len(ids), params.max_tokens, cfg)
        check_tokens(params, cfg)
        rule, n_loops, depth_key = depth_of(params, self.model, self.rules)
        end = None if self.tokenizer is None or params.ignore_eos else self.tokenizer.eos_id
        stop_ids = frozenset(params.stop_token_ids) | ({end} if end is not None else set())
        answer = AnswerText(self.tokenizer, params.stop_strings, ids) if self.tokenizer is not None else None
        if params.stop_strings and answer is None:
            raise ValueError(f"stop={params.stop_strings[0]!r} is text, which needs a tokenizer; use stop_token_ids")
        matcher = self._matcher(params)
        sequence = Sequence(
            id=self.n_requests,
            token_ids=list(ids),
            n_prompt=len(ids),
            max_tokens=max(1, params.max_tokens),
            n_loops=n_loops,
            depth_key=depth_key,
            is_fixed=isinstance(rule, Fixed),
            pages_per_block=n_layers(cfg, n_loops),
            may_reuse=params.prompt_logprobs is None,
        )
        self.scheduler.add(sequence)
        self.n_requests += 1
        request = Request(sequence.id, ids, params)
        work = _Work(request, sequence, rule, _draw(params, matcher), answer, stop_ids)
        self.work[sequence] = self.of[request] = work
        return request

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if params.schema is None:
            return None
        if self.grammars is None:
            raise ValueError("json_schema is about text, which needs a tokenizer; give one to the engine")
        return self.grammars.matcher(params.schema)

    def cancel(self, request: Request) -> None:
        """End a request, wherever it is; its row and pages are free at once. Nothing if it has ended already."""
        work = self.of.get(request)
        if work is not None:
            self.aborted.append(TokenEvent(request, None, self._end(work, "abort"), 0, finish_reason="abort"))

    def step(self) -> list[TokenEvent]:
        """One loop for everything that is in it, and what goes before and after; the new tokens.

        Should it raise, every request has ended with "error", and the engine takes new ones.
        """
        if self.model.training:
            raise RuntimeError("the model is in training mode, but the engine answers; call model.eval()")
        try:
            return self._step()
        except BaseException:
            for work in list(self.work.values()):
                self._end(work, "error")
            self.runner.clear()
            raise

    def _step(self) -> list[TokenEvent]:
        events, self.aborted = self.aborted, []
        done = self.scheduler.read_out()
        if done:
            events += self._read_out([self.work[sequence] for sequence in done])
        todo = self.scheduler.schedule()
        for sequence, pages in todo.swap_out:
            work = self.work[sequence]
            work.swapped = self.kv.read(pages) if pages else None
            self.runner.unmap(_row(work))
        for sequence, pages in todo.swap_in:
            work = self.work[sequence]
            if work.swapped is not None:
                self.kv.write(pages, work.swapped)
                work.swapped = None
        self.runner.start([self._chunk(self.work[sequence], n) for sequence, n in todo.start])
        self.scheduler.looped([(self.rows[row].sequence, n) for row, n in self.runner.loop()])
        return events

    def _read_out(self, works: list[_Work]) -> list[TokenEvent]:
        ends = [work.sequence.n_computed + work.sequence.n_running == work.sequence.n_tokens for work in works]
        scored = [work for work in works if work.scores_prompt]
        out = self.runner.read_out([_row(work) for work in works], ends, [_row(work) for work in scored])
        for work in scored:
            self._score_prompt(work, out.states[_row(work)])
        last = [work for work, end in zip(works, ends, strict=True) if end]
        ids = [work.sequence.token_ids for work in last], [work.request.token_ids for work in last]
        chosen = choose(out.logits, [work.draw for work in last], *ids) if last else []
        found = dict(zip(last, zip(chosen, out.loops, strict=True), strict=True))
        events = []
        for work, is_nan in zip(works, out.is_nan, strict=True):
            token, loops = found.get(work, (None, 0))
            if is_nan or (work in found and token is None):
                # Before others could find its pages.
                events.append(TokenEvent(work.request, None, self._end(work, "error"), 0, finish_reason="error"))
                continue
            self.scheduler.computed(work.sequence)
            if token is not None and not work.request.params.max_tokens:
                events.append(TokenEvent(work.request, None, self._end(work, "length"), 0, finish_reason="length"))
            elif token is not None:
                events.append(self._append(work, token, loops))
        return events

    def _score_prompt(self, work: _Work, states: Tensor) -> None:
        """Add the log-probabilities of the tokens of the prompt that follow those of a chunk."""
        request, first = work.request, work.sequence.n_computed
        following = request.prompt_ids[first + 1 : first + 1 + len(states)]
        n_best = request.params.prompt_logprobs
        assert n_best is not None
        # A few positions at a time: a vocabulary is much wider than the model.
        for start in range(0, len(following), GRID):
            tokens = following[start : start + GRID]
            logits = self.runner.logits(states[start : start + len(tokens)])
            for each in log_probabilities(logits, tokens, n_best):
                assert each.logprob is not None and each.top_logprobs is not None
                request.prompt_logprobs.append(each.logprob)
                request.prompt_top_logprobs.append(each.top_logprobs)

    def _append(self, work: _Work, chosen: Chosen, loops: int) -> TokenEvent:
        """Add a token to an answer, and end it if that was the last."""
        request, token, matcher = work.request, chosen.token, work.draw.matcher
        if matcher is not None and not matcher.take(token):
            # The library has a bound of its own on the work for a token.
            return TokenEvent(request, None, self._end(work, "abort"), 0, finish_reason="abort")
        work.sequence.token_ids.append(token)
        request.token_ids.append(token)
        request.loops.append(loops)
        if request.first_token_s is None:
            request.first_token_s = time.monotonic()
        if chosen.logprob is not None and chosen.top_logprobs is not None:
            request.logprobs.append(chosen.logprob)
            request.top_logprobs.append(chosen.top_logprobs)
        piece, reason = "", None
        if work.answer is not None:
            piece = work.answer.push(token)
            if work.answer.stopped is not None:
                reason, request.stop_reason = "stop", work.answer.stopped
        if reason is None and token in work.stop_ids:
            reason, request.stop_reason = "stop", token if token in request.params.stop_token_ids else None
        if reason is None and matcher is not None and matcher.done:
            reason = "stop"
        if reason is None and len(request.token_ids) == request.params.max_tokens:
            reason = "length"
        request.text += piece
        if reason is not None:
            piece += self._end(work, reason)
        added = "" if work.answer is None else work.answer.added
        return TokenEvent(request, token, piece, loops, added, chosen.logprob, chosen.top_logprobs, reason)

    def _end(self, work: _Work, reason: str) -> str:
        """Take a request out of the engine; the text that was still held back."""
        request, row = work.request, work.row
        rest = "" if work.answer is None else work.answer.flush()
        request.text += rest
        request.finish_reason, request.finished_s = reason, time.monotonic()
        self.scheduler.cancel(work.sequence)
        if row is not None:
            work.row = None
            self.rows.pop(row, None)
            self.runner.release(row)
        self.work.pop(work.sequence, None)
        self.of.pop(request, None)
        return rest

    def _chunk(self, work: _Work, n: int) -> Chunk:
        sequence = work.sequence
        if work.row is None:
            work.row = self.runner.admit(work.rule, sequence.n_loops)
            self.rows[work.row] = work
            work.request.n_cached = sequence.n_cached
        first = sequence.n_computed
        return Chunk(work.row, first, sequence.token_ids[first : first + n], sequence.blocks)


def cache_bytes(device: torch.device) -> int:
    """The bytes that keys and values may take, unless told: a share of what is free on the device."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        # Not every system tells what is free; there it is a share of all memory.
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return int(MEMORY_SHARE * free)


def _row(work: _Work) -> Row:
    assert work.row is not None
    return work.row


def _draw(params: SamplingParams, matcher: Matcher | None) -> Draw:
    seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
    how = Sampling(**{f.name: getattr(params, f.name) for f in fields(Sampling)})
    return Draw(how, generator_of(seed), params.logprobs, matcher)
