"""Peak memory of a training step, with and without recomputing each loop, and what recomputing costs in time."""

from dataclasses import dataclass, replace

from benchmarks.bench import Bench, Budget, Player
from benchmarks.cases.pair import PEER, ratio_row, seconds_text
from benchmarks.job import Job
from benchmarks.results import Outcome, Row
from benchmarks.stats import Spread


@dataclass(frozen=True)
class TrainingMemory:
    """The peak of a process above its imports; the model is in it."""

    name: str
    title: str
    job: Job
    protocol: str = (
        "Peak resident memory of a process of its own for each side, above what is resident after the imports: model, "
        "two steps, gradients. No optimizer. On CUDA the allocator's peak. Time: interleaved with the step without "
        "checkpoints."
    )

    def run(self, bench: Bench) -> Outcome:
        job = replace(self.job, device=bench.settings.device)
        checkpointed = replace(job, side="ours", checkpoint=True)
        peaks = {
            PEER: bench.peak_bytes(replace(job, side=PEER)),
            "ours": bench.peak_bytes(replace(job, side="ours")),
            "again": bench.peak_bytes(replace(job, side="ours")),
            "checkpointed": bench.peak_bytes(checkpointed),
        }
        with bench.workers(PEER, "ours") as [peer, ours]:
            bench.same_weights(peer, [ours], job, checkpoint=True)
            agreement = bench.gate(peer, [ours])
            ours.prepare("plain", replace(job, side="ours"))
            players = [
                Player("peer", peer),
                Player("ours", ours),
                Player("again", ours),
                Player("plain", ours, "plain"),
            ]
            samples, _ = bench.interleave(players, Budget(60.0, 3, 7))
        time = ratio_row(f"{self.name}.time", f"{self.title}: checkpointed, time over without", bench, samples)
        slower, peers = bench.ratio(samples, "ours", "plain"), bench.ratio(samples, "ours", "peer")
        without = Spread.of(samples["plain"][bench.settings.clock]).median
        time = replace(time, value=slower.median, spread=slower, peer=f"without: {seconds_text(without)}")
        time.wall = bench.ratio(samples, "ours", "plain", "wall").median
        rows = [
            self._row(self.name, self.title, peaks, "ours"),
            self._row(f"{self.name}.checkpointed", f"{self.title}: checkpointed", peaks, "checkpointed"),
            time,
        ]
        notes = [
            f"Checkpointed over 0.5.0, time: {peers.median:.2f}.",
            f"Two processes of ours: {peaks['again'] / peaks['ours']:.3f} of each other.",
        ]
        return Outcome(rows, {name: {"peak_bytes": peak} for name, peak in peaks.items()}, agreement, notes=notes)

    @staticmethod
    def _row(id: str, title: str, peaks: dict[str, int], side: str) -> Row:
        peer, ours = peaks[PEER], peaks[side]
        return Row(id, title, ours / peer, "of the peer's", f"{peer / 2**20:.0f} MiB", f"{ours / 2**20:.0f} MiB")
