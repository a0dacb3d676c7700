"""What cases use: workers, the gate, interleaved timing, and peak memory."""

import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable, Generator, Sequence
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


@dataclass(frozen=True)
class Player:
    """Who is called in a round."""

    name: str
    client: Client
    id: str = "main"
    once: bool = False
    """Whether one call is a sample, however short: for tasks that repeat inside the call."""


@dataclass(frozen=True)
class Budget:
    """How often a case is repeated: for so many seconds, but at least and at most so often."""

    seconds: float = 25.0
    least: int = 5
    most: int = 15

    def rounds(self, seconds_per_round: float) -> int:
        """Return how many rounds fit."""
        return max(self.least, min(self.most, int(self.seconds / max(seconds_per_round, 1e-9))))


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
        clock = clock or self.clock
        return ratios(self.seconds[numerator][clock], self.seconds[denominator][clock])

    def spreads(self, player: str) -> dict[str, Any]:
        """Describe the seconds by clock."""
        return {clock: Spread.of(values) for clock, values in self.seconds[player].items()}


class Bench:
    """One run of the harness."""

    def __init__(self, settings: Settings, tell: Callable[[str, int, int], None] = lambda *_: None) -> None:
        self.settings = settings
        self.tell = tell
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
        answer: dict[str, Any] = {}
        for seed in range(GATE_SEEDS):
            self.tell("gate", seed, GATE_SEEDS)
            expected = peer.ask("outputs", id=reference or id, seed=seed)
            answers = [client.ask("gate", id=id, seed=seed, reference=expected, layout=peer.side) for client in ours]
            answer = next((a for a in answers if "different" in a), answers[0]) | {"seed": seed}
            if "different" not in answer:
                return answer
        raise Different(answer["different"])

    def interleave(self, players: Sequence[Player], budget: Budget = FULL, rotate: bool = False) -> Samples:
        """Call the players in turn, round after round; with `rotate` every round begins with another one.

        The first calls warm up and are dropped; they also show how many calls make one sample long enough to time.
        """
        if self.settings.quick:
            budget = replace(QUICK, least=min(QUICK.least, budget.least))
        calls: dict[str, dict[str, int]] = {}
        per_round = 0.0
        shortest = 0.02 if self.settings.quick else 0.1
        for player in players:
            once = self._warm_up(player)
            n = 1 if player.once else max(1, math.ceil(shortest / max(once, 1e-6)))
            # Another process has filled the caches since a player's last call, which a long call does not notice.
            warm_up = int(once < 0.25 and not player.once)
            calls[player.name] = {"n": n, "warm_up": warm_up}
            per_round += (n + warm_up) * once
        rounds = budget.rounds(per_round)
        samples = Samples(self.settings.clock, {p.name: {} for p in players}, {p.name: [] for p in players})
        for i in range(rounds):
            self.tell("timing", i, rounds)
            first = i % len(players) if rotate else 0
            for player in (*players[first:], *players[:first]):
                answer = player.client.ask("call", id=player.id, **calls[player.name])
                samples.readings[player.name].append(answer["reading"])
                for clock, seconds in answer["seconds"].items():
                    samples.seconds[player.name].setdefault(clock, []).append(seconds)
        return samples

    def _warm_up(self, player: Player) -> float:
        """Call for a second and three times, or ten seconds -> wall seconds of the last call."""
        least = 0.1 if self.settings.quick else 1.0
        spent, done, once = 0.0, 0, 0.0
        while spent < least or (done < WARM_UP and spent < 10 * least and not player.once):
            self.tell("warm-up", done, done + 1)
            seconds = player.client.ask("call", id=player.id)["seconds"]
            once = seconds.get("wall", seconds["cpu"])
            spent, done = spent + once, done + 1
        return once

    def peak_bytes(self, side: str, job: Job, calls: int = 2) -> int:
        """Return the peak memory of a process of its own that builds the job's model and runs it."""
        self.tell(f"memory of {side}", 0, 1)
        with self.workers(side) as [client]:
            client.prepare("main", replace(job, device=self.settings.device))
            client.ask("call", id="main", n=calls)
            return client.ask("peak", id="main")["bytes"]
