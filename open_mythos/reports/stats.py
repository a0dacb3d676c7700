"""Means with their 95 % intervals: Student's t over seeds, the bootstrap over the windows or sequences of one model.

Seeds are the independent repetitions; resampling five of them gives intervals that contain the mean in 83 % of cases.
Shapes: S seeds, N windows or sequences.
"""

import functools
import math
from typing import Any, NamedTuple, Self

import numpy as np
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from open_mythos.ops.precision import at_least_float32

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % for 2 to 10 values; more values get the last, which makes their interval too wide."""
UNCLEAR = "not told apart from"
ONE_SEED = f"one seed, so {UNCLEAR}"


class Interval(NamedTuple):
    """Means and the ends of the 95 % intervals around them, three arrays of one shape; NaN ends where there is none."""

    mean: Any
    low: Any
    high: Any


def over_seeds(values: ArrayLike) -> Interval:
    """Compute Student's t interval of the mean over the first axis of (S, ...); one seed has no interval."""
    x = np.asarray(values, dtype=np.float64)
    mean, n = x.mean(0), len(x)
    half = T95[min(n, 10) - 2] * x.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.full_like(mean, np.nan)
    return Interval(mean, mean - half, mean + half)


def bootstrap(values: ArrayLike) -> Interval:
    """Compute the mean over the first axis of (N, ...) without its NaN, and the 95 % interval of 2,000 resamplings."""
    x = np.asarray(values, dtype=np.float64)
    mean, n = np.nanmean(x, 0), len(x)
    if n < 2:
        return Interval(mean, *np.full((2, *mean.shape), np.nan))
    flat, counts = x.reshape(n, -1), _resamplings(n)
    means = (counts @ np.nan_to_num(flat)) / (counts @ ~np.isnan(flat))
    low, high = np.nanquantile(means, (0.025, 0.975), axis=0)
    return Interval(mean, low.reshape(mean.shape), high.reshape(mean.shape))


@functools.lru_cache(8)
def _resamplings(n: int) -> np.ndarray:
    """(2000, n): how often each of `n` values was drawn, with replacement; the same draws in every call."""
    draws = np.random.default_rng(0).integers(n, size=(2000, n))
    return np.stack([np.bincount(drawn, minlength=n) for drawn in draws]).astype(np.float64)


class Estimate:
    """A number measured once per seed; its text is the mean with the interval, as in '0.512 [0.470, 0.554]'.

    A format specification is that of the numbers: f"{estimate:+.2f}". Differences are paired by seed.
    """

    def __init__(self, by_seed: ArrayLike, form: str = ".3f") -> None:
        self.by_seed = np.asarray(by_seed, dtype=np.float64)
        self.form = form

    @property
    def interval(self) -> Interval:
        """The mean and the two ends of its interval, NaN for one seed."""
        return over_seeds(self.by_seed)

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return self.interval[0]

    def __sub__(self, other: Self) -> Self:
        """Subtract seed by seed."""
        return type(self)(self.by_seed - other.by_seed, self.form)

    def __format__(self, form: str) -> str:
        """Write mean and interval with the format specification of a float."""
        mean, low, high = (f"{x:{form or self.form}}" for x in self.interval)
        return mean if len(self.by_seed) < 2 else f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self)

    def side(self, level: float, above: str = "above", below: str = "below", unclear: str = UNCLEAR) -> str:
        """Return the word for the side of a level that the whole interval lies on."""
        _, low, high = self.interval
        if math.isnan(low) and unclear == UNCLEAR:
            return ONE_SEED
        return above if low > level else below if high < level else unclear


class TextEstimate(Estimate):
    """A number measured on N windows of text by each of S models, (S, N): its interval is that of the text.

    It says nothing of another seed, so `verdict` also asks every seed for the sign.
    """

    @property
    def interval(self) -> Interval:
        """The mean and the ends of the bootstrap interval over windows, with the mean over seeds in each window."""
        return bootstrap(self.by_seed.mean(0))

    @property
    def verdict(self) -> str:
        """Name the sign where the interval and every seed agree on it: higher, lower, or undecided."""
        seen = np.array([*self.interval, *self.by_seed.mean(1)])
        return "higher" if (seen > 0).all() else "lower" if (seen < 0).all() else "undecided"


def rank_correlation(a: ArrayLike, b: ArrayLike, within: ArrayLike = 0) -> float:
    """Compute Spearman's correlation of (N,) and (N,); equal values share their mean rank. NaN if a or b is constant.

    Args:
        within: levels (N,) of a third quantity. Ranks are then taken less their mean at the same level, which removes
            an influence of any shape; a straight line through its ranks would leave some.
    """
    level = np.unique(np.broadcast_to(within, np.shape(a)), return_inverse=True)[1]
    rest = []
    for values in (a, b):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks = (counts.cumsum() - (counts + 1) / 2)[place]
        rest.append(ranks - (np.bincount(level, ranks) / np.bincount(level))[level])
    norms = [np.linalg.norm(x) for x in rest]
    if min(norms) <= 1e-9 * len(level) ** 1.5:
        return math.nan
    return float(rest[0] @ rest[1] / (norms[0] * norms[1]))


def token_bits(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy in bits, (B, T), of labels (B, T) under logits (B, T, V)."""
    return F.cross_entropy(at_least_float32(logits).mT, labels, reduction="none") / math.log(2)
