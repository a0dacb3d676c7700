"""What shallow requests feel of deep ones beside them.

Two loads of equally many clients are compared, each of which asks again as soon as its answer is complete. Both run as
many loop-tokens in each loop as there are rows, but for the loop in which a client asks again and nobody waits: in the
mixed load half of the clients ask for one loop and half for 16, in the other all ask for one, which is each deep answer
replaced by 16 shallow ones.

Turnaround and wait are counted in ticks, a tick being as many loop-tokens as there are rows. The ideal is perfect
sharing: every client, waiting or not, gets an equal part of the loop-tokens, at most one a tick.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.engine.laws import DEEPEST
from benchmarks.engine.load import pool
from benchmarks.engine.run import Run
from benchmarks.engine.subjects import SUBJECTS, model_of
from benchmarks.stats import Spread, ratios
from open_mythos.engine.engine import Engine, TokenEvent
from open_mythos.generation.sampling_params import SamplingParams

ROWS = 32
NEW_TOKENS = 16
SHALLOW, DEEP = 1, DEEPEST
SECONDS = {"mixed": 8, "shallow": 2, "again": 2}
"""Of a slice, for each second of a window elsewhere: deep answers take seconds."""


@dataclass
class Kind:
    """What the requests of one depth saw."""

    gaps: list[float] = field(default_factory=list)
    """CPU seconds between two tokens of a request."""
    waits: list[float] = field(default_factory=list)
    """Ticks from the arrival to the first token."""
    turnarounds: list[float] = field(default_factory=list)
    """Ticks from the arrival to the end."""


@dataclass
class Pending:
    """A request that is not complete."""

    depth: int
    arrived: float
    """Tick."""
    whole: bool
    """Not shortened, as the first ones are so that later ones end evenly."""
    last: float | None = None
    """When its last token came, in CPU seconds."""


class Crowd:
    """An engine and its clients."""

    def __init__(self, engine: Engine, prompts: list[list[int]], depths: list[int]) -> None:
        self.engine, self.prompts = engine, prompts
        self.share = min(1.0, ROWS / len(depths))
        """Loop-tokens of a client in a tick of perfect sharing."""
        self.pending: dict[int, Pending] = {}
        self.clock = self.ticks = 0.0
        self.n_added = 0
        # Prompts are computed beforehand; requests find them in reused pages.
        for depth in set(depths):
            for prompt in prompts:
                engine.add(prompt, SamplingParams(max_tokens=1, n_loops=depth, exit="fixed", seed=0))
        while engine.busy:
            engine.step()
        for i, depth in enumerate(depths):
            self._ask(depth, 1 + i % NEW_TOKENS)

    def serve(self, seconds: float) -> dict[int, Kind]:
        """Go on for so many CPU seconds -> what complete requests and tokens of each depth saw meanwhile."""
        seen = {SHALLOW: Kind(), DEEP: Kind()}
        end = self.clock + seconds
        while self.clock < end:
            started = time.process_time()
            events = self.engine.step()
            self.clock += time.process_time() - started
            self.ticks += sum(event.loops for event in events) / ROWS
            for event in events:
                self._note(event, seen)
        return seen

    def _note(self, event: TokenEvent, seen: dict[int, Kind]) -> None:
        request = self.pending[event.request.id]
        kind = seen[request.depth]
        if request.last is None:
            kind.waits.append(self.ticks - request.arrived)
        else:
            kind.gaps.append(self.clock - request.last)
        request.last = self.clock
        if event.finish_reason:
            if request.whole:
                kind.turnarounds.append(self.ticks - request.arrived)
            del self.pending[event.request.id]
            self._ask(request.depth, NEW_TOKENS)

    def _ask(self, depth: int, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, seed=self.n_added, n_loops=depth, exit="fixed", ignore_eos=True)
        request = self.engine.add(self.prompts[self.n_added % len(self.prompts)], params)
        self.pending[request.id] = Pending(depth, self.ticks, max_tokens == NEW_TOKENS)
        self.n_added += 1

    def ideal(self, depth: int) -> float:
        """Ticks that a request takes under perfect sharing."""
        return NEW_TOKENS * depth / self.share


@dataclass(frozen=True)
class Fairness:
    """Half of the clients shallow and half deep, against all shallow."""

    clients: int

    @property
    def name(self) -> str:
        return f"fairness, {self.clients} clients"

    def run(self, run: Run) -> dict[str, Any]:
        subject = SUBJECTS["heavy"]
        model, costs = model_of(subject, run.trained), run.costs(subject, ROWS)
        half = self.clients // 2
        depths = {"mixed": [SHALLOW, DEEP] * half, "shallow": [SHALLOW] * 2 * half, "again": [SHALLOW] * 2 * half}
        crowds = {
            name: Crowd(Engine(model, config=pool(model, ROWS), costs=costs), subject.prompts(), each)
            for name, each in depths.items()
        }
        p95: dict[str, list[float]] = {name: [] for name in crowds}
        total = {SHALLOW: Kind(), DEEP: Kind()}
        for i in range(run.rounds + 1):
            for name, crowd in crowds.items():
                run.tell("timing" if i else "warm-up", i, run.rounds + 1)
                seen = crowd.serve(run.seconds * SECONDS[name])
                if i:
                    p95[name].append(float(np.percentile(seen[SHALLOW].gaps, 95)))
                for depth, kind in seen.items() if i and name == "mixed" else ():
                    for what, values in vars(kind).items():
                        getattr(total[depth], what).extend(values)
        mixed = crowds["mixed"]
        for request in mixed.pending.values():
            # Who still waits has waited so long already.
            if request.last is None:
                total[request.depth].waits.append(mixed.ticks - request.arrived)
        return {
            "clients": self.clients,
            "p95": {name: Spread.of(values) for name, values in p95.items()},
            "over_shallow": ratios(p95["mixed"], p95["shallow"]),
            "noise": ratios(p95["again"], p95["shallow"]),
            "kinds": {
                "shallow" if depth == SHALLOW else "deep": {
                    "answers": len(kind.turnarounds),
                    "tokens": len(kind.gaps) + len(kind.waits),
                    "ideal_ticks": mixed.ideal(depth),
                    "turnaround": _over(kind.turnarounds, mixed.ideal(depth)),
                    "wait": _over(kind.waits, mixed.ideal(depth)),
                }
                for depth, kind in total.items()
            },
        }


def _over(ticks: list[float], ideal: float) -> Spread | None:
    return Spread.of([each / ideal for each in ticks]) if ticks else None
