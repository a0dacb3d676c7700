"""What cases use: workers, the gate, interleaved timing, and peak memory."""

import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.client import Client
from benchmarks.gate import Different
from benchmarks.job import Job
from benchmarks.stats import Spread, ratios

GATE_SEEDS = 3
"""Inputs tried before the sides are called different: two logits of a router that are closer than rounding send a token
to another expert, on one draw of the inputs and not on the next. A difference of the mathematics shows on all."""
SCRATCH = Path(__file__).resolve().parent
WARM_UP = 3


@dataclass(frozen=True)
class Settings:
    """How cases are run; part of what decides whether an earlier result still stands."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False
    against: str = ""
    """Folder of another checkout of this package, which is then the peer."""

    @property
    def clock(self) -> str:
        """The clock of ratios: device events on CUDA, CPU time of one thread, which other jobs disturb least, and wall
        time of several threads, whose CPU time counts waiting."""
        return "device" if self.device == "cuda" else "cpu" if self.threads == 1 else "wall"


Players = Mapping[str, tuple[Client, str]]
"""The jobs that take turns, by any name: a worker, and the job's id there."""


@dataclass(frozen=True)
class Budget:
    """How often a case is repeated: for so many seconds, but at least and at most so often."""

    seconds: float = 25.0
    least: int = 5
    most: int = 15


FULL, QUICK = Budget(), Budget(4.0, 2, 4)


@dataclass
class Samples:
    """Measurements of every player, one for each round."""

    clock: str
    """The clock of `ratio` and `median`."""
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By player and clock."""
    readings: dict[str, list[Any]] = field(default_factory=dict)
    """By player: what the task measured itself."""

    def times(self, player: str) -> list[float]:
        """Return the seconds of every round."""
        return self.seconds[player][self.clock]

    def median(self, player: str) -> float:
        """Return the median of the seconds."""
        return statistics.median(self.times(player))

    def ratio(self, numerator: str, denominator: str, clock: str = "") -> Spread:
        """Describe the ratios of two players' times, pair by pair."""
        return ratios(*(self.seconds[player][clock or self.clock] for player in (numerator, denominator)))

    def sides(self, *players: str, **known: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Describe the seconds by player (none named: all) and clock, beside what is known of a player."""
        spreads = {p: {clock: Spread.of(s) for clock, s in self.seconds[p].items()} for p in players or self.seconds}
        return {player: known.get(player, {}) | spread for player, spread in spreads.items()}


@dataclass
class Bench:
    """One run of the harness."""

    settings: Settings
    tell: Callable[[str, int, int], None] = lambda *_: None
    """Shows progress: (activity, rounds done, rounds in all)."""

    @contextlib.contextmanager
    def workers(self, *sides: str) -> Generator[list[Client]]:
        """Start one process for each side."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(Client(side, self.settings.threads)) for side in sides]

    def same_weights(self, peer: Client, ours: Sequence[Client], job: Job, **only_ours: Any) -> dict[str, Any]:
        """Let the peer build the job's model, and all of ours take its weights over -> information by side."""
        with tempfile.TemporaryDirectory(prefix=".weights-", dir=SCRATCH) as folder:
            file = str(Path(folder) / "weights.safetensors")
            self.tell("building", 0, 1)
            info = {"peer": peer.prepare("main", replace(job, save=file))}
            for client in ours:
                info["ours"] = client.prepare("main", replace(job, load=file, **only_ours))
        return info

    def gate(self, peer: Client, ours: Sequence[Client], id: str = "main", reference: str = "") -> dict[str, Any]:
        """Compare our job `id` with the peer's of the same id, or `reference`, on the inputs that are then timed.

        Raises:
            Different: on every draw of the inputs.
        """
        different: list[str] = []
        for seed in range(GATE_SEEDS):
            self.tell("gate", seed, GATE_SEEDS)
            expected = peer.ask("outputs", id=reference or id, seed=seed)
            answers = [client.ask("gate", id=id, seed=seed, reference=expected, layout=peer.side) for client in ours]
            different = [answer["different"] for answer in answers if "different" in answer]
            if not different:
                return answers[0] | {"seed": seed}
        raise Different(different[0])

    def interleave(self, players: Players, budget: Budget = FULL, rotate: bool = False) -> Samples:
        """Call the players in turn, round after round; with `rotate` every round begins with another one.

        The first calls warm up and are dropped; they also show how many calls make one sample long enough to time.
        """
        quick, names = self.settings.quick, list(players)
        budget = replace(QUICK, least=min(QUICK.least, budget.least)) if quick else budget
        calls, per_round = {}, 1e-9
        for name, (client, id) in players.items():
            once, whole = self._warm_up(client, id)
            n = 1 if whole else max(1, math.ceil((0.02 if quick else 0.1) / max(once, 1e-6)))
            # Another process has filled the caches since a player's last call, which a long call does not notice.
            warm_up = int(once < 0.25 and not whole)
            calls[name] = {"id": id, "n": n, "warm_up": warm_up}
            per_round += (n + warm_up) * once
        rounds = max(budget.least, min(budget.most, int(budget.seconds / per_round)))
        samples = Samples(self.settings.clock, {name: {} for name in names}, {name: [] for name in names})
        for i in range(rounds):
            self.tell("timing", i, rounds)
            first = i % len(names) if rotate else 0
            for name in names[first:] + names[:first]:
                answer = players[name][0].ask("call", **calls[name])
                samples.readings[name].append(answer["reading"])
                for clock, seconds in answer["seconds"].items():
                    samples.seconds[name].setdefault(clock, []).append(seconds)
        return samples

    def _warm_up(self, client: Client, id: str) -> tuple[float, bool]:
        """Call for a second and three times, or ten seconds -> wall seconds of the last call, and `Task.whole`.

        A whole sample is called once: its seconds may be those of a token.
        """
        least = 0.1 if self.settings.quick else 1.0
        spent, done = 0.0, 0
        while True:
            self.tell("warm-up", done, done + 1)
            answer = client.ask("call", id=id)
            once, whole = answer["seconds"].get("wall", answer["seconds"]["cpu"]), answer["whole"]
            spent, done = spent + once, done + 1
            if whole or (spent >= least and done >= WARM_UP) or spent >= 10 * least:
                return once, whole

    def peak_bytes(self, side: str, job: Job, calls: int = 2) -> int:
        """Return the peak memory of a process of its own that builds the job's model and runs it."""
        self.tell(f"memory of {side}", 0, 1)
        with self.workers(side) as [client]:
            client.prepare("main", replace(job, device=self.settings.device))
            client.ask("call", id="main", n=calls)
            return client.ask("peak", id="main")["bytes"]
