"""The rule of reading out against the best of simple ones, on cost curves and laws of depth; no model, no clock."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from time import perf_counter

import pytest

from open_mythos.engine.readout_policy import Curve, ReadoutPolicy, StepCosts
from open_mythos.engine.scheduler import Scheduler
from open_mythos.engine.sequence import Sequence
from open_mythos.generation.sampling_params import SamplingParams
from tests.engine.unchecked import Unchecked


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
    "fast": lambda rng: next((n for n in range(1, 16) if rng.random() < 0.8), 16),
    "slow": lambda rng: next((n for n in range(1, 16) if rng.random() < 0.1), 16),
    "late": lambda rng: rng.randint(12, 16),
}
Mix = dict[int | str, int]
"""Rows by their fixed depth or their law."""
SAME: list[Mix] = [{law: rows} for law in ("uniform", "geometric", "equal", "bimodal") for rows in (1, 8, 16, 32, 64)]
FIXED: list[Mix] = [
    {shallow: few, deep: many}
    for shallow, deep in ((1, 16), (2, 8), (4, 16))
    for few, many in ((1, 7), (4, 60), (8, 24), (16, 16), (32, 32), (60, 4))
]
TWO: list[Mix] = [
    {one: few, other: many}
    for one, other in (("fast", "late"), ("geometric", "uniform"), (1, "slow"), (5, "geometric"))
    for few, many in ((1, 7), (4, 60), (16, 16), (60, 4))
]
OTHER: list[Mix] = [
    {"bimodal": 3},
    {"uniform": 24},
    {2: 4, 7: 10, 16: 20},
    {1: 4, "geometric": 20, 16: 20},
    {6: 5, 31: 9},
]


def draw(mix: Mix, loops: int) -> list[list[int]]:
    """Depths of the chunks of each row, more than it can do in so many loops."""
    rows = []
    for kind, n in mix.items():
        for _ in range(n):
            rng = random.Random(len(rows))
            rows.append([kind if isinstance(kind, int) else LAWS[kind](rng) for _ in range(loops + 2)])
    return rows


def by_threshold(costs: StepCosts, drawn: list[list[int]], loops: int, least: int) -> float:
    """Tokens per second if `least` have to wait before they are read out; a place is filled again at once."""
    depths = [iter(row) for row in drawn]
    exits: defaultdict[int, list[int]] = defaultdict(list)
    for row, of_row in enumerate(depths):
        exits[next(of_row)].append(row)
    waiting: list[int] = []
    done, seconds = 0, 0.0
    for now in range(1, loops + 1):
        seconds += costs.loop(len(depths) - len(waiting))
        waiting += exits.pop(now, [])
        if len(waiting) >= min(least, len(depths)):
            seconds += costs.outer(len(waiting))
            done += len(waiting)
            for row in waiting:
                exits[now + next(depths[row])].append(row)
            waiting = []
    return done / seconds


def by_rule(costs: StepCosts, mix: Mix, drawn: list[list[int]], loops: int) -> float:
    """The same with the scheduler's own rule."""
    depths = [iter(row) for row in drawn]
    rows = len(depths)
    scheduler = Scheduler(Unchecked(rows, rows, page_tokens=2**30, prefix_reuse=False), rows, costs)
    for i, kind in enumerate(kind for kind, n in mix.items() for _ in range(n)):
        is_fixed = isinstance(kind, int)
        scheduler.add(Sequence(i, [0], SamplingParams(max_tokens=2**29), kind if is_fixed else 16, kind, is_fixed, 1))
    ends: dict[Sequence, int] = {}
    done, seconds = 0, 0.0
    for _ in range(loops):
        ends |= {seq: next(depths[seq.id]) for seq in scheduler.schedule().start}
        looping = scheduler.looping
        seconds += costs.loop(len(looping))
        scheduler.after_loop([(seq, 0) for seq in looping if seq.loop + 1 == ends[seq]])
        exited = scheduler.read_out()
        seconds += costs.outer(len(exited))
        done += len(exited)
        for seq in exited:
            scheduler.after_read_out(seq)
            seq.token_ids.append(0)
    return done / seconds


def compare(curve: str, mix: Mix, loops: int, least: Iterable[int]) -> float:
    """The rule's throughput over that of the best threshold. 1 reads out at once, all rows when all are done."""
    rows = sum(mix.values())
    drawn = draw(mix, loops)
    best = max(by_threshold(CURVES[curve], drawn, loops, k) for k in {1, rows, *least} if k <= rows)
    return by_rule(CURVES[curve], mix, drawn, loops) / best


