"""Exits of a trained model against its own full depth: the time saved, and the saving that the loop counts allow."""

import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case import Case, Outcome, Reach, Row
from benchmarks.cases.pairs import ratio_row
from benchmarks.client import ROOT
from benchmarks.harness import Bench, Budget
from benchmarks.job import Job

FOLDER = Path(os.environ.get("OPEN_MYTHOS_ADAPTIVE", ROOT / "runs" / "adaptive-text" / "final"))
"""The model that the recipe `adaptive-text` makes."""
RULE: dict[str, Any] = {"exit": "kl", "exit_threshold": 0.01}
FEW = 2
"""Loops of the shallow calls that, with the deep ones, show what a loop costs."""
DECODED = 8
"""Tokens of the calls that show what decoding costs with fewer rows."""


def exits(case: Case, bench: Bench) -> Outcome:
    """Time exit='kl' at 0.01 against every token at {job.n_loops} loops: {job.rows} rows, prompts of {job.tokens} bytes
    of held-out text, {job.new_tokens} new ones where text is generated. Gate: tokens and the loops of each are those of
    a full pass per token, without a cache or compaction. What the loop counts allow: the time at full depth less the
    cost of the loops that exits leave out. A loop's cost: deep calls less those of 2 loops, of a prefill and of
    decoding; and for rows that leave, the ratio of decoding with that many fewer rows. Self-spread: a second
    process."""
    job = replace(case.job, device=bench.settings.device)
    full = replace(job, arguments={**job.arguments, "exit": "fixed", "exit_threshold": None})
    costs = _cost_jobs(full)
    with bench.workers("exits", "exits") as [ours, again]:
        info, _ = (client.prepare("exits", job) for client in (ours, again))
        ours.prepare("reference", replace(job, task=f"{job.task}_reference"))
        agreement = bench.gate(ours, [ours, again], "exits", reference="reference")
        for name, each in costs.items():
            ours.prepare(name, each)
        players = {"ours": (ours, "exits"), "again": (again, "exits"), **{name: (ours, name) for name in costs}}
        samples = bench.interleave(players, Budget(30.0, 5, 9))
    reading, seconds = samples.readings["ours"][-1], {name: samples.median(name) for name in samples.seconds}
    possible, depth = allowed(job, seconds, reading), mean_depth(reading)
    row = ratio_row(case.name, case.title, samples, peer="full")
    share = f"{case.title}: share of the {possible:.2f} that the loop counts allow"
    plain = f"{case.title}: share of the plain ratio of loops, {job.n_loops} / {depth:.2f}"
    rows = [row, Row(f"{case.name}.allowed", share, row.value / possible, "share")]
    rows.append(Row(f"{case.name}.loops", plain, row.value * depth / job.n_loops, "share"))
    outcome = Outcome(rows, samples.sides(ours=info), agreement, curves={"reading": reading})
    if job.rows > 1 and job.task == "exits_generate":
        ideal = allowed(job, seconds, reading, proportional=True)
        note = f"If a loop's cost fell with its rows in proportion, the loop counts would allow {ideal:.2f}, of which "
        outcome.notes.append(f"{note}{row.value / ideal:.0%} are reached.")
    if job.task == "exits_prefill":
        line = (seconds["full"] + 2 * seconds["shallow"]) / 3 / seconds["half"]
        note = f"At {job.n_loops // 2} loops a straight line through {FEW} and {job.n_loops} gives {line:.2f}"
        outcome.notes.append(f"{note} of the time measured.")
    return outcome


def _cost_jobs(full: Job) -> dict[str, Job]:
    """Make the calls at full depth, and those that show what a loop costs."""
    jobs: dict[str, Job] = {}
    decode = replace(full, task="exits_decode", tokens=full.tokens + full.new_tokens // 2, new_tokens=DECODED)
    for name in _calls(full):
        kind, _, rows = name.rstrip("_").partition("_")
        called = {"": full, "prompt": replace(full, new_tokens=1), "decode": replace(decode, rows=int(rows or 1))}
        jobs[f"{name}full"] = called[kind]
        jobs[f"{name}shallow"] = replace(called[kind], n_loops=FEW)
    half = {"half": replace(full, n_loops=full.n_loops // 2)}
    return jobs if full.task == "exits_generate" else jobs | half


def allowed(job: Job, seconds: dict[str, float], reading: dict[str, Any], proportional: bool = False) -> float:
    """Return the ratio that exits would reach if every loop they leave out gave back its cost.

    Args:
        seconds: by player.
        reading: `mean_depth` of a prefill; of generated text `depths` (rows, new tokens), the first of which come from
            the prompt's pass, and the prompt's `prompt_depth`.
        proportional: assume that a loop's cost falls with its rows in proportion, instead of measured.
    """
    shallower = job.n_loops - FEW
    loop_s = {name: (seconds[f"{name}full"] - seconds[f"{name}shallow"]) / shallower for name in _calls(job)}
    if job.task == "exits_prefill":
        saved = loop_s[""] * (job.n_loops - reading["mean_depth"])
        return seconds["full"] / (seconds["full"] - saved)
    parts = {rows: rows / job.rows for rows in _powers(job.rows)}
    if not proportional and job.rows > 1:
        parts = {rows: loop_s[f"decode_{rows}_"] / loop_s[f"decode_{job.rows}_"] for rows in parts}
    steps = list(zip(*(row[1:] for row in reading["depths"]), strict=True))
    active = [sum(depth > n for depth in step) for step in steps for n in range(job.n_loops)]
    # Straight lines between measured numbers of rows, from nothing at 0.
    left_out = len(active) - float(np.interp(active, [0, *parts], [0.0, *parts.values()]).sum())
    saved = (loop_s[""] - loop_s["prompt_"]) / len(steps) * left_out
    saved += loop_s["prompt_"] * (job.n_loops - reading["prompt_depth"])
    return seconds["full"] / (seconds["full"] - saved)


def mean_depth(reading: dict[str, Any]) -> float:
    """Return the mean loops of the tokens of a prefill, or of those that decoding ran."""
    if "mean_depth" in reading:
        return reading["mean_depth"]
    return statistics.mean(depth for row in reading["depths"] for depth in row[1:])


def _calls(job: Job) -> list[str]:
    """List how the names of the players begin that are called both deep and shallow."""
    if job.task == "exits_prefill":
        return [""]
    return ["", "prompt_", *(f"decode_{rows}_" for rows in _powers(job.rows) if job.rows > 1)]


def _powers(rows: int) -> list[int]:
    """List 1, 2, 4, ... up to `rows`, a power of two."""
    return [1 << i for i in range(rows.bit_length())]


def cases() -> list[Case]:
    """List the cases of the trained model."""
    generate = Job("exits_generate", tokens=64, new_tokens=64, n_loops=8, arguments={"folder": str(FOLDER), **RULE})
    prefill = replace(generate, task="exits_prefill", tokens=512)
    found = []
    for job, what, batches in ((generate, "adaptive decode", (1, 4, 16)), (prefill, "prefill of 512 tokens", (1, 4))):
        for rows in batches:
            title = f"{what}, trained (c), exits against its own full depth, batch {rows}"
            given, reach = replace(job, rows=rows), {".allowed": Reach(0.9)}
            found.append(Case(f"{job.task}_b{rows}", title, exits, given, reach, side="exits"))
    return found
