"""Cases that measure this package alone: how costs grow, and what a training run costs besides the model's passes."""

import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.case import Case, Outcome, Row
from benchmarks.cases.pairs import seconds_text
from benchmarks.harness import SCRATCH, Bench, Budget
from benchmarks.job import Job
from benchmarks.stats import Spread, fit_line
from open_mythos.accounting import flops_per_token
from open_mythos.config import MythosConfig

POWERS = (1, 2, 4, 8, 16, 32, 64)


def sweeps(job: Job) -> dict[str, dict[int, Job]]:
    """Make the jobs of three sweeps, by size: tokens of one row, loops, rows."""
    # One model for all: every token halts in the deepest loop of all, or in the call's last.
    job = replace(job, halt_at=max(POWERS))
    return {
        "tokens": {64 * n: replace(job, rows=1, tokens=64 * n) for n in POWERS},
        "loops": {n: replace(job, rows=1, tokens=256, n_loops=n) for n in POWERS},
        "rows": {n: replace(job, rows=n, tokens=64) for n in POWERS},
    }


def scaling(case: Case, bench: Bench) -> Outcome:
    """Time forward passes of ours without a cache. Tokens: 1 row of 64 to 4096, 8 loops; loops: 1 row of 256 tokens, 1
    to 64; rows: 1 to 64 of 64 tokens, 8 loops. Sizes are called in turn. The line is fitted to the medians with least
    relative squares, against FLOPs, in which attention's quadratic part is counted; a deviation is the time over the
    line's, less one."""
    outcome = Outcome()
    with bench.workers("ours") as [ours]:
        for sweep, jobs in sweeps(case.job).items():
            for size, job in jobs.items():
                ours.prepare(f"{sweep}{size}", replace(job, device=bench.settings.device))
            players = {str(size): (ours, f"{sweep}{size}") for size in jobs}
            samples = bench.interleave(players, Budget(30.0, 3, 7))
            times = [Spread.of(samples.times(str(size))) for size in jobs]
            work = [flops(job) for job in jobs.values()]
            fixed, per_flop = fit_line(work, [t.median for t in times])
            line = [fixed + per_flop * w for w in work]
            deviations = [t.median / expected - 1 for t, expected in zip(times, line, strict=True)]
            curve = {"sizes": list(jobs), "flops": work, "times": times, "line": line, "deviations": deviations}
            outcome.curves[sweep] = curve
            title, worst = f"{case.title}: {sweep}, largest deviation", max(map(abs, deviations))
            outcome.rows.append(Row(f"{case.name}.{sweep}", title, worst, "share"))
    return outcome


def flops(job: Job) -> int:
    """Count the FLOPs of a forward pass; a causal query sees (T + 1) / 2 keys in the mean."""
    return job.rows * job.tokens * flops_per_token(MythosConfig(**job.model), job.n_loops, (job.tokens + 1) // 2)


def muon_share(case: Case, bench: Bench) -> Outcome:
    """Time whole steps of the trainer in float32, {job.n_loops} loops, {job.tokens} tokens in a row. CPU time of Muon's
    step over that of the trainer's; batches take turns. Muon's work does not depend on the batch. AdamW, for embedding
    and norms, is not in the share. No gate: nothing is compared."""
    outcome, batches = Outcome(), case.job.arguments["batches"]
    with tempfile.TemporaryDirectory(prefix=".runs-", dir=SCRATCH) as folder, bench.workers("trainer") as [client]:
        job = _in_folder(case.job, bench, folder)
        info = {rows: client.prepare(str(rows), replace(job, rows=rows)) for rows in batches}
        samples = bench.interleave({str(rows): (client, str(rows)) for rows in batches}, Budget(60.0, 3, 5))
    for rows, side in zip(batches, samples.sides().values(), strict=True):
        step_s = samples.median(str(rows))
        spread = Spread.of([reading["muon"] for reading in samples.readings[str(rows)]])
        outcome.sides[f"{rows} rows"] = side | {"tokens_per_s": info[rows]["tokens"] / step_s}
        ours = f"{seconds_text(spread.median * step_s)} of {seconds_text(step_s)}"
        title = f"{case.title}, batch {rows} x {job.tokens}"
        outcome.rows.append(Row(f"{case.name}.{rows}", title, spread.median, "share", ours=ours, spread=spread))
    return outcome


def overhead(case: Case, bench: Bench) -> Outcome:
    """Time whole runs of {job.arguments[steps]} steps of {job.rows} x {job.tokens} tokens, {job.n_loops} loops, a line
    of metrics after every step, a checkpoint every {job.arguments[checkpoint_every]}. By its own timers: the share that
    perf/overhead reports. Against the same run without checkpoints, in turns: all of the process, so with the thread
    that writes. Itself: that run against its own next one."""
    with tempfile.TemporaryDirectory(prefix=".runs-", dir=SCRATCH) as folder, bench.workers("trainer") as [client]:
        job = _in_folder(case.job, bench, folder)
        client.prepare("with", job)
        client.prepare("without", replace(job, arguments={**job.arguments, "checkpoint_every": 0}))
        players = {"with": (client, "with"), **dict.fromkeys(("without", "without again"), (client, "without"))}
        samples = bench.interleave(players, Budget(60.0, 3, 7))
    readings = ([reading["overhead"] for reading in samples.readings[name]] for name in ("with", "without"))
    own, without = map(Spread.of, readings)
    row = Row(case.name, case.title, own.median, "share", spread=own, ours=f"{without.median:.1%} without checkpoints")
    ratio, noise = samples.ratio("with", "without"), samples.ratio("without", "without again")
    title, unit = f"{case.title}: time over the same run without checkpoints", "of the time without"
    theirs, ours = (seconds_text(samples.median(name)) for name in ("without", "with"))
    wall = samples.ratio("with", "without", "wall").median
    times = Row(f"{case.name}.time", title, ratio.median, unit, f"without: {theirs}", ours, ratio, noise, wall)
    return Outcome([row, times], samples.sides())


def _in_folder(job: Job, bench: Bench, folder: str | Path) -> Job:
    """Let the job make its runs in a folder."""
    return replace(job, device=bench.settings.device, arguments={**job.arguments, "folder": str(folder)})
