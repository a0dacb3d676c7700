"""What cases use: workers, the gate, interleaved timing, and peak memory."""

import contextlib
import math
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
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
Samples = dict[str, dict[str, list[float]]]
"""Seconds by player and clock, one for each round."""


@dataclass(frozen=True)
class Settings:
    """How cases are run; part of what decides whether an earlier result still stands."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False

    @property
    def clock(self) -> str:
        """What ratios are taken on: device events on CUDA, CPU time of one thread, which other jobs disturb least, and
        wall time of several threads, whose CPU time counts waiting."""
        return "device" if self.device == "cuda" else "cpu" if self.threads == 1 else "wall"


@dataclass(frozen=True)
class Player:
    """Who is called in a round."""

    name: str
    client: Client
    id: str = "main"
    once: bool = False
    """Whether one call is a sample, however short: for limits, which repeat inside the call."""


@dataclass(frozen=True)
class Budget:
    """How often a case is repeated."""

    seconds: float = 25.0
    least: int = 5
    most: int = 15

    def rounds(self, seconds_per_round: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / max(seconds_per_round, 1e-9))))


FULL, QUICK = Budget(), Budget(4.0, 2, 4)


class Bench:
    """One run of the harness."""

    def __init__(self, settings: Settings, tell: Callable[[str, int, int], None] = lambda *_: None) -> None:
        self.settings = settings
        self.tell = tell
        """Told what is going on: (what, rounds done, rounds in all)."""

    @contextlib.contextmanager
    def workers(self, *sides: str) -> Generator[list[Client]]:
        """One process for each side."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(Client(side, self.settings.threads)) for side in sides]

    def same_weights(self, peer: Client, ours: list[Client], job: Job, **only_ours: Any) -> dict[str, Any]:
        """Let the peer build the job's model, and all of ours take its weights over -> what each said of it."""
        job = replace(job, device=self.settings.device)
        with tempfile.TemporaryDirectory(prefix=".weights-", dir=SCRATCH) as folder:
            file = str(Path(folder) / "weights.safetensors")
            self.tell("building", 0, 1)
            info = {peer.side: peer.prepare("main", replace(job, side=peer.side, save=file))}
            for client in ours:
                info["ours"] = client.prepare("main", replace(job, side="ours", load=file, **only_ours))
        return info

    def gate(self, peer: Client, ours: list[Client], id: str = "main", reference: str = "") -> dict[str, Any]:
        """Hold our job `id` against the peer's of the same id, or `reference`, on the inputs that are then timed.

        Raises:
            Different: on every draw of the inputs.
        """
        answer: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix=".gate-", dir=SCRATCH) as folder:
            file = str(Path(folder) / "outputs.safetensors")
            for seed in range(GATE_SEEDS):
                self.tell("gate", seed, GATE_SEEDS)
                peer.ask("outputs", id=reference or id, seed=seed, path=file)
                answers = [client.ask("gate", id=id, seed=seed, path=file, layout=peer.side) for client in ours]
                answer = next((a for a in answers if "different" in a), answers[0]) | {"seed": seed}
                if "different" not in answer:
                    return answer
        raise Different(answer["different"])

    def interleave(self, players: list[Player], budget: Budget = FULL) -> tuple[Samples, list[dict[str, Any]]]:
        """Call the players in turn, round after round -> seconds per call, and what the calls of each round read.

        The first calls warm up and are dropped; they also tell how many calls make one sample long enough to time.
        """
        if self.settings.quick:
            budget = replace(QUICK, least=min(QUICK.least, budget.least))
        clock = self.settings.clock
        calls: dict[str, dict[str, int]] = {}
        per_round = 0.0
        shortest = 0.02 if self.settings.quick else 0.1
        for player in players:
            once = self._warm_up(player)
            n = 1 if player.once else max(1, math.ceil(shortest / max(once, 1e-6)))
            # A short call finds the caches as another process left them; a long one does not care.
            warm_up = int(once < 0.25 and not player.once)
            calls[player.name] = {"n": n, "warm_up": warm_up}
            per_round += (n + warm_up) * once
        rounds = budget.rounds(per_round)
        samples: Samples = {player.name: {} for player in players}
        readings: list[dict[str, Any]] = []
        for i in range(rounds):
            self.tell("timing", i, rounds)
            reading: dict[str, Any] = {}
            for player in players:
                answer = player.client.ask("call", id=player.id, **calls[player.name])
                for name, value in answer.items():
                    if name in ("cpu", "wall", "device"):
                        samples[player.name].setdefault(name, []).append(value)
                    else:
                        reading[name] = value
            readings.append(reading)
        assert all(len(s[clock]) == rounds for s in samples.values())
        return samples, readings

    def _warm_up(self, player: Player) -> float:
        """Call for a second and three times, but stop after ten seconds -> wall seconds of the last call."""
        least = 0.1 if self.settings.quick else 1.0
        spent, done, once = 0.0, 0, 0.0
        while spent < least or (done < WARM_UP and spent < 10 * least):
            self.tell("warm-up", done, done + 1)
            once = player.client.ask("call", id=player.id)["wall"]
            spent, done = spent + once, done + 1
        return once

    def ratio(self, samples: Samples, numerator: str, denominator: str, clock: str | None = None) -> Spread:
        """Of two players' times, pair by pair."""
        clock = clock or self.settings.clock
        return ratios(samples[numerator][clock], samples[denominator][clock])

    def peak_bytes(self, job: Job, calls: int = 2) -> int:
        """Peak memory of a process of its own that builds the job's model and runs it."""
        self.tell(f"memory of {job.side}", 0, 1)
        with self.workers(job.side) as [client]:
            client.prepare("main", replace(job, device=self.settings.device))
            client.ask("call", id="main", n=calls)
            return client.ask("peak", id="main")["bytes"]
