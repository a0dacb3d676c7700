"""When to take what has exited out of the computation: by measured cost where that is possible, else by counts.

Shapes: B rows, T tokens of a row, S key slots.
"""

import math
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Compaction = Literal["auto", "counts", "always", "never"]
"""Which policy: see `RecurrentBlock.compaction`."""

Trial = Callable[[int, bool], Callable[[], object]]
"""trial(n, as_rows) is a loop of n tokens, as n rows or as one, ready to run."""

LARGEST_TRIAL = 64
"""Tokens beyond which a loop is not measured on its own: the call's own loops are then long enough to be timed."""


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
    """Seconds that one loop takes by the tokens in it, and what narrowing costs, for one device, dtype and threads."""

    pair_s: float
    """One product of a query with a key, over all heads."""
    byte_s: float
    """Moving one byte of a selected row."""
    op_s: float
    """One small operation."""
    loops: dict[tuple[int, bool], float] = field(default_factory=dict)
    """Seconds of a loop by (tokens, whether each is a row of its own)."""

    @classmethod
    def measure(cls, heads: int, head_dim: int, dtype: torch.dtype) -> "CostCurve":
        """The costs that do not depend on the block, in about 5 ms."""
        q, k = torch.ones(1, heads, 32, head_dim, dtype=dtype), torch.ones(1, heads, 256, head_dim, dtype=dtype)
        mask = torch.ones(1, 1, 32, 256, dtype=torch.bool)
        moved, rows = torch.ones(64, 8192, dtype=dtype), torch.arange(0, 64, 2)
        return cls(
            pair_s=seconds(lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=mask)) / (32 * 256),
            byte_s=seconds(lambda: moved.index_select(0, rows)) / (moved.nbytes / 2),
            op_s=seconds(lambda: rows[rows[:2]]),
        )

    def loop_s(self, n: int, as_rows: bool, trial: Trial) -> float:
        """Seconds of a loop of at most `LARGEST_TRIAL` tokens, between powers of two that are measured when needed."""
        sizes = [2**i for i in range(int(math.log2(LARGEST_TRIAL)) + 1)]
        high = sizes[bisect_left(sizes, n)]
        if (high, as_rows) not in self.loops:
            self.loops[high, as_rows] = seconds(trial(high, as_rows))
        if high == n:
            return self.loops[high, as_rows]
        low = high // 2
        share = (n - low) / (high - low)
        return share * self.loops[high, as_rows] + (1 - share) * self.loop_s(low, as_rows, trial)

    def pays(
        self,
        before: Work,
        after: Work,
        last_s: float,
        moved_bytes: float,
        gathered_bytes: float,
        trial: Trial,
    ) -> bool:
        """Whether one loop at size `after`, with narrowing to it, costs less than one at size `before`.

        At least one more loop runs, so a yes never costs more than going on would have.

        Args:
            last_s: seconds of the loop before, which had size `before`.
            moved_bytes: states that narrowing has to move, once.
            gathered_bytes: keys that every loop after it has to gather.
            trial: makes a loop to measure.
        """
        as_rows = before.tokens == 1
        if before.n <= LARGEST_TRIAL:
            full = self.loop_s(before.n, as_rows, trial)
        else:
            full = max(0.0, last_s - self.pair_s * before.pairs)
        if after.n <= LARGEST_TRIAL:
            narrow = self.loop_s(after.n, as_rows, trial)
        else:
            least = self.loop_s(LARGEST_TRIAL, as_rows, trial)
            narrow = least + max(0.0, full - least) * (after.n - LARGEST_TRIAL) / (before.n - LARGEST_TRIAL)
        saved = full - narrow + self.pair_s * (before.pairs - after.pairs)
        return saved > SMALL_OPS * self.op_s + self.byte_s * (moved_bytes + gathered_bytes)


SMALL_OPS = 40
"""Small operations of one narrowing, counted with the profiler: 25 to 40 with the rule's state."""


def seconds(run: Callable[[], object], budget_s: float = 4e-3) -> float:
    """The least of 3 to 20 runs after a first one, which pays for what happens once."""
    run()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_s and len(times) < 20):
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
