"""An engine that is kept busy, and what it does in a stretch of time."""

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.engine.laws import DEEPEST
from benchmarks.engine.subjects import N_PROMPT
from open_mythos import OpenMythos
from open_mythos.engine.engine import Engine, EngineConfig, TokenEvent
from open_mythos.engine.readout_policy import StepCosts
from open_mythos.engine.scheduler import Refill
from open_mythos.generation.sampling_params import SamplingParams

NEW_TOKENS = 64
"""Of a request: contexts are spread evenly over 17 to 81 tokens, whatever the policy."""
ONE_ROW = 32
"""Tokens for each second that a window of one row is to take."""
Answers = dict[int, tuple[list[int], list[int]]]
"""Tokens and loops of the finished requests, by number."""


@dataclass
class Window:
    """What happened between two read-outs."""

    cpu: float = 0.0
    wall: float = 0.0
    tokens: int = 0
    depths: Counter[int] = field(default_factory=Counter)
    """How many of them took so many loops."""
    plain: list[float] = field(default_factory=list)
    """CPU seconds of every step that only looped."""
    reading: list[float] = field(default_factory=list)
    """Of every step that also read tokens out and began new ones."""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.cpu

    @property
    def depth(self) -> float:
        """Mean loops per token."""
        return mean(self.depths)


def mean(depths: Counter[int]) -> float:
    """Loops per token."""
    return sum(depth * n for depth, n in depths.items()) / depths.total()


def pool(model: OpenMythos, rows: int, batch_invariant: bool = True) -> EngineConfig:
    """So many rows, and memory for all of them and for prompts to be found again."""
    each = N_PROMPT + NEW_TOKENS + 16
    deeper = max(1.0, DEEPEST / model.cfg.max_loop_iters)
    return EngineConfig(rows, 4 * rows + 16, math.ceil((rows + 8) * each * deeper), batch_invariant=batch_invariant)


class Load:
    """An engine with all its rows busy: as many requests wait as there are rows, and one that ends is replaced.

    Prompts share all but their last token with an earlier one, which is found in reused pages: no step of a window
    computes a prompt. The first requests are of all lengths up to the last, so that later ones end evenly.
    """

    def __init__(
        self,
        model: OpenMythos,
        prompts: list[list[int]],
        rows: int,
        params: dict[str, Any],
        *,
        refill: Refill | None = None,
        costs: StepCosts | None = None,
        batch_invariant: bool = True,
        seed: int = 0,
    ) -> None:
        self.engine = Engine(model, config=pool(model, rows, batch_invariant), costs=costs, refill=refill)
        self.prompts, self.params, self.rows, self.seed = prompts, params, rows, seed
        self.number = 0
        self.numbers: dict[int, int] = {}
        """The request that is meant, by the engine's id."""
        self.answers: Answers = {}
        for _ in prompts:
            self._add(1)
        while self.engine.busy:
            self._finish(self.engine.step())
        for i in range(2 * rows):
            self._add(1 + i * NEW_TOKENS // rows if i < rows else NEW_TOKENS)

    def window(self, seconds: float) -> Window:
        """From a read-out to the first one after so many CPU seconds: the end depends on time, not on tokens.

        One row alone goes on for so many times ONE_ROW tokens, so that policies are timed on the same tokens: there a
        count favours nobody.
        """
        while not self.step():
            pass
        window = Window()
        started, wall = time.process_time(), time.perf_counter()
        before = started
        while True:
            events = self.step()
            now = time.process_time()
            (window.reading if events else window.plain).append(now - before)
            before = now
            window.tokens += len(events)
            window.depths.update(event.loops for event in events)
            if events and (window.tokens >= seconds * ONE_ROW if self.rows == 1 else now - started >= seconds):
                break
        window.cpu, window.wall = now - started, time.perf_counter() - wall
        return window

    def step(self) -> list[TokenEvent]:
        """One step of the engine; what ends is replaced."""
        events = self.engine.step()
        for _ in range(self._finish(events)):
            self._add(NEW_TOKENS)
        if self.engine.scheduler.n_admitted != self.rows:
            raise AssertionError(f"{self.engine.scheduler.n_admitted} of {self.rows} rows are busy")
        return events

    def _add(self, max_tokens: int) -> None:
        prompt = self.prompts[self.number % len(self.prompts)]
        params = SamplingParams(max_tokens=max_tokens, seed=self.seed + self.number, ignore_eos=True, **self.params)
        self.numbers[self.engine.add(prompt, params).id] = self.number
        self.number += 1

    def _finish(self, events: list[TokenEvent]) -> int:
        ended = [event.request for event in events if event.finish_reason]
        for request in ended:
            self.answers[self.numbers.pop(request.id)] = (request.token_ids, request.loops)
        return len(ended)
