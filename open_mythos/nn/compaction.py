"""When to take what has exited out of the computation: by measured cost where that is possible, else by counts.

Shapes: B rows, T tokens of a row, S key slots.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

Compaction = Literal["auto", "counts", "always", "never"]
"""Which policy: see `RecurrentBlock.compaction`."""

Trial = Callable[[int, bool, int], Callable[[], object]]
"""trial(n, as_rows, n_past) is a loop of n tokens, as n rows or as one, behind n_past earlier ones, ready to run."""

LARGEST_TRIAL = 64
"""Tokens up to which a loop is measured. Beyond, each costs what the last ones did."""

PAST = 512
"""Earlier tokens of the trials that find out what a key costs."""


@dataclass(frozen=True)
class Work:
    """One loop's size."""

    rows: int
    tokens: int
    """Of each row."""
    slots: int
    """Keys that a query may have to read."""
    causal: bool = False
    """Whether the kernel skips the keys behind each query, which takes the square of a call without a cache."""

    @property
    def n(self) -> int:
        return self.rows * self.tokens

    @property
    def pairs(self) -> float:
        """Products of a query with a key, per head."""
        return self.n * (self.slots / 2 if self.causal else self.slots)


def fewer_by_counts(before: Work, after: Work) -> bool:
    """The rule without a clock: narrow when at least a quarter of the tokens leaves. The same in every run."""
    return after.n <= 0.75 * before.n


@dataclass
class CostCurve:
    """Seconds that one loop takes by the tokens in it, and what narrowing costs, for one device, dtype and threads.

    Each point is measured when first needed and then stays, so that in one process the same call decides the same.
    """

    byte_s: float
    """Moving one byte of a selected row."""
    op_s: float
    """One small operation."""
    loops: dict[tuple[int, bool, int], float] = field(default_factory=dict)
    """Seconds of a loop by (tokens, whether each is a row of its own, earlier tokens)."""

    @classmethod
    def measure(cls, dtype: torch.dtype) -> "CostCurve":
        """The costs that do not depend on the block, in about 5 ms."""
        moved, rows = torch.ones(64, 8192, dtype=dtype), torch.arange(0, 64, 2)
        byte_s = seconds(lambda: moved.index_select(0, rows)) / (moved.nbytes / 2)
        return cls(byte_s, seconds(lambda: rows[rows[:2]]))

    def loop_s(self, n: int, as_rows: bool, trial: Trial) -> float:
        """Seconds of a loop of n tokens without a past: between powers of two that are measured, a straight line."""
        if n == 1:
            return self._point(1, as_rows, 0, trial)
        high = min(LARGEST_TRIAL, 1 << (n - 1).bit_length())
        a, b = self._point(high // 2, as_rows, 0, trial), self._point(high, as_rows, 0, trial)
        return b + (b - a) * (n - high) / (high - high // 2)

    def pair_s(self, as_rows: bool, trial: Trial) -> float:
        """Seconds of one token reading one key, over all heads."""
        n = 8 if as_rows else LARGEST_TRIAL
        return max(0.0, self._point(n, as_rows, PAST, trial) - self._point(n, as_rows, 0, trial)) / (n * PAST)

    def pays(self, before: Work, after: Work, moved_bytes: float, gathered_bytes: float, trial: Trial) -> bool:
        """Whether one loop at size `after`, with narrowing to it, costs less than one at size `before`.

        At least one more loop runs, so a yes does not cost more than going on would have.

        Args:
            moved_bytes: states that narrowing has to move, once.
            gathered_bytes: keys that every loop after it has to gather.
            trial: makes a loop to measure.
        """
        as_rows = before.tokens == 1
        saved = self.loop_s(before.n, as_rows, trial) - self.loop_s(after.n, as_rows, trial)
        saved += self.pair_s(as_rows, trial) * (before.pairs - after.pairs)
        return saved > SMALL_OPS * self.op_s + self.byte_s * (moved_bytes + gathered_bytes)

    def _point(self, n: int, as_rows: bool, n_past: int, trial: Trial) -> float:
        key = (n, as_rows, n_past)
        if key not in self.loops:
            self.loops[key] = seconds(trial(*key))
        return self.loops[key]


SMALL_OPS = 40
"""Small operations of one narrowing, counted with the profiler: 25 to 40 with the rule's state."""


def seconds(run: Callable[[], object]) -> float:
    """The least of up to 8 runs, 30 ms in all. One run is enough only if what happens once is small beside it."""
    times: list[float] = []
    while len(times) < 8 and (sum(times) < 0.03 or (len(times) == 1 and times[0] < 0.1)):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@contextmanager
def without_hooks(module: nn.Module) -> Generator[None]:
    """Inside, the forward hooks of `module` and its parts do not run: a measurement is no call that users asked for."""
    kept = [(m, m._forward_hooks, m._forward_pre_hooks) for m in module.modules()]
    for m, _, _ in kept:
        m._forward_hooks, m._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for m, hooks, pre_hooks in kept:
            m._forward_hooks, m._forward_pre_hooks = hooks, pre_hooks
