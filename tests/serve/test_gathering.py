"""The rule of reading out against the best of simple ones, on cost curves and laws of depth; no model, no clock."""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from time import perf_counter

import pytest

from open_mythos.serve.costs import Curve, StepCosts
from open_mythos.serve.gathering import Gathering
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


def compare(curve: str, law: str, rows: int, tokens: int, least: Iterable[int]) -> float:
    """The rule's throughput over that of the best threshold. 1 reads out at once, `rows` when all are done."""
    best = max(by_threshold(CURVES[curve], LAWS[law], rows, k, tokens) for k in {1, rows, *least} if k <= rows)
    return by_rule(CURVES[curve], LAWS[law], rows, tokens) / best


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("curve", CURVES)
def test_rule_keeps_up_with_the_best_threshold(curve: str, law: str) -> None:
    for rows, tokens in ((1, 100), (8, 1500), (32, 3000)):
        assert compare(curve, law, rows, tokens, least=(2, 3, 5, 8, 12, 16, 20)) >= 0.97, rows


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("curve", CURVES)
def test_rule_keeps_up_with_every_threshold(curve: str, law: str, rows: int) -> None:
    assert compare(curve, law, rows, 20_000, least=range(1, rows)) >= 0.98


@pytest.mark.parametrize("curve", CURVES)
def test_depths_that_come_in_groups_are_worth_looking_ahead(curve: str) -> None:
    """At 1 or 16 loops, none exit in the next loop, and many in some: no threshold sees that."""
    best = max(by_threshold(CURVES[curve], LAWS["bimodal"], 16, k, 4000) for k in range(1, 17))
    assert by_rule(CURVES[curve], LAWS["bimodal"], 16, 4000) > best * (0.99 if curve == "linear" else 1.005)


@pytest.mark.parametrize("curve", CURVES)
def test_equal_depths_fall_into_step(curve: str) -> None:
    """Requests of one fixed depth that came one loop after another soon exit together."""
    scheduler = Scheduler(Limits(8, 8, n_pages=8, page_tokens=2**20), CURVES[curve])
    together = []
    for tick in range(150):
        if tick < 8:
            scheduler.add(Sequence(tick, [0], 1, 10_000, 8, "any", True, 1))
        done = scheduler.read_out()
        for seq in done:
            scheduler.computed(seq)
            seq.token_ids.append(0)
        together.append(len(done))
        scheduler.schedule()
        scheduler.looped([(seq, 0) for seq in scheduler.looping if seq.loop == 7])
    # Where nothing is fixed in a step, there is nothing to share.
    assert Counter(together[-16:]) == ({8: 2, 0: 14} if curve != "linear" else {1: 16})


def exited_and_looping(costs: StepCosts, depths: dict[int, int], loops: int) -> Scheduler:
    """Rows by their fixed depth, all started together, after so many loops without reading out."""
    scheduler = Scheduler(Limits(64, 64, n_pages=64, page_tokens=1024), costs)
    for number, depth in enumerate(depth for depth, rows in depths.items() for _ in range(rows)):
        scheduler.add(Sequence(number, [0], 1, 1024, depth, depth, True, 1))
    scheduler.schedule()
    for _ in range(loops):
        scheduler.looped([(seq, 0) for seq in scheduler.looping if seq.loop + 1 == seq.n_loops])
    return scheduler


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("shallow", [1, 2, 8])
def test_shallow_rows_do_not_wait_for_deep_ones(curve: str, shallow: int) -> None:
    """Nobody else is about to exit: waiting would gain nothing."""
    assert len(exited_and_looping(CURVES[curve], {shallow: 32, 16: 32}, shallow).read_out()) == 32


def test_one_shallow_row_does_not_wait_for_deep_ones() -> None:
    """Its tokens are what a loop brings in, not those of the seven others."""
    assert exited_and_looping(CURVES["loop-heavy"], {1: 1, 16: 7}, 1).read_out()


def test_what_joins_has_its_price() -> None:
    """Reading out two costs ten times as much as one, so there is nothing to wait for."""
    costs = StepCosts(line(0.1, 0.001), Curve({1: 1.0, 2: 10.0, 64: 10.0}))
    assert len(exited_and_looping(costs, {3: 1, 4: 1}, 3).read_out()) == 1


def test_shallow_rows_are_not_slowed_by_deep_ones() -> None:
    """Half the rows at 1 loop, half at 16, always refilled: the shallow ones get a token in nearly every loop."""
    scheduler = exited_and_looping(CURVES["loop-heavy"], {1: 32, 16: 32}, 1)
    tokens = Counter({1: 0, 16: 0})
    for _ in range(160):
        for seq in scheduler.read_out():
            scheduler.computed(seq)
            seq.token_ids.append(0)
            tokens[seq.n_loops] += 1
        scheduler.schedule()
        scheduler.looped([(seq, 0) for seq in scheduler.looping if seq.loop + 1 == seq.n_loops])
    assert tokens[1] >= 0.85 * 160 * 32
    assert tokens[16] >= 0.9 * 10 * 32


