"""What a user would run instead: models of transformers with as many FLOPs per token."""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.bench import FULL, Bench, Player
from benchmarks.cases.pair import ratio_row
from benchmarks.job import Job
from benchmarks.results import Outcome
from benchmarks.stats import Spread
from open_mythos.accounting import flops_per_token
from open_mythos.config import MythosConfig


@dataclass(frozen=True)
class Elsewhere:
    """Generating and prefill against one model of transformers."""

    name: str
    title: str
    model: dict[str, Any]
    """Of transformers."""
    job: Job
    """Ours."""
    protocol: str = (
        "Random weights, so there is no gate: ours is held against 0.5.0 in the cases generate_mid. Tokens per second "
        "of greedy `generate`, 64 prompt tokens and 32 new ones; prefill of 4 x 512 tokens into a cache, last "
        "position's logits. transformers runs with its defaults, which compile nothing. Self-spread: a second process "
        "of ours."
    )

    def run(self, bench: Bench) -> Outcome:
        device = bench.settings.device
        batches = {f"b{rows}": Job("ours", "generate", rows=rows, tokens=64, new_tokens=32) for rows in (1, 4)}
        tasks = {
            **batches,
            "prefill": Job("ours", "prefill", rows=4, tokens=512),
            **{f"{id}_compiled": replace(job, compiled=True) for id, job in batches.items()},
        }
        outcome = Outcome()
        with bench.workers("hf", "ours", "ours") as clients:
            for id, task in tasks.items():
                players = []
                for name, client in zip(("peer", "ours", "again"), clients, strict=True):
                    model = self.model if client.side == "hf" else self.job.model
                    job = replace(task, side=client.side, model=model, n_loops=self.job.n_loops, device=device)
                    if client.side == "hf":
                        job = replace(job, compiled=False)
                    outcome.sides.setdefault(client.side, client.prepare(id, job))
                    players.append(Player(name, client, id))
                samples, _ = bench.interleave(players, FULL)
                what = "prefill 4 x 512" if id == "prefill" else f"tokens/s, batch {task.rows}"
                title = f"{self.title}: {what}{', ours compiled' if task.compiled else ''}"
                row = ratio_row(f"{self.name}_{id}", title, bench, samples)
                if task.task == "generate":
                    tokens = task.rows * task.new_tokens
                    medians = (Spread.of(samples[side][bench.settings.clock]).median for side in ("peer", "ours"))
                    row.peer, row.ours = (f"{tokens / seconds:.1f} tok/s" for seconds in medians)
                outcome.rows.append(row)
        ours = flops_per_token(MythosConfig(**self.job.model), self.job.n_loops)
        theirs = outcome.sides["hf"]["flops_per_token"]
        outcome.sides["ours"]["flops_per_token"] = ours
        outcome.notes.append(f"FLOPs per token: {theirs / 1e6:.1f} M, ours {ours / 1e6:.1f} M.")
        return outcome