@pytest.mark.parametrize(
    "mix",
    [
        {"uniform": 8},
        {"geometric": 32},
        {"equal": 8},
        {"bimodal": 3},
        {"bimodal": 24},
        {1: 4, 16: 60},
        {2: 1, 8: 7},
        {"fast": 4, "late": 60},
    ],
    ids=str,
)
@pytest.mark.parametrize("curve", CURVES)
def test_rule_keeps_up_with_the_best_threshold(curve: str, mix: Mix) -> None:
    rows = sum(mix.values())
    assert compare(curve, mix, 1600 if rows <= 8 else 300, least=(2, 3, 4, 5, 8, 12, 16, 20)) >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("mix", [*SAME, *FIXED, *TWO, *OTHER], ids=str)
@pytest.mark.parametrize("curve", CURVES)
def test_rule_keeps_up_with_every_threshold(curve: str, mix: Mix) -> None:
    rows = sum(mix.values())
    assert compare(curve, mix, 2000 if rows <= 16 else 600, least=range(1, rows)) >= 0.97


def test_depths_that_come_in_groups_are_worth_looking_ahead() -> None:
    """At 1 or 16 loops, none exit in the next loop, and many in some: no threshold sees that."""
    for curve in ("outer-heavy", "flat", "jagged"):
        assert compare(curve, {"bimodal": 16}, 1000, range(1, 16)) > 1.005, curve


@pytest.mark.parametrize("curve", CURVES)
def test_equal_depths_fall_into_step(curve: str) -> None:
    """Requests of one fixed depth that came one loop after another soon exit together."""
    scheduler = Scheduler(Unchecked(8, 8, page_tokens=2**20), 8, CURVES[curve])
    together = []
    for tick in range(150):
        if tick < 8:
            scheduler.add(Sequence(tick, [0], SamplingParams(max_tokens=10_000), 8, "any", True, 1))
        done = scheduler.read_out()
        for seq in done:
            scheduler.after_read_out(seq)
            seq.token_ids.append(0)
        together.append(len(done))
        scheduler.schedule()
        scheduler.after_loop([(seq, 0) for seq in scheduler.looping if seq.loop == 7])
    # Where nothing is fixed in a step, there is nothing to share.
    assert Counter(together[-16:]) == ({8: 2, 0: 14} if curve != "linear" else {1: 16})


def exited_and_looping(costs: StepCosts, depths: dict[int, int], loops: int) -> Scheduler:
    """Rows by their fixed depth, all started together, after so many loops without reading out."""
    scheduler = Scheduler(Unchecked(64, 64, page_tokens=1024), 64, costs)
    for number, depth in enumerate(depth for depth, rows in depths.items() for _ in range(rows)):
        scheduler.add(Sequence(number, [0], SamplingParams(max_tokens=1024), depth, depth, True, 1))
    scheduler.schedule()
    for _ in range(loops):
        scheduler.after_loop([(seq, 0) for seq in scheduler.looping if seq.loop + 1 == seq.n_loops])
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
    assert len(exited_and_looping(costs, {30: 1, 31: 1}, 30).read_out()) == 1


def test_shallow_rows_are_not_slowed_by_deep_ones() -> None:
    """Half the rows at 1 loop, half at 16, always refilled: the shallow ones get a token in nearly every loop."""
    scheduler = exited_and_looping(CURVES["loop-heavy"], {1: 32, 16: 32}, 1)
    tokens = Counter({1: 0, 16: 0})
    for _ in range(160):
        for seq in scheduler.read_out():
            scheduler.after_read_out(seq)
            seq.token_ids.append(0)
            tokens[seq.n_loops] += 1
        scheduler.schedule()
        scheduler.after_loop([(seq, 0) for seq in scheduler.looping if seq.loop + 1 == seq.n_loops])
    assert tokens[1] >= 0.85 * 160 * 32
    assert tokens[16] >= 0.9 * 10 * 32


def test_known_exits_are_waited_for() -> None:
    """One row has exited, 63 will in the next loop: one more loop costs less than reading out twice."""
    costs = CURVES["outer-heavy"]
    assert not exited_and_looping(costs, {3: 1, 4: 63}, 3).read_out()
    assert len(exited_and_looping(costs, {3: 1, 4: 63}, 4).read_out()) == 64


