"""Medians with their spread, ratios of paired measurements, and the line through measured costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Five numbers that describe a sample; quartiles interpolate between neighbours."""

    median: float
    min: float
    q1: float
    q3: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Describe at least one value."""
        if not len(values):
            raise ValueError("values=() has no median; measure at least once")
        return cls(*map(float, np.percentile(values, (50, 0, 25, 75, 100))), len(values))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Describe the ratios of pairs, each measured one right after the other: a drift of the machine cancels."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def noise(self_ratios: Spread) -> float:
    """Return how far the same command is from itself: the farther quartile of its paired ratios from 1, as a share."""
    return max(self_ratios.q1, 1 / self_ratios.q1, self_ratios.q3, 1 / self_ratios.q3) - 1


def differs(ratio: float, self_ratios: Spread) -> bool:
    """Return whether a ratio is farther from 1 than the same command is from itself; otherwise nothing is claimed."""
    return max(ratio, 1 / ratio) - 1 > noise(self_ratios)


def fit_line(work: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Return (a, b) of the line a + b * work with the least sum of squared relative errors, with a >= 0."""
    weights, per_work = 1 / np.array(times), np.array(work) / np.array(times)
    scale = per_work.max() / weights.max()
    (a, b), *_ = np.linalg.lstsq(np.stack((weights, per_work / scale), 1), np.ones(len(times)), rcond=None)
    if a >= 0:
        return float(a), float(b / scale)
    return 0.0, float(per_work.sum() / (per_work**2).sum())
