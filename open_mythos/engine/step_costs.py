"""What a step costs, from measured points. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

_LISTED = 4096  # values kept ready; beyond, the last slope


class Curve:
    """Seconds by number of tokens: straight lines between measured points.

    Before the first point its value holds; behind the last one the last slope goes on, if it does not fall.

    Raises:
        ValueError: no points, or one that cannot be.
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        if not points:
            raise ValueError("points={} must hold at least one measurement, tokens to seconds; measure {1: seconds}")
        for tokens, seconds in points.items():
            if tokens < 1 or not 0 <= seconds < float("inf"):
                raise ValueError(f"points={{{tokens}: {seconds}}} must be of at least 1 token and 0 s; measure again")
        known = sorted(points.items())
        self._values = [0.0] + [known[0][1]] * known[0][0]
        self.slope = 0.0
        """Seconds of each token behind the last point."""
        for (x0, y0), (x1, y1) in pairwise(known):
            self.slope = max(0.0, (y1 - y0) / (x1 - x0))
            self._values += [y0 + (y1 - y0) * (x - x0) / (x1 - x0) for x in range(x0 + 1, x1 + 1)]
        self._values += [known[-1][1] + self.slope * x for x in range(1, _LISTED - len(self._values) + 1)]

    def __call__(self, tokens: float) -> float:
        """Seconds; 0 for no tokens."""
        below = int(tokens)
        if below + 1 < len(self._values):
            value = self._values[below]
            return value + (tokens - below) * (self._values[below + 1] - value)
        return self._values[-1] + self.slope * (tokens - len(self._values) + 1)


@dataclass(frozen=True)
class StepCosts:
    """What a step costs."""

    loop: Curve
    """One loop of so many tokens."""
    outer: Curve
    """So many tokens outside the loop: coda, head, sampling, and embedding and prelude of what follows them."""
    least_rows: int = 1
    """Rows that a batch-invariant call is padded to at least, where that made these times shortest."""
