"""Engines with clients that come and go: the timed tasks of the engine's fairness and of arrivals at random."""

import random
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.sides.engine import LAWS, N_PROMPTS, NEW_TOKENS, Answer, EngineTask, mean_depth
from benchmarks.tasks import Task
from open_mythos import SamplingParams


@dataclass
class Pending:
    """A request of a crowd that is not complete."""

    depth: int
    arrived: float
    """Tick of its arrival."""
    whole: bool
    """False for the first ones, which are shortened so that later ones end evenly."""
    last: float | None = None
    """CPU seconds at which its last token came."""


class Crowd(EngineTask):
    """An engine and its clients, each of which asks again as soon as its answer is complete.

    A tick is as many loop-tokens as the engine has rows. `arguments` has the clients' depths and `new_tokens`.
    """

    def setup(self) -> None:
        super().setup()
        job, self.busy, depths = self.job, self.engine(), self.job.arguments["depths"]
        self.pending: dict[int, Pending] = {}
        self.clock = self.ticks = 0.0
        self.n_added = 0
        # Prompts are computed beforehand; requests find them in reused pages.
        for depth in set(depths):
            for prompt in self.prompts:
                self.busy.add(prompt, SamplingParams(max_tokens=1, n_loops=depth, exit="fixed", seed=0))
        while self.busy.busy:
            self.busy.step()
        for i, depth in enumerate(depths):
            self._ask(depth, 1 + i % job.new_tokens)

    def time(self) -> dict[str, float]:
        """Serve for so many CPU seconds. The reading is by depth: CPU seconds between tokens of a request (gaps), and
        ticks from the arrival of a request to its first token (waits) and to its end (turnarounds)."""
        self.measured = {depth: {"gaps": [], "waits": [], "turnarounds": []} for depth in self.job.arguments["depths"]}
        begun, end = time.perf_counter(), self.clock + self.seconds
        while self.clock < end:
            started = time.process_time()
            events = self.busy.step()
            self.clock += time.process_time() - started
            self.ticks += sum(event.loops for event in events) / self.job.rows
            for event in events:
                self._note(event)
        return {"cpu": self.seconds, "wall": time.perf_counter() - begun}

    def _note(self, event: Any) -> None:
        request = self.pending[event.request.id]
        seen: dict[str, list[float]] = self.measured[request.depth]
        if request.last is None:
            seen["waits"].append(self.ticks - request.arrived)
        else:
            seen["gaps"].append(self.clock - request.last)
        request.last = self.clock
        if event.finish_reason:
            seen["turnarounds"] += [self.ticks - request.arrived] * request.whole
            del self.pending[event.request.id]
            self._ask(request.depth, self.job.new_tokens)

    def _ask(self, depth: int, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, seed=self.n_added, n_loops=depth, exit="fixed", ignore_eos=True)
        request = self.busy.add(self.prompts[self.n_added % N_PROMPTS], params)
        self.pending[request.id] = Pending(depth, self.ticks, max_tokens == self.job.new_tokens)
        self.n_added += 1

    def waiting(self) -> list[tuple[int, float]]:
        """Return depth and ticks of the requests that have waited so long without a token."""
        return [(r.depth, self.ticks - r.arrived) for r in self.pending.values() if r.last is None]


class Arrivals(EngineTask):
    """An engine whose requests arrive at random (Poisson), `share` of what its rows could answer if none ever waited.

    Seconds are the CPU's; while there is no request, the clock jumps to the next arrival.
    """

    def setup(self) -> None:
        super().setup()
        self.busy = self.engine()
        # Prompts are computed beforehand; requests find them in reused pages.
        list(self.answer(self.busy, 1, range(N_PROMPTS)))
        given, rows = self.job.arguments, self.job.rows
        token_s = mean_depth(LAWS[given["law"]]) * self.costs.loop(rows) + self.costs.outer(rows)
        self.rate = given["share"] * rows / token_s / ((1 + NEW_TOKENS) / 2)

    def time(self) -> dict[str, float]:
        """Answer `requests` requests of 1 to NEW_TOKENS tokens. The reading has tokens a second of the clock, and the
        seconds a token of each request from its arrival to its end: its normalised latency."""
        given, engine, rng = self.job.arguments, self.busy, random.Random(self.seed)
        begun, clock, at, n_tokens = time.perf_counter(), 0.0, 0.0, 0
        todo: list[tuple[float, int]] = []
        for number in range(self.seed, self.seed + given["requests"]):
            at += rng.expovariate(self.rate)
            todo.append((at, number))
        arrived: dict[int, tuple[float, int]] = {}
        ended: dict[int, Answer] = {}
        latencies: list[float] = []
        while todo or engine.busy:
            clock = clock if engine.busy else max(clock, todo[0][0])
            while todo and todo[0][0] <= clock:
                at, number = todo.pop(0)
                params = self.params(rng.randint(1, NEW_TOKENS), number)
                arrived[engine.add(self.prompts[number % N_PROMPTS], params).id] = at, number
            started = time.process_time()
            events = engine.step()
            clock += time.process_time() - started
            n_tokens += len(events)
            for request in (event.request for event in events if event.finish_reason):
                at, number = arrived[request.id]
                latencies.append((clock - at) / len(request.token_ids))
                ended[number] = request.token_ids, request.loops
        # Every window has other requests.
        self.seed += given["requests"]
        self.measured = {"latencies": latencies, "rate": n_tokens / clock, "answers": ended}
        return {"cpu": clock, "wall": time.perf_counter() - begun}


TASKS: dict[str, type[Task]] = {"crowd": Crowd, "arrivals": Arrivals}