def test_depths_are_learned() -> None:
    """Chunks took 5 loops or 16: the rule waits for those that have done 4, not for those that went on after 5."""
    policy = ReadoutPolicy(CURVES["outer-heavy"])
    seqs = [Sequence(i, [0], SamplingParams(), 16, "any", False, 1, n_running=1, n_looping=1) for i in range(8)]

    def pays(loops: int) -> bool:
        looping = [replace(seq, loop=loops) for seq in seqs[4:]]
        return policy.should_read_out(looping, [replace(seq, n_looping=0) for seq in seqs[:4]])

    assert pays(4) is pays(5)
    for loops in [5, 16] * 20:
        policy.record_exit(replace(seqs[0], loop=loops))
    assert not pays(4)
    assert pays(5)


def test_kinds_of_chunks() -> None:
    """Depths are kept apart by depth key and for prompts; new ones count more than old ones."""
    policy = ReadoutPolicy(CURVES["flat"])
    decode = Sequence(0, [0] * 9, SamplingParams(), 16, "any", False, 1, n_computed=8, n_running=1)
    prompt = replace(decode, n_computed=0, n_running=4)
    for _ in range(3000):
        policy.record_exit(replace(decode, loop=3))
        policy.record_exit(replace(prompt, loop=9))
        policy.record_exit(replace(decode, loop=15, depth_key="other"))
    assert policy._depths_of(decode).mean == pytest.approx(3, abs=0.1)
    assert policy._depths_of(prompt).mean == pytest.approx(9, abs=0.1)
    for _ in range(3000):
        policy.record_exit(replace(decode, loop=8))
    assert policy._depths_of(decode).mean == pytest.approx(8, abs=0.5)
    # Four tokens wait whose prompt goes on behind them; then five at its end, behind which one new token follows.
    assert policy._count([prompt]) == {(policy._depths_of(prompt), 0): 4}
    last = replace(decode, n_computed=4, n_running=5)
    assert policy._count([last]) == {(policy._depths_of(last), 0): 1}


def test_what_a_token_is_worth() -> None:
    """One row of depth 1 beside seven of depth 16, read out in every loop, or all together after the sixteenth."""
    seqs = [Sequence(i, [0], SamplingParams(), 16 if i else 1, 0, True, 1, n_running=1, n_looping=1) for i in range(8)]
    for curve, least in (("flat", 10 / (1 + 7 / 16)), ("loop-heavy", (4.2 + 1.2) / (1 + 7 / 16))):
        policy = ReadoutPolicy(CURVES[curve])
        assert policy._seconds_per_token(policy._count(seqs)) == pytest.approx(least)
    together = ReadoutPolicy(StepCosts(line(1, 0), line(1000, 1)))
    assert together._seconds_per_token(together._count(seqs)) == pytest.approx((16 + 1000) / 8)


def test_refill_replaces_the_rule() -> None:
    asked = []

    def refill(n: int, k: int) -> bool:
        asked.append((n, k))
        return False

    scheduler = exited_and_looping(CURVES["flat"], {1: 3, 2: 2}, 0)
    scheduler._refill = refill
    scheduler.after_loop([(seq, 0) for seq in scheduler.looping if seq.n_loops == 1])
    assert scheduler.read_out() == []
    scheduler.after_loop([(seq, 0) for seq in scheduler.looping])
    assert len(scheduler.read_out()) == 5, "with nothing in the loop there is nothing to wait for"
    assert asked == [(2, 3)]


def test_microseconds_per_row() -> None:
    """Prints what scheduling takes with 64 rows (`-s` shows it); nothing is asserted about time."""
    rng = random.Random(0)
    rows, ticks = 64, 300
    scheduler = Scheduler(Unchecked(rows, rows), 2048, CURVES["loop-heavy"])
    for i in range(rows):
        scheduler.add(Sequence(i, [i] * 17, SamplingParams(max_tokens=10_000 // rows), 16, "any", False, 2))
    seconds = 0.0
    left: list[tuple[Sequence, int]] = []
    for _ in range(ticks):
        start = perf_counter()
        scheduler.after_loop(left)
        done = scheduler.read_out()
        for seq in done:
            scheduler.after_read_out(seq)
        seconds += perf_counter() - start
        for seq in done:
            seq.token_ids.append(rng.randrange(100))
        start = perf_counter()
        scheduler.schedule()
        seconds += perf_counter() - start
        left = [(seq, 0) for seq in scheduler.looping if rng.random() < 1 / 8 or seq.loop == 15]
    print(f"\nscheduler: {seconds / ticks / rows * 1e6:.2f} us per row and tick")
