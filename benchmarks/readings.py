"""Figures that are no times: bytes and errors, read off one side. Each takes the side's module and a job."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.job import Job

Reading = Callable[[Any, Job], dict[str, float]]


def cache_bytes(module: Any, job: Job) -> dict[str, float]:
    """Bytes that a cache holds after a prompt of `tokens` and `new_tokens` decoded ones, unused room included."""
    side = module.make(job)
    total = job.tokens + job.new_tokens
    cache = side.new_cache(job.rows, total, job.n_loops)
    ids = torch.zeros(job.rows, total, dtype=torch.int64, device=job.device)
    with torch.no_grad():
        side.feed(ids[:, : job.tokens], cache, 0, job.n_loops)
        for position in range(job.tokens, total):
            side.feed(ids[:, position : position + 1], cache, position, job.n_loops)
    # Storages, not tensors: a view keeps the whole of what it is a part of.
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in side.cache_tensors(cache)}
    return {"bytes": sum(storages.values()), "bytes_per_token": sum(storages.values()) / (job.rows * total)}


def rope_bytes(module: Any, job: Job) -> dict[str, float]:
    """Bytes of parameters and buffers that `max_seq_len` is to blame for: the model's against one of 1 token."""

    def total(max_seq_len: int) -> int:
        with torch.device("meta"):
            model = module.construct({**job.model, "max_seq_len": max_seq_len})
        return sum(x.nbytes for x in [*model.parameters(), *model.buffers()])

    longest = job.model["max_seq_len"]
    return {"bytes": (total(longest) - total(1)) * longest / (longest - 1)}


def rope_error(module: Any, job: Job) -> dict[str, float]:
    """Largest error of a cosine or sine at the positions before `max_seq_len`, against float64."""
    dim, theta = job.model["qk_rope_head_dim"], job.model["rope_theta"]
    positions = torch.arange(job.model["max_seq_len"])
    cos, sin = module.rope(positions, dim, theta)
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    worst = 0.0
    # In parts: the float64 angles of all positions take gigabytes.
    for at in positions.split(2**17):
        angle = at.double()[:, None] * frequency
        worst = max(worst, (cos[at] - angle.cos()).abs().max().item(), (sin[at] - angle.sin()).abs().max().item())
    return {"error": worst}


READINGS: dict[str, Reading] = {"cache_bytes": cache_bytes, "rope_bytes": rope_bytes, "rope_error": rope_error}
