"""The scheduler under random events, every invariant checked after each; and its promises one by one."""

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from open_mythos.serve.costs import Curve, StepCosts
from open_mythos.serve.scheduler import GRID, Limits, QueueFull, Scheduler, Work
from open_mythos.serve.sequence import Block, Phase, Sequence

COSTS = StepCosts(loop=Curve({1: 3.15, 64: 12.6}), outer=Curve({1: 1.23, 64: 3.12}))
ADMITTED = (Phase.READY, Phase.LOOPING, Phase.EXITED, Phase.SWAPPED)
UNIT = (2, False), (4, False), (4, True), (7, False)


def sequence(number: int, prompt: list[int], max_tokens: int = 4, n_loops: int = 4, is_fixed: bool = False) -> Sequence:
    return Sequence(number, prompt, len(prompt), max_tokens, n_loops, (n_loops, is_fixed), is_fixed, n_loops + 2)


class Engine:
    """Runs a scheduler without a model: what a page holds is the tokens up to each position, so a mix-up shows."""

    def __init__(self, limits: Limits, seed: int, gather: bool = True) -> None:
        self.limits = limits
        self.random = random.Random(seed)
        self.scheduler = Scheduler(limits, COSTS, None if gather else lambda n, k: self.random.random() < 0.5)
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
        return [(seq.depth_key, tuple(seq.token_ids[: min(i + size, end)])) for i in range(0, end, size)]

    def write(self, seq: Sequence) -> None:
        """The chunk's keys and values, into blocks that nobody else may see."""
        first = seq.n_computed // self.limits.page_tokens
        for block, value in list(zip(seq.blocks, self.held(seq, seq.n_computed + seq.n_running), strict=True))[first:]:
            assert block.holders == 1 and block.key is None, "a shared block is written"
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
            assert "n_pages" in str(error)
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
            self.scheduler.cancel(seq)
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
            scheduler.computed(seq)
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
        scheduler.looped(left)
        yield

    def run(self, work: Work) -> None:
        out, back = [seq for seq, _ in work.swap_out], [seq for seq, _ in work.swap_in]
        assert not set(out) & set(back)
        self.counts["out"] += len(out)
        for seq, blocks in work.swap_out:
            self.outside[seq] = [self.memory[pages[0]] for pages in blocks]
            assert self.outside[seq] == self.held(seq, seq.n_computed)
        for seq, blocks in work.swap_in:
            assert all(block.holders == 1 and block.key is None for block in seq.blocks)
            values = self.outside.pop(seq)
            assert len(values) == len(blocks)
            for pages, value in zip(blocks, values, strict=True):
                self.memory |= dict.fromkeys(pages, value)
        for seq, n in work.start:
            assert seq.phase is Phase.LOOPING and seq.n_running == n and seq.loop == 0
            end = seq.n_computed + n
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
                assert came < passed or (came == passed and seq.id < other.id), "a later request passed one too long"

    def check(self) -> None:
        """Every invariant."""
        scheduler, limits = self.scheduler, self.limits
        phases = Counter(seq.phase for seq in self.alive)
        assert scheduler.n_waiting == phases[Phase.WAITING] <= limits.max_queue
        assert scheduler.n_admitted == sum(phases[phase] for phase in ADMITTED) <= limits.max_rows
        assert set(scheduler.looping) == {seq for seq in self.alive if seq.phase is Phase.LOOPING}
        assert sum(seq.n_running for seq in scheduler.looping if seq.in_prompt) <= limits.max_prefill_tokens
        holders = Counter(block for seq in self.alive for block in seq.blocks)
        assert all(block.holders == n and (n == 1 or block.key) for block, n in holders.items())
        pages = scheduler._pages
        assert all(not block.holders and pages._known[block.key] is block for block in pages._reusable)
        blocks: list[Block] = [*holders, *pages._reusable]
        assert len(set(blocks)) == len(blocks)
        assert {block for block in blocks if block.key} == set(pages._known.values())
        everywhere = [*pages._free, *(page for block in blocks for page in block.pages)]
        assert sorted(everywhere) == list(range(limits.n_pages)), "a page is lost or there twice"
        assert scheduler.n_pages_used == sum(len(block.pages) for block in holders)
        assert scheduler.n_pages_free + scheduler.n_pages_used + scheduler.n_pages_reusable == limits.n_pages
        for seq in self.alive:
            blocks = -(-(seq.n_computed + seq.n_running) // limits.page_tokens)
            assert len(seq.blocks) == (blocks if seq.phase not in (Phase.WAITING, Phase.SWAPPED) else 0)
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
        assert self.scheduler.n_pages_used == 0


LIMITS = [
    Limits(max_rows=8, max_queue=6, n_pages=2000, page_tokens=4, max_prefill_tokens=128),
    Limits(max_rows=8, max_queue=6, n_pages=120, page_tokens=4, max_prefill_tokens=64),
    Limits(max_rows=64, max_queue=100, n_pages=900, page_tokens=4, max_prefill_tokens=256),
    Limits(max_rows=1, max_queue=1, n_pages=60, page_tokens=16, max_prefill_tokens=64),
    Limits(max_rows=5, max_queue=3, n_pages=200, page_tokens=7, max_prefill_tokens=100, prefix_reuse=False),
    Limits(max_rows=300, max_queue=300, n_pages=100_000, page_tokens=1, max_prefill_tokens=4096),
]


def random_events(events: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    done = 0
    for trial in range(10**9):
        if done >= events:
            return counts
        engine = Engine(LIMITS[trial % len(LIMITS)], seed=trial, gather=trial % 4 > 0)
        rng = engine.random
        crowd = rng.choice([0.05, 0.3, 0.6])
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
    for what in (
        "full",
        "cached",
        "refused",
        "out",
        *(f"cancel {phase}" for phase in ("waiting", "looping", "exited")),
    ):
        assert counts[what], f"never happened: {what}"


@pytest.mark.slow
def test_many_random_events() -> None:
    random_events(100_000)


def test_imports_no_torch() -> None:
    code = "import sys, open_mythos.serve.scheduler; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