def test_known_exits_are_waited_for() -> None:
    """One row has exited, 63 will in the next loop: one more loop costs less than reading out twice."""
    costs = CURVES["outer-heavy"]
    assert not exited_and_looping(costs, {3: 1, 4: 63}, 3).read_out()
    assert len(exited_and_looping(costs, {3: 1, 4: 63}, 4).read_out()) == 64


def test_depths_are_learned() -> None:
    """Chunks took 5 loops or 16: the rule waits for those that have done 4, not for those that went on after 5."""
    gathering = Gathering(CURVES["outer-heavy"])
    seqs = [Sequence(i, [0], 1, 16, 16, "any", False, 1, n_running=1, n_looping=1) for i in range(8)]

    def pays(loops: int) -> bool:
        looping = [replace(seq, loop=loops) for seq in seqs[4:]]
        return gathering.pays(looping, [replace(seq, n_looping=0) for seq in seqs[:4]])

    assert pays(4) is pays(5)
    for loops in [5, 16] * 20:
        gathering.exited(replace(seqs[0], loop=loops))
    assert not pays(4)
    assert pays(5)


def test_kinds_of_chunks() -> None:
    """Depths are kept apart by depth key and for prompts; new ones count more than old ones."""
    gathering = Gathering(CURVES["flat"])
    decode = Sequence(0, [0] * 9, 9, 16, 16, "any", False, 1, n_computed=8, n_running=1)
    prompt = replace(decode, n_computed=0, n_running=4)
    for _ in range(3000):
        gathering.exited(replace(decode, loop=3))
        gathering.exited(replace(prompt, loop=9))
        gathering.exited(replace(decode, loop=15, depth_key="other"))
    assert gathering._of(decode).mean == pytest.approx(3, abs=0.1)
    assert gathering._of(prompt).mean == pytest.approx(9, abs=0.1)
    for _ in range(3000):
        gathering.exited(replace(decode, loop=8))
    assert gathering._of(decode).mean == pytest.approx(8, abs=0.5)
    # Four tokens wait whose prompt goes on behind them; then five at its end, behind which one new token follows.
    assert gathering._sizes([prompt])[0] == 4
    assert gathering._sizes([replace(decode, n_computed=4, n_running=5)])[0] == 1


def test_what_waiting_loses() -> None:
    """Seven rows of depth 16 loop beside one of depth 1 that waits: it would have gone on sixteen times as fast."""
    gathering = Gathering(CURVES["loop-heavy"])
    deep = [Sequence(i, [0], 1, 16, 16, 16, True, 1, n_running=1, n_looping=1) for i in range(7)]
    gathering.waited(deep, [Sequence(7, [0], 1, 16, 1, 1, True, 1, n_running=1)])
    assert gathering._lost == pytest.approx(4.05 - 4.2 * (7 / 16) / (7 / 16 + 1))
    gathering.read_out()
    assert gathering._lost == 0


def test_refill_replaces_the_rule() -> None:
    asked = []

    def refill(n: int, k: int) -> bool:
        asked.append((n, k))
        return False

    scheduler = exited_and_looping(CURVES["flat"], {1: 3, 2: 2}, 0)
    scheduler._refill = refill
    scheduler.looped([(seq, 0) for seq in scheduler.looping if seq.n_loops == 1])
    assert scheduler.read_out() == []
    scheduler.looped([(seq, 0) for seq in scheduler.looping])
    assert len(scheduler.read_out()) == 5, "with nothing in the loop there is nothing to wait for"
    assert asked == [(2, 3)]


def test_microseconds_per_row() -> None:
    """Prints what scheduling takes with 64 rows (`-s` shows it); nothing is asserted about time."""
    rng = random.Random(0)
    rows, ticks = 64, 300
    scheduler = Scheduler(Limits(rows, rows, n_pages=2048), CURVES["loop-heavy"])
    for i in range(rows):
        scheduler.add(Sequence(i, [i] * 17, 17, 10_000 // rows, 16, "any", False, 2))
    seconds = 0.0
    left: list[tuple[Sequence, int]] = []
    for _ in range(ticks):
        start = perf_counter()
        scheduler.looped(left)
        done = scheduler.read_out()
        for seq in done:
            scheduler.computed(seq)
        seconds += perf_counter() - start
        for seq in done:
            seq.token_ids.append(rng.randrange(100))
        start = perf_counter()
        scheduler.schedule()
        seconds += perf_counter() - start
        left = [(seq, 0) for seq in scheduler.looping if rng.random() < 1 / 8 or seq.loop == 15]
    print(f"\nscheduler: {seconds / ticks / rows * 1e6:.2f} us per row and tick")
