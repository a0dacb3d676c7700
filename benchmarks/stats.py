"""Medians of paired ratios, with their spread."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Five numbers of a sample."""

    median: float
    min: float
    q1: float
    q3: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value; quartiles interpolate between neighbours."""
        if not values:
            raise ValueError("values=() has no median; measure at least once")
        ordered = sorted(values)
        q1, q3 = ordered[0], ordered[0]
        if len(ordered) > 1:
            q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(statistics.median(ordered), ordered[0], q1, q3, ordered[-1], len(ordered))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Spread of the ratio of each pair; the two were measured one right after the other."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def noise(self_ratios: Spread) -> float:
    """How far the same command is from itself: the farther quartile of its paired ratios from 1, as a share."""
    return max(self_ratios.q1, 1 / self_ratios.q1, self_ratios.q3, 1 / self_ratios.q3) - 1


def differs(ratio: float, self_ratios: Spread) -> bool:
    """Whether a ratio is farther from 1 than the same command is from itself. If not, no difference is claimed."""
    return max(ratio, 1 / ratio) - 1 > noise(self_ratios)
