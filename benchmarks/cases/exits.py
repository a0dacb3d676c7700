"""Exits of a trained model against its own full depth: what is saved, and what the loops that were run allow."""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, Budget, Player, Samples
from benchmarks.cases.pair import ratio_row
from benchmarks.job import Job
from benchmarks.results import ROOT, Outcome, Row
from benchmarks.stats import Spread

FOLDER = Path(os.environ.get("OPEN_MYTHOS_ADAPTIVE", ROOT / "runs" / "adaptive-text" / "final"))
"""The model that the recipe `adaptive-text` makes."""
RULE: dict[str, Any] = {"exit": "kl", "exit_threshold": 0.01}
FULL: dict[str, Any] = {"exit": "fixed", "exit_threshold": None}
FEW = 2
"""Loops of the shallow calls that, with the deep ones, tell what a loop costs."""


@dataclass(frozen=True)
class Exits:
    """Greedy text, or a prefill, with exits on and at full depth."""

    name: str
    title: str
    job: Job
    """`exits_generate` or `exits_prefill`."""

    @property
    def protocol(self) -> str:
        what = f"prompts of {self.job.tokens} bytes of held-out text"
        if self.generates:
            what += f", {self.job.new_tokens} new ones"
        allowed = (
            "the time at full depth less the cost of the loops that exits leave out. A loop's cost: deep calls less "
            f"those of {FEW} loops, of a prefill, and of a decoded token with as many rows as are still in the loop."
        )
        return (
            f"{self.job.rows} rows, {what}; exit={RULE['exit']!r} at {RULE['exit_threshold']:g} against every token at "
            f"{self.job.n_loops} loops. Gate: tokens and the loops of each are those of a full pass per token, without "
            f"a cache or anything left out. What the loop counts allow: {allowed} Self-spread: a second process."
        )

    @property
    def generates(self) -> bool:
        return self.job.task == "exits_generate"

    def run(self, bench: Bench) -> Outcome:
        job = replace(self.job, device=bench.settings.device, arguments={"folder": str(FOLDER), **RULE})
        full = replace(job, arguments={"folder": str(FOLDER), **FULL})
        with bench.workers("exits", "exits") as [ours, again]:
            info = ours.prepare("exits", job)
            again.prepare("exits", job)
            ours.prepare("reference", replace(job, task=f"{job.task}_reference"))
            agreement = bench.gate(ours, [ours, again], "exits", reference="reference")
            costs = {"full": full, "shallow": replace(full, n_loops=FEW)} | self._loop_jobs(full)
            for name, each in costs.items():
                ours.prepare(name, each)
            players = [Player("ours", ours, "exits"), Player("again", again, "exits")]
            players += [Player(name, ours, name) for name in costs]
            samples, _ = bench.interleave(players, Budget(75.0, 5, 15))
            reading = ours.ask("call", id="exits")
        return self._outcome(bench, samples, reading, info, agreement)

    def _loop_jobs(self, full: Job) -> dict[str, Job]:
        """Calls that tell what a loop costs, besides those at full depth."""
        if not self.generates:
            return {"half": replace(full, n_loops=full.n_loops // 2)}
        prompt = replace(full, new_tokens=1)
        jobs = {"prompt_full": prompt, "prompt_shallow": replace(prompt, n_loops=FEW)}
        middle = replace(full, task="exits_decode", tokens=full.tokens + full.new_tokens // 2)
        for rows in _powers(full.rows):
            jobs[f"decode_{rows}_full"] = replace(middle, rows=rows)
            jobs[f"decode_{rows}_shallow"] = replace(middle, rows=rows, n_loops=FEW)
        return jobs

    def _outcome(
        self,
        bench: Bench,
        samples: Samples,
        reading: dict[str, Any],
        info: dict[str, Any],
        agreement: dict[str, Any],
    ) -> Outcome:
        clock, job = bench.settings.clock, self.job
        rounds = range(len(samples["full"][clock]))

        def seconds(name: str, i: int) -> float:
            return samples[name][clock][i]

        def loop_s(name: str, i: int) -> float:
            deep = seconds(f"{name}full", i) - seconds(f"{name}shallow", i)
            return max(0.0, deep) / (job.n_loops - FEW)

        def saved(i: int, proportional: bool) -> float:
            if not self.generates:
                return loop_s("", i) * (job.n_loops - reading["mean_depth"])
            cost = _between({rows: loop_s(f"decode_{rows}_", i) for rows in _powers(job.rows)})
            if proportional:
                cost = _share_of(cost(job.rows), job.rows)
            steps = zip(*(row[1:] for row in reading["depths"]), strict=True)
            decode = sum(
                cost(job.rows) - cost(sum(depth > n for depth in step)) for step in steps for n in range(job.n_loops)
            )
            return decode + loop_s("prompt_", i) * (job.n_loops - reading["prompt_depth"])

        mean_depth = reading["mean_depth"] if "mean_depth" in reading else _mean_decoded(reading["depths"])
        allowed = [seconds("full", i) / (seconds("full", i) - saved(i, False)) for i in rounds]
        row = ratio_row(self.name, self.title, bench, samples, peer="full")
        shares = [seconds("full", i) / seconds("ours", i) / allowed[i] for i in rounds]
        plain = job.n_loops / mean_depth
        outcome = Outcome(
            [
                row,
                Row(
                    f"{self.name}.allowed",
                    f"{self.title}: share of the {statistics.median(allowed):.2f} that the loop counts allow",
                    statistics.median(shares),
                    "share",
                    spread=Spread.of(shares),
                ),
                Row(
                    f"{self.name}.loops",
                    f"{self.title}: share of the plain ratio of loops, {job.n_loops} / {mean_depth:.2f} = {plain:.2f}",
                    row.value / plain,
                    "share",
                ),
            ],
            {name: {c: Spread.of(v) for c, v in times.items()} for name, times in samples.items()},
            agreement,
            curves={"allowed": allowed, "reading": reading},
        )
        outcome.sides["ours"] |= info
        if job.rows > 1 and self.generates:
            ideal = statistics.median(seconds("full", i) / (seconds("full", i) - saved(i, True)) for i in rounds)
            outcome.notes.append(
                f"If a loop's cost fell with its rows in proportion, the loop counts would allow {ideal:.2f}, of which "
                f"{row.value / ideal:.0%} are reached."
            )
        if not self.generates:
            lines = [(seconds("full", i) + 2 * seconds("shallow", i)) / 3 / seconds("half", i) for i in rounds]
            outcome.notes.append(
                f"At {job.n_loops // 2} loops a straight line through {FEW} and {job.n_loops} gives "
                f"{statistics.median(lines):.2f} of the time measured."
            )
        return outcome


def _mean_decoded(depths: list[list[int]]) -> float:
    """Mean loops of the tokens that decoding ran; the first new one is read off the prompt."""
    return statistics.mean(depth for row in depths for depth in row[1:])


def _powers(rows: int) -> list[int]:
    """1, 2, 4, ... up to `rows`, a power of two."""
    return [1 << i for i in range(rows.bit_length())]


def _between(points: dict[int, float]) -> Callable[[int], float]:
    """Straight lines between measured points, from nothing at 0."""
    points = {0: 0.0, **points}

    def at(n: int) -> float:
        low, high = max(k for k in points if k <= n), min(k for k in points if k >= n)
        return points[low] + (points[high] - points[low]) * (n - low) / max(1, high - low)

    return at


def _share_of(whole: float, rows: int) -> Callable[[int], float]:
    return lambda n: whole * n / rows


_GENERATE = Job("exits", "exits_generate", tokens=64, new_tokens=64, n_loops=8)
EXITS = (
    *(
        Exits(
            f"exits_generate_b{rows}",
            f"adaptive decode, trained (c), exits against its own full depth, batch {rows}",
            replace(_GENERATE, rows=rows),
        )
        for rows in (1, 4, 16)
    ),
    *(
        Exits(
            f"exits_prefill_b{rows}",
            f"prefill of 512 tokens, trained (c), exits against its own full depth, batch {rows}",
            replace(_GENERATE, task="exits_prefill", rows=rows, tokens=512),
        )
        for rows in (1, 4)
    ),
)
