"""What a model costs before it has done anything: time to build it, bytes of cache and of rotary tables."""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.bench import Bench, Budget, Player
from benchmarks.cases.pair import PEER, ratio_row, seconds_text
from benchmarks.job import Job
from benchmarks.results import Outcome, Row
from benchmarks.stats import Spread


@dataclass(frozen=True)
class Building:
    """Time to construct a model, on both sides."""

    name: str
    title: str
    model: dict[str, Any]
    meta: bool
    protocol: str = (
        "Construction alone, in a process that has built one before and dropped it. "
        "Self-spread: the same process again."
    )

    def run(self, bench: Bench) -> Outcome:
        job = Job("ours", "build_meta" if self.meta else "build", self.model, device=bench.settings.device)
        with bench.workers(PEER, "ours") as [peer, ours]:
            for client in (peer, ours):
                client.prepare("main", replace(job, side=client.side))
            players = [Player("peer", peer), Player("ours", ours), Player("again", ours)]
            samples, readings = bench.interleave(players, Budget(25.0, 3, 9))
        outcome = Outcome(notes=[f"{readings[-1]['parameters']:,} parameters."])
        row = ratio_row(self.name, self.title, bench, samples)
        if self.meta:
            own = Spread.of(samples["ours"][bench.settings.clock])
            outcome.rows.append(
                Row(f"{self.name}.ms", f"{self.title}: ours alone", 1e3 * own.median, "ms", ours=seconds_text(own.max))
            )
        outcome.rows.insert(0, row)
        return outcome


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of keys and values for the same tokens."""

    name: str
    title: str
    job: Job
    protocol: str = (
        "Storages of the cache after a prompt of 128 tokens and 4 decoded ones, unused room included. The experts are "
        "made few and small, which the cache does not depend on. Nothing is timed."
    )

    def run(self, bench: Bench) -> Outcome:
        found = read(bench, "cache_bytes", self.job)
        peer, ours = (found[side]["bytes_per_token"] for side in (PEER, "ours"))
        row = Row(self.name, self.title, peer / ours, peer=f"{peer:,.0f} B/token", ours=f"{ours:,.0f} B/token")
        return Outcome([row], sides=found)


@dataclass(frozen=True)
class LongRope:
    """What a context of a million tokens costs before it is used, and how exact its angles are."""

    name: str
    title: str
    model: dict[str, Any]
    protocol: str = (
        "Bytes: parameters and buffers of the model on the meta device, less those of the same model for 1 token. "
        "Error: cosine and sine of every position against float64. Nothing is timed."
    )

    def run(self, bench: Bench) -> Outcome:
        job = Job("ours", "rope", self.model)
        resident, error = read(bench, "rope_bytes", job), read(bench, "rope_error", job)
        ours, peer = resident["ours"]["bytes"], resident[PEER]["bytes"]
        rows = [
            Row(
                f"{self.name}.bytes",
                f"{self.title}: resident",
                ours,
                "B",
                peer=f"{peer / 2**20:.0f} MiB",
                ours=f"{ours / 2**20:.0f} MiB",
            ),
            Row(
                f"{self.name}.error",
                f"{self.title}: largest error",
                error["ours"]["error"],
                "",
                peer=f"{error[PEER]['error']:.1e}",
                ours=f"{error['ours']['error']:.1e}",
            ),
        ]
        return Outcome(rows, sides={side: resident[side] | error[side] for side in resident})


def read(bench: Bench, what: str, job: Job) -> dict[str, dict[str, float]]:
    """A reading on both sides."""
    with bench.workers(PEER, "ours") as clients:
        return {
            client.side: client.ask("read", what=what, job=replace(job, side=client.side).to_dict())
            for client in clients
        }
