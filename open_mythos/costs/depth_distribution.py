"""Probabilities of depths, and the deepest micro-batch to expect; computed from the laws, without sampling.

The ramp of `loops.ramp_steps` is left out: it is short, and the steps after it are deeper.
"""

import math

import numpy as np

from open_mythos.config import MAX_LOOPS
from open_mythos.train.depth_sampling import LoopsConfig


def probabilities(loops: LoopsConfig) -> np.ndarray:
    """Return p[d], the probability that a row runs d loops, from d = 0 (never) up to the deepest that matters."""
    if loops.law == "fixed":
        p = np.zeros(int(loops.mean) + 1)
        p[-1] = 1
    elif loops.law == "uniform":
        p = np.full(int(2 * loops.mean), 1 / (2 * loops.mean - 1))
        p[0] = 0
    elif loops.law == "poisson":
        [p] = _one_more_than_poisson(np.array([loops.mean - 1]))
    else:
        # The mean of the Poisson is itself drawn; 129 points of the normal, each with its weight.
        z = np.linspace(-6, 6, 129)
        weight = np.exp(-(z**2) / 2)
        rates = np.exp(math.log(loops.mean) - loops.sigma**2 / 2 + loops.sigma * z)
        p = weight @ _one_more_than_poisson(rates) / weight.sum()
    limit = min(loops.max_loops or MAX_LOOPS, MAX_LOOPS)
    if len(p) > limit + 1:
        p = np.append(p[:limit], p[limit:].sum())
    return p / p.sum()


def mean_loops(loops: LoopsConfig, window: bool = False) -> float:
    """Return the mean loops of a row, or with `window` its mean loops with gradient."""
    p = probabilities(loops)
    depth = np.arange(len(p))
    return float((with_gradient(loops, depth) if window else depth) @ p)


def deepest(loops: LoopsConfig, rows: int, draws: int) -> int:
    """Return the loops with gradient that `rows` rows have together, in the deepest of `draws` micro-batches.

    A sum is passed over if `draws` micro-batches are expected to exceed it less than once.
    """
    p = probabilities(loops)
    kept = with_gradient(loops, np.arange(len(p)))
    one = total = np.bincount(kept, weights=p)
    times = rows if loops.per == "batch" else 1  # all rows of a batch have one depth
    for _ in range(rows - times):
        total = np.convolve(total, one)
    beyond = np.cumsum(total[::-1])[::-1]  # P(sum >= s)
    # Rounding leaves sums that never occur with a probability of about 1e-17.
    return times * int(np.flatnonzero(beyond * draws >= 1 - 1e-9)[-1])


def with_gradient(loops: LoopsConfig, depth: np.ndarray) -> np.ndarray:
    """Return how many of `depth` loops are inside the window of back-propagation."""
    return np.minimum(depth, loops.backprop_depth) if loops.backprop_depth else depth


def _one_more_than_poisson(rates: np.ndarray) -> np.ndarray:
    """Return p[n, d] of d = 1 + Poisson(rates[n]), (N,) -> (N, K), as far as 1e-12 of the weight is reached."""
    most = rates.max()
    k = np.arange(int(most + 10 * math.sqrt(most) + 30))
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(k[1:]))))
    # A rate of zero has all its weight at zero.
    log_rates = np.log(np.maximum(rates, 1e-300))[:, None]
    return np.pad(np.exp(k * log_rates - rates[:, None] - log_factorial), ((0, 0), (1, 0)))
