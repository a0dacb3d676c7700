"""What the engine is to reach."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Figures = dict[str, list[dict[str, Any]]]
"""Records of the cases without an error, by kind."""
Found = list[tuple[float, str]]
"""Values, and where each was found."""


@dataclass(frozen=True)
class Reach:
    """A bound on every value of a figure."""

    what: str
    bound: float
    read: Callable[[Figures], Found]
    at_most: bool = False

    @property
    def text(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def worst(self, found: Found) -> tuple[float, str]:
        return max(found) if self.at_most else min(found)


def _policies(value: Callable[[dict[str, Any]], float], subject: str = "", law: str = "") -> Callable[[Figures], Found]:
    return lambda figures: [
        (value(case), f"{case['subject']}, {case['law']}, R = {case['rows']}")
        for case in figures["Policies"]
        if case["subject"].startswith(subject) and case["law"].startswith(law)
    ]


def _over_fixed(case: dict[str, Any]) -> float:
    return case["over_fixed"]["median"]


REACH = (
    Reach("share of Amdahl's limit over fixed depth", 0.9, _policies(lambda case: case["share"])),
    Reach("over fixed depth, loop-heavy, geometric", 3.0, _policies(_over_fixed, "heavy", "geometric")),
    Reach("over fixed depth, loop-heavy, uniform", 1.5, _policies(_over_fixed, "heavy", "uniform")),
    Reach("over the best of (a), (b) and (c)", 0.97, _policies(lambda case: case["over_best"]["median"])),
    Reach(
        "p95 between a shallow request's tokens, half of the load deep over all shallow",
        1.5,
        lambda figures: [(c["over_shallow"]["median"], f"{c['clients']} clients") for c in figures["Fairness"]],
        at_most=True,
    ),
)
