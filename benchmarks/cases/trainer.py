"""What a training run costs besides the model's passes: Muon, and metrics with checkpoints."""

import contextlib
import statistics
import tempfile
from collections.abc import Generator
from dataclasses import dataclass, replace

from benchmarks.bench import SCRATCH, Bench, Budget, Player
from benchmarks.cases.pair import seconds_text
from benchmarks.job import Job
from benchmarks.results import Outcome, Row
from benchmarks.stats import Spread

SIDE = "trainer"


@contextlib.contextmanager
def _with_folder(job: Job, device: str) -> Generator[Job]:
    """The job of the side that trains, with a folder for its runs."""
    with tempfile.TemporaryDirectory(prefix=".runs-", dir=SCRATCH) as folder:
        yield replace(job, side=SIDE, device=device, arguments={**job.arguments, "folder": folder})


@dataclass(frozen=True)
class MuonShare:
    """The optimizer's part of whole steps, at several sizes of the batch."""

    name: str
    title: str
    job: Job
    batches: tuple[int, ...]
    """Rows."""

    @property
    def protocol(self) -> str:
        return (
            f"Whole steps of the trainer in float32, {self.job.n_loops} loops, {self.job.tokens} tokens in a row. CPU "
            "time of Muon's step over that of the trainer's; batches take turns. Muon's work does not depend on the "
            "batch. AdamW, for embedding and norms, is not in the share. No gate: nothing is compared."
        )

    def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        with _with_folder(self.job, bench.settings.device) as job, bench.workers(SIDE) as [client]:
            players = []
            for rows in self.batches:
                outcome.sides[f"{rows} rows"] = client.prepare(str(rows), replace(job, rows=rows))
                players.append(Player(str(rows), client, str(rows), once=True))
            samples, readings = bench.interleave(players, Budget(60.0, 3, 5))
        for rows in self.batches:
            spread = Spread.of([reading[f"muon {rows}"] for reading in readings])
            step = Spread.of(samples[str(rows)][bench.settings.clock])
            side = outcome.sides[f"{rows} rows"]
            side |= {clock: Spread.of(values) for clock, values in samples[str(rows)].items()}
            side |= {"tokens_per_s": side.pop("tokens") / step.median}
            ours = f"{seconds_text(spread.median * step.median)} of {seconds_text(step.median)}"
            title = f"{self.title}, batch {rows} x {self.job.tokens}"
            outcome.rows.append(Row(f"{self.name}.{rows}", title, spread.median, "share", ours=ours, spread=spread))
        return outcome


@dataclass(frozen=True)
class Overhead:
    """Metrics after every step and checkpoints, by the trainer's own timers and against a run without checkpoints."""

    name: str
    title: str
    job: Job
    """With `steps` and `checkpoint_every` in its arguments."""

    @property
    def protocol(self) -> str:
        given = self.job.arguments
        return (
            f"Whole runs of {given['steps']} steps of {self.job.rows} x {self.job.tokens} tokens, {self.job.n_loops} "
            f"loops, a line of metrics after every step, a checkpoint every {given['checkpoint_every']}. By its own "
            "timers: the share that perf/overhead tells of. Against the same run without checkpoints, in turns: all of "
            "the process, so with the thread that writes. Itself: that run against its own next one."
        )

    def run(self, bench: Bench) -> Outcome:
        every = self.job.arguments["checkpoint_every"]
        with _with_folder(self.job, bench.settings.device) as job, bench.workers(SIDE) as [client]:
            client.prepare("with", job)
            client.prepare("without", replace(job, arguments={**job.arguments, "checkpoint_every": 0}))
            players = [Player(id, client, id.split()[0], once=True) for id in ("with", "without", "without again")]
            samples, readings = bench.interleave(players, Budget(60.0, 3, 7))
        ratio, wall = (bench.ratio(samples, "with", "without", clock) for clock in (bench.settings.clock, "wall"))
        noise = bench.ratio(samples, "without", "without again")
        own = {n: Spread.of([reading[f"overhead {n}"] for reading in readings]) for n in (every, 0)}
        row = Row(self.name, self.title, own[every].median, "share", spread=own[every])
        row.ours = f"{own[0].median:.1%} without checkpoints"
        times = {name: statistics.median(values[bench.settings.clock]) for name, values in samples.items()}
        against = Row(
            f"{self.name}.time",
            f"{self.title}: time over the same run without checkpoints",
            ratio.median,
            "of the time without",
            peer=f"without: {seconds_text(times['without'])}",
            ours=seconds_text(times["with"]),
            spread=ratio,
            noise=noise,
            wall=wall.median,
        )
        sides = {name: {clock: Spread.of(v) for clock, v in found.items()} for name, found in samples.items()}
        return Outcome([row, against], sides)
