"""How the cost of a forward pass grows with tokens, loops and rows, and how far it is from a straight line."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.bench import Bench, Budget, Player
from benchmarks.job import Job
from benchmarks.results import Outcome, Row
from benchmarks.stats import Spread
from open_mythos.accounting import flops_per_token
from open_mythos.config import MythosConfig

POWERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Scaling:
    """Three sweeps of ours: tokens of one row, loops, rows."""

    name: str
    title: str
    job: Job
    protocol: str = (
        "Forward passes of ours without a cache. Tokens: 1 row of 64 to 4096, 8 loops; loops: 1 row of 256 tokens, 1 "
        "to 64; rows: 1 to 64 of 64 tokens, 8 loops. Sizes are called in turn. The line is fitted to the medians with "
        "least relative squares, against FLOPs, in which attention's quadratic part is counted; a deviation is the "
        "time over the line's, less one."
    )

    def sweeps(self) -> dict[str, dict[int, Job]]:
        """Jobs by size."""
        return {
            "tokens": {64 * n: replace(self.job, rows=1, tokens=64 * n) for n in POWERS},
            "loops": {n: replace(self.job, rows=1, tokens=256, n_loops=n) for n in POWERS},
            "rows": {n: replace(self.job, rows=n, tokens=64) for n in POWERS},
        }

    def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        with bench.workers("ours") as [ours]:
            for sweep, jobs in self.sweeps().items():
                players = []
                for size, job in jobs.items():
                    # One model for all: every token halts in the deepest loop of all, or in the call's last.
                    job = replace(job, side="ours", device=bench.settings.device, halt_at=max(POWERS))
                    ours.prepare(f"{sweep}{size}", job)
                    players.append(Player(str(size), ours, f"{sweep}{size}"))
                samples, _ = bench.interleave(players, Budget(30.0, 3, 7))
                times = [Spread.of(samples[str(size)][bench.settings.clock]) for size in jobs]
                work = [flops(job) for job in jobs.values()]
                fixed, per_flop = fit(work, [t.median for t in times])
                line = [fixed + per_flop * w for w in work]
                deviations = [t.median / expected - 1 for t, expected in zip(times, line, strict=True)]
                worst = max(deviations, key=abs)
                outcome.curves[sweep] = {
                    "sizes": list(jobs),
                    "flops": work,
                    "times": times,
                    "line": line,
                    "deviations": deviations,
                }
                outcome.rows.append(
                    Row(f"{self.name}.{sweep}", f"{self.title}: {sweep}, largest deviation", abs(worst), "share")
                )
        return outcome


def flops(job: Job) -> int:
    """Of a forward pass; a causal query sees (T + 1) / 2 keys in the mean."""
    each = flops_per_token(MythosConfig(**job.model), job.n_loops, (job.tokens + 1) // 2)
    return job.rows * job.tokens * each


def fit(work: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """(a, b) of the line a + b * work with the least sum of squared relative errors, a >= 0."""
    weights = [1 / t**2 for t in times]
    total = sum(weights)
    mean_w = sum(c * w for c, w in zip(weights, work, strict=True)) / total
    mean_t = sum(c * t for c, t in zip(weights, times, strict=True)) / total
    covariance = sum(c * (w - mean_w) * (t - mean_t) for c, w, t in zip(weights, work, times, strict=True))
    variance = sum(c * (w - mean_w) ** 2 for c, w in zip(weights, work, strict=True))
    slope = covariance / variance
    if (intercept := mean_t - slope * mean_w) >= 0:
        return intercept, slope
    products = sum(c * w * t for c, w, t in zip(weights, work, times, strict=True))
    return 0.0, products / sum(c * w * w for c, w in zip(weights, work, strict=True))
