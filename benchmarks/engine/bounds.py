"""What the measured costs allow. No torch."""

import random
from collections import Counter

from open_mythos.engine.readout_policy import StepCosts

LOOPS = 4000
"""Of a simulation."""


def allowed(n_loops: int, depth: float, loop_s: float, outer_s: float) -> float:
    """Amdahl's limit over fixed depth: a loop at full batch costs `loop_s`, everything around the loops `outer_s`."""
    return (n_loops * loop_s + outer_s) / (depth * loop_s + outer_s)


def best_threshold(costs: StepCosts, depths: Counter[int], n_loops: int, rows: int) -> tuple[float, int]:
    """The best over fixed depth of all rules that read out whenever so many rows have exited -> (ratio, that many).

    Simulated on the costs, with depths drawn from `depths`. It is less than Amdahl's limit: to read out few rows costs
    nearly as much as to read out many, and a loop that some rows wait for nearly as much as one of all.
    """
    fixed = rows / (n_loops * costs.loop(rows) + costs.outer(rows))
    thresholds = sorted({max(1, round(rows * share / 16)) for share in range(1, 17)})
    best, at = max((_rate(costs, depths, rows, threshold), threshold) for threshold in thresholds)
    return best / fixed, at


def _rate(costs: StepCosts, depths: Counter[int], rows: int, threshold: int) -> float:
    """Tokens per second of the rule."""
    rng = random.Random(0)
    values, weights = list(depths), list(depths.values())
    left = Counter(rng.choices(values, weights, k=rows))
    looping, exited, spent, tokens = rows, 0, 0.0, 0
    for _ in range(LOOPS):
        spent += costs.loop(looping)
        left = Counter({depth - 1: n for depth, n in left.items()})
        gone = left.pop(0, 0)
        looping, exited = looping - gone, exited + gone
        if exited >= threshold or not looping:
            spent, tokens = spent + costs.outer(exited), tokens + exited
            left.update(rng.choices(values, weights, k=exited))
            looping, exited = rows, 0
    return tokens / spent
