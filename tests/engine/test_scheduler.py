"""The scheduler under random events, every invariant checked after each; and its promises one by one."""

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from open_mythos.engine.readout_policy import Curve, StepCosts
from open_mythos.engine.scheduler import QueueFull, Refill, ScheduleOutput, Scheduler
from open_mythos.engine.sequence import GRID, Block, Phase, Sequence
from open_mythos.generation.sampling_params import SamplingParams
from tests.engine.unchecked import Unchecked

COSTS = StepCosts(loop=Curve({1: 3.15, 64: 12.6}), outer=Curve({1: 1.23, 64: 3.12}))
PHASES = [phase for phase in Phase if phase is not Phase.FINISHED]
ADMITTED = (Phase.READY, Phase.LOOPING, Phase.EXITED, Phase.SWAPPED)
UNIT = (2, False), (4, False), (4, True), (7, False)


Starts = list[tuple[Sequence, int]]


def sequence(number: int, prompt: list[int], max_tokens: int = 4, n_loops: int = 4, is_fixed: bool = False) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(number, prompt, params, n_loops, (n_loops, is_fixed), is_fixed, n_loops + 2)


class Engine:
    """Runs a scheduler without a model: what a page holds is the tokens up to each position, so a mix-up shows."""

    def __init__(self, limits: Unchecked, n_pages: int, seed: int, gather: bool = True) -> None:
        self.limits, self.n_pages = limits, n_pages
        self.random = random.Random(seed)
        self.scheduler = Scheduler(limits, n_pages, COSTS, None if gather else lambda n, k: self.random.random() < 0.5)
        self.alive: list[Sequence] = []
        self.n_added = 0
        self.memory: dict[int, list[object]] = {}
        self.outside: dict[Sequence, list[object]] = {}
        self.counts: Counter[str] = Counter()
        self.executed = 0
        self.arrival: dict[Sequence, int] = {}

    # What a token's keys and values depend on: the depth and all tokens up to it.
    def held(self, seq: Sequence, end: int) -> list[object]:
        size = self.limits.page_tokens
        return [(seq.depth_key, tuple(seq.ids(0, min(i + size, end)))) for i in range(0, end, size)]

    def write(self, seq: Sequence) -> None:
        """The chunk's keys and values, into blocks that nobody else may see."""
        first = seq.n_computed // self.limits.page_tokens
        for block, value in list(zip(seq.blocks, self.held(seq, seq.n_computed + seq.n_running), strict=True))[first:]:
            assert block.ref_count == 1 and block.key is None, "a shared block is written"
            for page in block.pages:
                self.memory[page] = value

    def read(self, seq: Sequence, end: int) -> list[object]:
        values = []
        for block in seq.blocks[: -(-end // self.limits.page_tokens)]:
            assert len({self.memory[page] for page in block.pages}) == 1
            values.append(self.memory[block.pages[0]])
        return values

    def add(self, seq: Sequence) -> None:
        full = self.scheduler.n_waiting == self.limits.max_queue
        try:
            self.scheduler.add(seq)
        except QueueFull:
            assert full
            self.counts["full"] += 1
            return
        except ValueError as error:
            assert "there is room for" in str(error)
            self.counts["refused"] += 1
            return
        assert not full
        self.alive.append(seq)
        self.arrival[seq] = self.executed

    def add_random(self) -> None:
        rng = self.random
        n_loops, is_fixed = rng.choice(UNIT)
        long = rng.random() < 0.1
        # Few tokens and beginnings that repeat: equal prefixes are common.
        prompt = [rng.randrange(2)] * rng.choice([0, 4, 9, 70]) + [
            rng.randrange(2) for _ in range(rng.randrange(1, 200 if long else 20))
        ]
        self.n_added += 1
        self.add(sequence(self.n_added, prompt, rng.choice([1, 3, 30]), n_loops, is_fixed))

    def cancel(self, seq: Sequence) -> None:
        self.counts[f"cancel {seq.phase.value}"] += 1
        for _ in range(self.random.choice([1, 2])):
            self.scheduler.finish(seq)
        self.leave(seq)

    def leave(self, seq: Sequence) -> None:
        self.alive.remove(seq)
        self.outside.pop(seq, None)
        assert seq.phase is Phase.FINISHED and not seq.blocks

    def step(self) -> Iterator[None]:
        """One step of the engine, with a stop after each call of the scheduler."""
        scheduler, rng = self.scheduler, self.random
        exited = {seq for seq in self.alive if seq.phase is Phase.EXITED}
        done = scheduler.read_out()
        assert set(done) in (set(), exited) and (done or not exited or scheduler.looping)
        yield
        for seq in done:
            if seq.phase is Phase.FINISHED:  # cancelled in the meantime
                continue
            end = seq.n_computed + seq.n_running
            assert self.read(seq, end) == self.held(seq, end)
            scheduler.after_read_out(seq)
            if end == seq.n_tokens:
                seq.token_ids.append(rng.randrange(2))
                if seq.n_tokens == seq.n_prompt + seq.max_tokens or rng.random() < 0.02:
                    scheduler.finish(seq)
                    self.leave(seq)
            yield
        self.run(scheduler.schedule())
        yield
        left = []
        looping = scheduler.looping
        self.executed += sum(seq.n_looping for seq in looping)
        for seq in looping:
            n = 0 if seq.loop + 1 == seq.n_loops else seq.n_looping
            if n and not seq.is_fixed and rng.random() < 0.3:
                n = rng.randrange(n + 1)
            if n < seq.n_looping:
                left.append((seq, n))
        scheduler.after_loop(left)
        yield

    def run(self, work: ScheduleOutput) -> None:
        out, back = [seq for seq, _ in work.swap_out], [seq for seq, _ in work.swap_in]
        assert not set(out) & set(back)
        self.counts["swap out"] += len(out)
        self.counts["swap in"] += len(back)
        for seq, blocks in work.swap_out:
            self.outside[seq] = [self.memory[pages[0]] for pages in blocks]
            assert self.outside[seq] == self.held(seq, seq.n_computed)
        for seq, blocks in work.swap_in:
            assert all(block.ref_count == 1 and block.key is None for block in seq.blocks)
            values = self.outside.pop(seq)
            assert len(values) == len(blocks)
            for pages, value in zip(blocks, values, strict=True):
                self.memory |= dict.fromkeys(pages, value)
        for seq in work.start:
            assert seq.phase is Phase.LOOPING and seq.n_running == seq.n_looping > 0 and seq.loop == 0
            end = seq.n_computed + seq.n_running
            assert end <= seq.n_tokens and (end == seq.n_tokens or end % GRID == 0)
            assert self.read(seq, seq.n_computed) == self.held(seq, seq.n_computed)
            if seq in self.arrival:
                self.admitted(seq)
            self.write(seq)

    def admitted(self, seq: Sequence) -> None:
        self.counts["cached"] += seq.n_cached > 0
        assert seq.n_cached < seq.n_prompt
        came = self.arrival.pop(seq)
        for other in self.alive:
            if other.phase is Phase.WAITING:
                passed = self.arrival[other] + self.limits.max_rows * other.cost
                assert came < passed, "a later request passed one too long"

    def check(self) -> None:
        """Every invariant."""
        scheduler, limits = self.scheduler, self.limits
        phases = Counter(seq.phase for seq in self.alive)
        assert scheduler.n_waiting == phases[Phase.WAITING] <= limits.max_queue
        assert scheduler.n_admitted == sum(phases[phase] for phase in ADMITTED) <= limits.max_rows
        assert set(scheduler.looping) == {seq for seq in self.alive if seq.phase is Phase.LOOPING}
        assert sum(seq.n_running for seq in scheduler.looping if seq.in_prompt) <= limits.max_prefill_tokens
        assert scheduler._n_looping == sum(seq.n_looping for seq in self.alive)
        assert scheduler._executed == self.executed
        holders = Counter(block for seq in self.alive for block in seq.blocks)
        assert all(block.ref_count == n and (n == 1 or block.key) for block, n in holders.items())
        pages = scheduler.block_manager
        assert all(not block.ref_count and pages._cached[block.key] is block for block in pages._unused.values())
        blocks: list[Block] = [*holders, *pages._unused.values()]
        assert len(set(blocks)) == len(blocks)
        assert {block for block in blocks if block.key} == set(pages._cached.values())
        everywhere = [*pages._free, *(page for block in blocks for page in block.pages)]
        assert sorted(everywhere) == list(range(self.n_pages)), "a page is lost or there twice"
        assert pages.n_used == sum(len(block.pages) for block in holders)
        assert pages.n_free + pages.n_used + pages.n_reusable == self.n_pages
        for seq in self.alive:
            blocks = -(-(seq.n_computed + seq.n_running) // limits.page_tokens)
            assert len(seq.blocks) == (blocks if seq.phase not in (Phase.WAITING, Phase.SWAPPED) else 0)
            assert seq.phase is not Phase.WAITING or seq.n_computed == seq.n_cached == 0
            assert (seq.n_running > 0) == (seq.phase in (Phase.LOOPING, Phase.EXITED))
            assert (seq.n_looping > 0) == (seq.phase is Phase.LOOPING)

    def drain(self) -> None:
        """Everything that is there ends, the oldest admitted one within what it needs alone and what is in the loop."""
        patience = 0
        oldest, progress = None, 0
        while self.alive:
            admitted = [seq for seq in self.alive if seq.phase is not Phase.WAITING]
            first = min(admitted, key=lambda seq: seq.id, default=None)
            now = first and (first, first.n_computed, first.n_running, first.loop)
            patience = 0 if now != oldest else patience + 1
            oldest = now
            assert patience <= 3 * max(n for n, _ in UNIT), "the oldest stands still"
            for _ in self.step():
                pass
            progress += 1
        assert self.scheduler.block_manager.n_used == 0


LIMITS = [
    (Unchecked(max_rows=8, max_queue=6, page_tokens=4, max_prefill_tokens=128), 2000),
    (Unchecked(max_rows=12, max_queue=6, page_tokens=1, max_prefill_tokens=64), 400),
    (Unchecked(max_rows=64, max_queue=100, page_tokens=4, max_prefill_tokens=256), 900),
    (Unchecked(max_rows=1, max_queue=1, page_tokens=16, max_prefill_tokens=64), 60),
    (Unchecked(max_rows=5, max_queue=3, page_tokens=7, max_prefill_tokens=100, prefix_reuse=False), 200),
    (Unchecked(max_rows=100, max_queue=100, page_tokens=1, max_prefill_tokens=1024), 4000),
]
"""Limits, and the number of pages."""


def random_events(events: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    done = 0
    for trial in range(10**9):
        if done >= events:
            return counts
        engine = Engine(*LIMITS[trial % len(LIMITS)], seed=trial, gather=trial % 4 > 0)
        rng = engine.random
        crowd = rng.choice([0.03, 0.1, 0.4])
        stops = iter(())
        for _ in range(min(1000, events - done)):
            done += 1
            luck = rng.random()
            if luck < crowd:
                engine.add_random()
            elif luck < crowd + 0.02 and engine.alive:
                engine.cancel(rng.choice(engine.alive))
            elif next(stops, StopIteration) is StopIteration:
                stops = engine.step()
            engine.check()
        for _ in stops:
            engine.check()
        engine.drain()
        engine.check()
        counts += engine.counts
    return counts


def test_random_events() -> None:
    counts = random_events(10_000)
    expected = {"full", "refused", "cached", "swap out", "swap in", *(f"cancel {phase.value}" for phase in PHASES)}
    assert expected - {*counts} <= {"cancel swapped"}


@pytest.mark.slow
def test_many_random_events() -> None:
    assert random_events(100_000)["cancel swapped"]


@pytest.mark.parametrize("seed", range(5))
def test_memory_pressure(seed: int) -> None:
    """Many long answers in too few pages: rows are swapped all the time, and every answer ends."""
    engine = Engine(*LIMITS[1], seed)
    for _ in range(150):
        engine.add(sequence(engine.n_added, [engine.random.randrange(9) for _ in range(10)], 30, 4))
        engine.n_added += 1
        for _ in engine.step():
            engine.check()
    engine.drain()
    engine.check()
    assert engine.counts["swap out"] == engine.counts["swap in"] > 10


def steps(scheduler: Scheduler, n: int) -> list[tuple[ScheduleOutput, Starts]]:
    """Steps of sequences that run all their loops and never end: their work, and the tokens of each start."""
    works = []
    for _ in range(n):
        for seq in scheduler.read_out():
            scheduler.after_read_out(seq)
            if seq.n_computed == seq.n_tokens:
                seq.token_ids.append(0)
        work = scheduler.schedule()
        works.append((work, [(seq, seq.n_running) for seq in work.start]))
        scheduler.after_loop([(seq, 0) for seq in scheduler.looping if seq.loop + 1 == seq.n_loops])
    return works


def scheduler_of(max_rows: int, max_queue: int, n_pages: int, refill: Refill | None = None, **limits: Any) -> Scheduler:
    return Scheduler(Unchecked(max_rows=max_rows, max_queue=max_queue, **limits), n_pages, COSTS, refill)


def test_a_short_request_overtakes_long_ones() -> None:
    """Ten deep long requests wait; a shallow short one comes after them and is the next to be admitted."""
    scheduler = scheduler_of(1, 20, n_pages=1000)
    long = [sequence(i, [1], 50, 7) for i in range(11)]
    for seq in long:
        scheduler.add(seq)
    steps(scheduler, 1)
    short = sequence(99, [1], 2, 2)
    scheduler.add(short)
    scheduler.finish(long[0])
    assert steps(scheduler, 1)[0][1] == [(short, 1)]


def test_nothing_waits_forever() -> None:
    """Short requests keep coming and one is always there; the long one is admitted within its bound all the same."""
    limits = Unchecked(max_rows=2, max_queue=8)
    scheduler = Scheduler(limits, 1000, COSTS)
    number = 0
    long = sequence(10**6, [1] * 20, 20, 7)
    bound = limits.max_rows * long.cost
    executed = passed = 0
    while long.phase is Phase.WAITING:
        while scheduler.n_waiting < limits.max_queue:
            number += 1
            if number == 9:
                scheduler.add(long)
                executed = 0
            else:
                scheduler.add(sequence(number, [1], 1, 2))
        for seq in scheduler.read_out():
            scheduler.after_read_out(seq)
            scheduler.finish(seq)
        passed += len(scheduler.schedule().start)
        executed += len(scheduler.looping)
        scheduler.after_loop([(seq, 0) for seq in scheduler.looping if seq.loop + 1 == seq.n_loops])
        assert executed <= bound + limits.max_queue * 2 * limits.max_rows
    assert executed > bound // 2 and passed > 100, "it has to wait its turn"


def test_the_youngest_makes_way() -> None:
    """Each holds a block of 6 pages and needs a second one at the same time; there are 18 pages."""
    scheduler = scheduler_of(4, 4, n_pages=18, page_tokens=4, prefix_reuse=False)
    a, b, c, d = (sequence(i, [i] * 4, 5, 4, is_fixed=True) for i in range(4))
    for seq in (a, b, c):
        scheduler.add(seq)
    steps(scheduler, 4)
    held = [block.pages for block in c.blocks]
    scheduler.add(d)
    ((work, started),) = steps(scheduler, 1)
    assert work.swap_out == [(c, held)] and started == [(a, 1)]
    assert {*a.blocks[1].pages} == {*held[0]}
    assert (b.phase, c.phase, d.phase) == (Phase.READY, Phase.SWAPPED, Phase.WAITING)
    scheduler.finish(a)
    assert steps(scheduler, 1) == [(ScheduleOutput(start=[b]), [(b, 1)])], (
        "6 pages are free, and c needs 12; d is not before c"
    )
    scheduler.finish(b)
    ((work, started),) = steps(scheduler, 1)
    assert [seq for seq, _ in work.swap_in] == [c] and started == [(c, 1), (d, 4)]
    assert work.swap_in[0][1] == [c.blocks[0].pages] and len(c.blocks) == 2


def test_the_older_one_is_served_before_the_smaller_one() -> None:
    """c needs 18 pages back and 6 are free: the younger e, for which they would do, does not get them."""
    scheduler = scheduler_of(4, 4, n_pages=30, page_tokens=4, prefix_reuse=False)
    a, b, c, e = (sequence(i, [i] * (8 if i == 2 else 4), 5, 4, is_fixed=True) for i in range(4))
    e.prompt_ids = [3]
    for seq in (a, b, c, e):
        scheduler.add(seq)
    steps(scheduler, 4)
    ((work, started),) = steps(scheduler, 1)
    assert [seq for seq, _ in work.swap_out] == [e, c] and started == [(a, 1), (b, 1)]
    works = steps(scheduler, 6)
    assert scheduler.block_manager.n_free == 6 and not any(work.swap_in for work, _ in works)


def test_nothing_is_admitted_while_one_lacks_pages() -> None:
    """a needs 6 pages and 4 are free; b, whose pages it gets in the end, is in the loop. d would need just 4."""
    scheduler = scheduler_of(4, 4, n_pages=19, page_tokens=4, refill=lambda n, k: True)
    a, b, d = sequence(0, [1] * 4, 2, 4), sequence(1, [2] * 4, 2, 7), sequence(2, [3], 1, 2)
    scheduler.add(a)
    scheduler.add(b)
    steps(scheduler, 4)
    scheduler.add(d)
    steps(scheduler, 3)
    assert (a.phase, b.phase, d.phase) == (Phase.READY, Phase.EXITED, Phase.WAITING)
    ((work, started),) = steps(scheduler, 1)
    assert [seq for seq, _ in work.swap_out] == [b] and started == [(a, 1)] and d.phase is Phase.WAITING


def test_prompts_are_cut_on_the_grid() -> None:
    """Room for 100 tokens: 300 come in as four times 64 and the rest; others wait for room, and none passes."""
    scheduler = scheduler_of(4, 4, n_pages=10_000, max_prefill_tokens=100)
    a, b, c = sequence(0, [1] * 300, 1), sequence(1, [2] * 90, 20), sequence(2, [3] * 2, 200)
    scheduler.add(a)
    works = steps(scheduler, 1)
    scheduler.add(b)
    scheduler.add(c)
    starts = [started for _, started in works + steps(scheduler, 30) if started]
    assert starts[:6] == [[(a, 64)], [(a, 64)], [(a, 64)], [(a, 64)], [(a, 44)], [(a, 1), (b, 90), (c, 2)]]


def test_a_prompt_found_whole_computes_its_last_token() -> None:
    scheduler = scheduler_of(4, 4, n_pages=1000, page_tokens=4)
    first, again, longer = (sequence(i, [1, 2, 3, 4, 5, 6, 7, 8], 20) for i in range(3))
    longer.prompt_ids = [*longer.prompt_ids, 9, 9]
    scheduler.add(first)
    steps(scheduler, 5)
    scheduler.add(again)
    scheduler.add(longer)
    ((_, started),) = steps(scheduler, 1)
    assert (again.n_cached, longer.n_cached) == (4, 8)
    assert {(again, 4), (longer, 2)} <= set(started)
    assert again.blocks[0] is longer.blocks[0] is first.blocks[0]


def test_refuses_what_cannot_be() -> None:
    scheduler = scheduler_of(1, 1, n_pages=18, page_tokens=4)
    scheduler.add(sequence(0, [1] * 8, 5))  # 12 tokens are computed: 3 blocks of 6 pages
    with pytest.raises(ValueError, match="max_tokens=6 behind a prompt of 8 tokens needs room for 13"):
        scheduler.add(sequence(1, [1] * 8, 6))
    with pytest.raises(QueueFull, match="max_queue=1"):
        scheduler.add(sequence(2, [1], 1))
    assert scheduler.n_waiting == 1


def test_imports_no_torch() -> None:
    code = "import sys, open_mythos.engine.scheduler; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
