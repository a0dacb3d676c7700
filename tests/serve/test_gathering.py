"""The rule of reading out against the best of simple ones, on cost curves and laws of depth; no model, no clock."""

import random
from collections import Counter
from collections.abc import Callable

from open_mythos.serve.costs import Curve, StepCosts
from open_mythos.serve.scheduler import Limits, Scheduler
from open_mythos.serve.sequence import Sequence


def line(fixed: float, each: float) -> Curve:
    return Curve({n: fixed + each * n for n in (1, 64)})


CURVES = {
    "loop-heavy": StepCosts(line(3, 0.15), line(1.2, 0.03)),
    "outer-heavy": StepCosts(line(4, 0.25), line(9, 0.5)),
    "flat": StepCosts(line(5, 0), line(5, 0)),
    "linear": StepCosts(line(0, 0.2), line(0, 0.1)),
    "jagged": StepCosts(Curve({1: 3.0, 2: 4.5, 3: 3.8, 4: 3.4, 64: 12.6}), Curve({1: 2.0, 2: 3.0, 3: 2.2, 64: 6.0})),
}
LAWS: dict[str, Callable[[random.Random], int]] = {
    "uniform": lambda rng: rng.randint(1, 16),
    "geometric": lambda rng: next((n for n in range(1, 16) if rng.random() < 0.25), 16),
    "equal": lambda rng: 8,
    "bimodal": lambda rng: rng.choice([1, 16]),
}
ROWS = [1, 8, 16, 32, 64]


def by_threshold(costs: StepCosts, law: Callable[[random.Random], int], rows: int, least: int, tokens: int) -> float:
    """Tokens per second if `least` have to wait before they are read out; a place is filled again at once."""
    rng = random.Random(rows)
    exits = Counter(law(rng) for _ in range(rows))
    k = done = now = 0
    seconds = 0.0
    while done < tokens:
        now += 1
        seconds += costs.loop(rows - k)
        k += exits.pop(now, 0)
        if k >= least or k == rows:
            seconds += costs.outer(k)
            done += k
            for _ in range(k):
                exits[now + law(rng)] += 1
            k = 0
    return done / seconds


def by_rule(costs: StepCosts, law: Callable[[random.Random], int], rows: int, tokens: int, fixed: int = 0) -> float:
    """The same with the scheduler's own rule."""
    rng = random.Random(rows)
    scheduler = Scheduler(Limits(rows, rows, n_pages=rows, page_tokens=2**30, prefix_reuse=False), costs)
    depths: dict[Sequence, int] = {}
    for i in range(rows):
        scheduler.add(Sequence(i, [0], 1, 2**29, fixed or 16, "any", fixed > 0, 1))
    done = 0
    seconds = 0.0
    while done < tokens:
        for seq in scheduler.read_out():
            scheduler.computed(seq)
            seq.token_ids.append(0)
            done += 1
        work = scheduler.schedule()
        if work.start and done:
            seconds += costs.outer(len(work.start))
        for seq, _ in work.start:
            depths[seq] = law(rng)
        looping = scheduler.looping
        seconds += costs.loop(len(looping))
        scheduler.looped([(seq, 0) for seq in looping if seq.loop + 1 == depths[seq]])
    return done / seconds


def compare(curve: str, law: str, rows: int, tokens: int, step: int = 1) -> tuple[float, int]:
    """The rule's throughput, the best threshold's being 1; and that threshold. 1 is at once, `rows` when all are done."""
    tried = sorted({1, rows, *range(1, rows, step)})
    speeds = {least: by_threshold(CURVES[curve], LAWS[law], rows, least, tokens) for least in tried}
    best = max(speeds, key=lambda least: speeds[least])
    return by_rule(CURVES[curve], LAWS[law], rows, tokens) / speeds[best], best
