"""The depth laws: the number of loops that each row of a batch runs.

The depth of a row is a pure function of (seed, step, rows of the global batch, index of the row in it), so it does not
depend on micro-batches, processes or what ran before.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from open_mythos.checks import NonNegativeInt, PositiveInt, Range, check_section
from open_mythos.config import MAX_LOOPS
from open_mythos.tasks.rng import Purpose, stream


@dataclass(frozen=True)
class LoopsConfig:
    """Law of the sampled depth.

    | law | depth | mean |
    |---|---|---|
    | fixed | mean (an integer) | mean |
    | uniform | 1 .. 2 * mean - 1, equally likely | mean |
    | poisson | 1 + Poisson(mean - 1) | mean |
    | poisson_lognormal | 1 + Poisson(exp(tau)), tau ~ N(log mean - sigma^2 / 2, sigma) | mean + 1 |

    Parcae draws max(1, Poisson(mean)) instead; 1 + Poisson(mean - 1) has the mean it is named for at any size.
    Source of poisson_lognormal: Geiping et al. 2025, arXiv 2502.05171.
    """

    law: Literal["fixed", "uniform", "poisson", "poisson_lognormal"] = "fixed"
    mean: Annotated[float, Range(1, MAX_LOOPS)] = 4
    sigma: Annotated[float, Range(0, 100)] = 0.5
    """Spread of log depth; poisson_lognormal only."""
    per: Literal["sequence", "batch"] = "sequence"
    """sequence: every row has its own depth. batch: all rows of a step have the same."""
    max_loops: Annotated[int, Range(1, MAX_LOOPS)] | None = None
    """Depths above are cut to this; None does not cut below 4096."""
    ramp_steps: NonNegativeInt = 0
    """Steps over which the cut rises from 1 to max_loops, each depth for as many steps; 0 starts at max_loops."""
    mean_ramp_steps: NonNegativeInt = 0
    """Steps over which `mean` rises from 1, slowly at first: 1 + (mean - 1) (1 - sqrt(1 - step / mean_ramp_steps))."""
    backprop_depth: PositiveInt | None = None
    """Back-propagate through the last so many loops only; None goes through all."""

    def __post_init__(self) -> None:
        check_section(self, "loops.")
        if self.ramp_steps and self.max_loops is None:
            raise ValueError(
                f"loops.ramp_steps={self.ramp_steps} needs a depth to rise to; use loops.max_loops={int(2 * self.mean)}"
            )
        steps = {"fixed": 1, "uniform": 2}.get(self.law)
        if steps and (self.mean * steps) % 1:
            raise ValueError(
                f"loops.mean={self.mean:g} must be a multiple of {1 / steps:g} for loops.law={self.law}; "
                f"use loops.mean={round(self.mean * steps) / steps:g}"
            )

    def depths(self, seed: int, step: int, rows: int) -> np.ndarray:
        """Draw (rows,) int64 depths >= 1 of the global batch.

        They are drawn for each row, and then arranged so that any neighbouring rows, such as those of one process, have
        about their share of the loops. For 64 processes of 8 rows at Poisson(8) the slowest has 7 % more than the mean;
        without the arrangement it has 29 % more.
        """
        rng = stream(seed, step, Purpose.DEPTH)
        n = rows if self.per == "sequence" else 1
        mean = self.mean_at(step)
        if self.law == "fixed":
            depth = np.full(n, math.ceil(mean))
        elif self.law == "uniform":
            depth = rng.integers(1, int(2 * mean), size=n)
        elif self.law == "poisson":
            depth = 1 + rng.poisson(mean - 1, size=n)
        else:
            tau = rng.normal(np.log(mean) - self.sigma**2 / 2, self.sigma, size=n)
            depth = 1 + rng.poisson(np.exp(tau))
        limit = self.max_loops or MAX_LOOPS
        if step < self.ramp_steps:
            limit = 1 + limit * step // self.ramp_steps
        depth = np.sort(np.minimum(depth, limit))[_evenly(n)]
        return np.broadcast_to(np.roll(depth, rng.integers(n)), rows)

    def mean_at(self, step: int) -> float:
        """Return the law's mean at a step: lower than at the end while it rises."""
        if step >= self.mean_ramp_steps:
            return self.mean
        return 1 + (self.mean - 1) * (1 - math.sqrt(1 - step / self.mean_ramp_steps))


def _evenly(n: int) -> np.ndarray:
    """Return a permutation of n that spreads every run of neighbours evenly: the ranks of van der Corput's numbers."""
    index, reversed_bits = np.arange(n), np.zeros(n, np.int64)
    for bit in range(max(1, n - 1).bit_length()):
        reversed_bits = reversed_bits << 1 | index >> bit & 1
    return reversed_bits.argsort().argsort()
