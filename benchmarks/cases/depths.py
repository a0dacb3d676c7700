"""Rows of one batch at different depths, which only ours can: what is saved, and what could be."""

from dataclasses import dataclass, replace

from benchmarks.bench import Bench, Budget, Player
from benchmarks.cases.pair import ratio_row
from benchmarks.job import Job
from benchmarks.results import Outcome, Row
from benchmarks.stats import Spread


@dataclass(frozen=True)
class Depths:
    """A training step with a depth for each row, against every row at the deepest one."""

    name: str
    title: str
    job: Job
    """With `depths`."""

    @property
    def protocol(self) -> str:
        return (
            f"Training step, {self.job.rows} x {self.job.tokens} tokens, depths {self.job.depths}. Gate: every row in "
            "a step of its own. What the loop counts allow: a step at depth 1 and one at the deepest give the cost of "
            "a loop and of the rest; a step whose rows paid for their own loops alone would take rest + mean depth * "
            "loop. Self-spread: a second process."
        )

    def run(self, bench: Bench) -> Outcome:
        job = replace(self.job, side="ours", device=bench.settings.device)
        deepest = max(job.depths)
        level = replace(job, depths=(deepest,) * job.rows)
        with bench.workers("ours", "ours") as [ours, again]:
            info = ours.prepare("depths", job)
            again.prepare("depths", job)
            ours.prepare("rows", replace(job, task="train_rows"))
            ours.prepare("deepest", level)
            # The same model, whose tokens halt in the deepest loop or in the last that their row may run.
            ours.prepare("one", replace(level, depths=(1,) * job.rows, halt_at=deepest))
            agreement = bench.gate(ours, [ours], "depths", reference="rows")
            samples, _ = bench.interleave(
                [
                    Player("deepest", ours, "deepest"),
                    Player("ours", ours, "depths"),
                    Player("again", again, "depths"),
                    Player("one", ours, "one"),
                ],
                Budget(80.0, 4, 9),
            )
        clock = bench.settings.clock
        allowed = []
        for whole, one in zip(samples["deepest"][clock], samples["one"][clock], strict=True):
            loop = (whole - one) / (deepest - 1)
            allowed.append(whole / (one - loop + loop * sum(job.depths) / job.rows))
        row = ratio_row(self.name, self.title, bench, samples, peer="deepest")
        possible = Spread.of(allowed)
        share = Row(
            f"{self.name}.allowed",
            f"{self.title}: share of the {possible.median:.2f} that the loop counts allow",
            row.value / possible.median,
            "share",
        )
        sides = {
            name: {clock: Spread.of(values) for clock, values in samples[name].items()}
            for name in ("deepest", "ours", "one")
        }
        return Outcome([row, share], {**sides, "ours": info | sides["ours"]}, agreement, curves={"allowed": allowed})
