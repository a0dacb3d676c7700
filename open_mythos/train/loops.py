"""How many loops each row of a batch runs: the depth laws.

The depth of a row is a pure function of (seed, step, index of the row in the global batch), so it does not
depend on micro-batches, processes or what ran before.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from open_mythos.checks import check_choice, check_int, check_number
from open_mythos.config import MAX_LOOPS
from open_mythos.train.rng import Purpose, stream

Law = Literal["fixed", "uniform", "poisson", "poisson_lognormal"]


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

    law: Law = "fixed"
    mean: float = 4
    sigma: float = 0.5
    """Spread of log depth; poisson_lognormal only."""
    per: Literal["sequence", "batch"] = "sequence"
    """Whether every row has its own depth or all rows of a step share one."""
    max_loops: int | None = None
    """Depths above are cut to this; None does not cut below 4096."""
    ramp_steps: int = 0
    """Steps over which the cut rises from 1 to max_loops, each depth for as many steps; 0 starts at max_loops."""
    backprop_depth: int | None = None
    """Back-propagate through the last so many loops only; None goes through all."""

    def __post_init__(self) -> None:
        check_choice("loops.law", self.law, get_args(Law))
        check_number("loops.mean", self.mean, 1, MAX_LOOPS)
        check_number("loops.sigma", self.sigma, 0)
        check_choice("loops.per", self.per, ("sequence", "batch"))
        if self.max_loops is not None:
            check_int("loops.max_loops", self.max_loops, 1, MAX_LOOPS)
        check_int("loops.ramp_steps", self.ramp_steps, 0)
        if self.ramp_steps and self.max_loops is None:
            raise ValueError(
                f"loops.ramp_steps={self.ramp_steps} needs a depth to rise to; use loops.max_loops={int(2 * self.mean)}"
            )
        if self.backprop_depth is not None:
            check_int("loops.backprop_depth", self.backprop_depth, 1)
        steps = {"fixed": 1, "uniform": 2}.get(self.law)
        if steps and (self.mean * steps) % 1:
            raise ValueError(
                f"loops.mean={self.mean:g} must be a multiple of {1 / steps:g} for loops.law={self.law}; "
                f"use loops.mean={round(self.mean * steps) / steps:g}"
            )

    def depths(self, seed: int, step: int, rows: int) -> np.ndarray:
        """(rows,) int64 depths >= 1 of the global batch; a longer batch starts with the same depths."""
        rng = stream(seed, step, Purpose.DEPTH)
        n = rows if self.per == "sequence" else 1
        if self.law == "fixed":
            depth = np.full(n, int(self.mean))
        elif self.law == "uniform":
            depth = rng.integers(1, int(2 * self.mean), size=n)
        elif self.law == "poisson":
            depth = 1 + rng.poisson(self.mean - 1, size=n)
        else:
            # A generator of its own, so that row i does not depend on how many normals were drawn before it.
            tau = rng.spawn(1)[0].normal(np.log(self.mean) - self.sigma**2 / 2, self.sigma, size=n)
            depth = 1 + rng.poisson(np.exp(tau))
        limit = self.max_loops or MAX_LOOPS
        if step < self.ramp_steps:
            limit = 1 + limit * step // self.ramp_steps
        return np.broadcast_to(np.minimum(depth, limit), rows)
