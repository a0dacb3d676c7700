"""The same task on 0.5.0 and on ours: copied weights, equal mathematics, interleaved."""

import statistics
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.bench import FULL, Bench, Budget, Player, Samples
from benchmarks.client import Client
from benchmarks.job import Job
from benchmarks.products import Work, work_of
from benchmarks.reach import REACH
from benchmarks.results import Outcome, Row
from benchmarks.stats import Spread
from benchmarks.tasks import TASKS

PEER = "open_mythos_0_5"
DESCRIPTIONS = {name: (task.__doc__ or "").strip() for name, task in TASKS.items()}


@dataclass(frozen=True)
class Pair:
    """One task timed on both sides."""

    name: str
    title: str
    job: Job
    ours: dict[str, Any] = field(default_factory=dict)
    """Fields of the job that only our side has."""
    budget: Budget = FULL
    second_worker: bool = True
    """Compare ours with a second process of ours; otherwise, where two do not fit, with its own next call."""
    memory: bool = True

    @property
    def protocol(self) -> str:
        job, twin = self.job, "a second process of ours" if self.second_worker else "the same process called again"
        new = f", {job.new_tokens} new tokens" if job.task == "generate" else ""
        context = "one token of {} rows after {} tokens" if job.task == "decode" else "{} x {} tokens"
        what = f"{job.task}, {context.format(job.rows, job.tokens)}{new}, {job.n_loops} loops"
        return f"{what[0].upper()}{what[1:]}. {DESCRIPTIONS[job.task]} Self-spread: {twin}."

    def run(self, bench: Bench) -> Outcome:
        job = replace(self.job, side="ours", device=bench.settings.device)
        work = work_of(job)
        sides = [PEER, "ours", *(["ours"] if self.second_worker else []), "limits"]
        with bench.workers(*sides) as [peer, *ours, limits]:
            info = bench.same_weights(peer, ours, job, **self.ours)
            agreement = bench.gate(peer, ours)
            players = [Player("peer", peer), Player("ours", ours[0]), Player("again", ours[-1])]
            machine, found = limit_players(limits, work, job.device)
            samples, readings = bench.interleave([*players, *machine], self.budget)
        outcome = Outcome(gate=agreement, limits=found)
        shares = {name: share(bench, samples, name, work, readings) for name in ("peer", "ours")}
        for name, side in (("peer", PEER), ("ours", "ours")):
            outcome.sides[name] = {
                **info[side],
                **{clock: Spread.of(values) for clock, values in samples[name].items()},
                "seconds": Spread.of(samples[name][bench.settings.clock]).median,
                "share": shares[name],
                "flops": work.flops,
                "bytes": work.bytes,
            }
            if job.task == "train":
                outcome.sides[name]["tokens_per_s"] = job.rows * job.tokens / outcome.sides[name]["seconds"]
            if self.memory:
                extra = self.ours if name == "ours" else {}
                outcome.sides[name]["peak_bytes"] = bench.peak_bytes(replace(job, side=side, **extra))
        outcome.rows.append(ratio_row(self.name, self.title, bench, samples, shares))
        if f"{self.name}.share" in REACH:
            title = f"{self.title}: share of the limit"
            outcome.rows.append(Row(f"{self.name}.share", title, shares["ours"], "share", outcome.rows[0].peer_share))
        return outcome


def limit_players(limits: Client, work: Work, device: str) -> tuple[list[Player], dict[str, Any]]:
    """The machine's limits, measured in every round, and the rates of the kernels by shape."""
    players, found = [], {}
    if work.products:
        job = Job("limits", "products", device=device, arguments={"shapes": work.shapes})
        found = {"shapes": work.shapes, "rates": limits.prepare("products", job)["rates"]}
        players.append(Player("products", limits, "products", once=True))
    if work.bytes:
        limits.prepare("stream", Job("limits", "stream", device=device))
        players.append(Player("stream", limits, "stream", once=True))
    return players, found


def share(bench: Bench, samples: Samples, player: str, work: Work, readings: list[dict[str, Any]]) -> float:
    """The time that the machine's limits would leave over the time taken: the median over rounds."""
    times = samples[player][bench.settings.clock]
    return statistics.median(
        work.seconds(reading.get("rates", ()), reading.get("read", 1.0)) / seconds
        for reading, seconds in zip(readings, times, strict=True)
    )


def ratio_row(
    id: str, title: str, bench: Bench, samples: Samples, shares: dict[str, float] | None = None, peer: str = "peer"
) -> Row:
    """How many times the peer's time ours is the part of."""
    clock = bench.settings.clock
    spread = bench.ratio(samples, peer, "ours")
    shares = shares or {}
    return Row(
        id,
        title,
        spread.median,
        peer=seconds_text(Spread.of(samples[peer][clock]).median),
        ours=seconds_text(Spread.of(samples["ours"][clock]).median),
        spread=spread,
        noise=bench.ratio(samples, "ours", "again"),
        wall=bench.ratio(samples, peer, "ours", "wall").median,
        peer_share=f"{shares[peer]:.0%}" if peer in shares else "",
        ours_share=f"{shares['ours']:.0%}" if "ours" in shares else "",
    )


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
