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
DECODED = 8
"""Tokens of the calls that tell what decoding costs with fewer rows."""


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
            f"those of {FEW} loops, of a prefill and of decoding; and for rows that leave, the ratio of decoding with "
            "that many fewer rows."
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
            costs = self._costs(full)
            for name, each in costs.items():
                ours.prepare(name, each)
            players = [Player("ours", ours, "exits"), Player("again", again, "exits")]
            players += [Player(name, ours, name) for name in costs]
            samples, _ = bench.interleave(players, Budget(30.0, 5, 9))
            reading = ours.ask("call", id="exits")
        return self._outcome(bench, samples, reading, info, agreement)

    def _costs(self, full: Job) -> dict[str, Job]:
        """Calls at full depth, and those that tell what a loop costs."""
        jobs: dict[str, Job] = {}
        decode = replace(full, task="exits_decode", tokens=full.tokens + full.new_tokens // 2, new_tokens=DECODED)
        for name in _calls(full):
            kind, _, rows = name.rstrip("_").partition("_")
            called = {"": full, "prompt": replace(full, new_tokens=1), "decode": replace(decode, rows=int(rows or 1))}
            jobs[f"{name}full"] = called[kind]
            jobs[f"{name}shallow"] = replace(called[kind], n_loops=FEW)
        return jobs if self.generates else jobs | {"half": replace(full, n_loops=full.n_loops // 2)}

    def _outcome(
        self,
        bench: Bench,
        samples: Samples,
        reading: dict[str, Any],
        info: dict[str, Any],
        agreement: dict[str, Any],
    ) -> Outcome:
        clock, job = bench.settings.clock, self.job
        seconds = {name: Spread.of(times[clock]).median for name, times in samples.items()}
        possible = allowed(job, seconds, reading)
        row = ratio_row(self.name, self.title, bench, samples, peer="full")
        depth = mean_depth(reading)
        share = f"{self.title}: share of the {possible:.2f} that the loop counts allow"
        plain = f"{self.title}: share of the plain ratio of loops, {job.n_loops} / {depth:.2f}"
        rows = [
            row,
            Row(f"{self.name}.allowed", share, row.value / possible, "share"),
            Row(f"{self.name}.loops", plain, row.value * depth / job.n_loops, "share"),
        ]
        sides = {name: {c: Spread.of(v) for c, v in times.items()} for name, times in samples.items()}
        outcome = Outcome(rows, {**sides, "ours": info | sides["ours"]}, agreement, curves={"reading": reading})
        if job.rows > 1 and self.generates:
            ideal = allowed(job, seconds, reading, proportional=True)
            outcome.notes.append(
                f"If a loop's cost fell with its rows in proportion, the loop counts would allow {ideal:.2f}, of which "
                f"{row.value / ideal:.0%} are reached."
            )
        if not self.generates:
            line = (seconds["full"] + 2 * seconds["shallow"]) / 3 / seconds["half"]
            outcome.notes.append(
                f"At {job.n_loops // 2} loops a straight line through {FEW} and {job.n_loops} gives {line:.2f} of the "
                "time measured."
            )
        return outcome


def allowed(job: Job, seconds: dict[str, float], reading: dict[str, Any], proportional: bool = False) -> float:
    """The ratio that exits would reach if every loop they leave out gave back what it costs.

    Args:
        seconds: by player.
        reading: `mean_depth` of a prefill; of generated text `depths` (rows, new tokens), the first of which were read
            off the prompt, and the prompt's `prompt_depth`.
        proportional: take a loop of fewer rows for as much cheaper, instead of measured.
    """
    shallower = job.n_loops - FEW
    loop_s = {name: (seconds[f"{name}full"] - seconds[f"{name}shallow"]) / shallower for name in _calls(job)}
    if job.task == "exits_prefill":
        saved = loop_s[""] * (job.n_loops - reading["mean_depth"])
        return seconds["full"] / (seconds["full"] - saved)
    parts = {rows: rows / job.rows for rows in _powers(job.rows)}
    if not proportional and job.rows > 1:
        parts = {rows: loop_s[f"decode_{rows}_"] / loop_s[f"decode_{job.rows}_"] for rows in parts}
    part = _between(parts)
    steps = list(zip(*(row[1:] for row in reading["depths"]), strict=True))
    left_out = sum(1 - part(sum(depth > n for depth in step)) for step in steps for n in range(job.n_loops))
    saved = (loop_s[""] - loop_s["prompt_"]) / len(steps) * left_out
    saved += loop_s["prompt_"] * (job.n_loops - reading["prompt_depth"])
    return seconds["full"] / (seconds["full"] - saved)


def mean_depth(reading: dict[str, Any]) -> float:
    """Mean loops of the tokens of a prefill, or of those that decoding ran."""
    if "mean_depth" in reading:
        return reading["mean_depth"]
    return statistics.mean(depth for row in reading["depths"] for depth in row[1:])


def _calls(job: Job) -> list[str]:
    """What is called both deep and shallow: how the names of these players begin."""
    if job.task == "exits_prefill":
        return [""]
    return ["", "prompt_", *(f"decode_{rows}_" for rows in _powers(job.rows) if job.rows > 1)]


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
