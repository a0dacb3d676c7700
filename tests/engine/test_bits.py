"""In batch-invariant mode a request gets the same bits alone and beside others, from any chunks and reused pages."""

import dataclasses
import random

import pytest
import torch

from open_mythos.engine.engine import EngineConfig
from tests.engine.mixes import carry_out, random_load
from tests.models import CASES, PARTS, scaled, tiny

FAST, ALL = 52, 500
WIDE = {"dim": 160, "n_heads": 5, "n_kv_heads": 1, "expert_dim": 136, "kv_lora_rank": 112, "q_lora_rank": 128}
"""From 96 inputs on MKL has other kernels for few rows than for many; 5 heads, so that queries make odd rows."""


def check(seeds: range, dtype: torch.dtype, n_requests: int = 7, **sizes: int) -> dict[str, int]:
    seen = {"tokens": 0, "reused": 0, "preempted": 0}
    for seed in seeds:
        attn_type, part = CASES[seed % len(CASES)]
        if sizes and part in ("odd-experts", "odd-embedding"):
            continue
        if dtype is torch.float64 and part.startswith("odd-"):
            # MKL's float64 products of an odd number of inputs depend on where a row lies in memory.
            continue
        model = scaled(tiny(max_seq_len=256, attn_type=attn_type, **{**PARTS[part], **sizes}), seed=seed, dtype=dtype)
        load = random_load(random.Random(seed), model, n_requests)
        load.config = dataclasses.replace(load.config, batch_invariant=True)
        together = carry_out(model, load)
        for (_, prompt, params), request in zip(load.requests, together.requests, strict=True):
            mine = dataclasses.replace(load, requests=[(0, prompt, params)], cancelled={})
            mine.config = EngineConfig(max_rows=3, kv_tokens=300, prefix_reuse=False)
            alone = carry_out(model, mine)
            got, n = together.logits.get(request.id, []), len(request.token_ids)
            assert all(map(torch.equal, got, alone.logits[0])), (seed, request.id)
            assert len(got) == n and request.loops == alone.requests[0].loops[:n]
            assert request.finish_reason in ("abort", alone.requests[0].finish_reason)
            seen["tokens"] += len(got)
            seen["reused"] += request.n_cached
        seen["preempted"] += together.n_preempted
    print(seen)
    return seen


def test_bits_of_random_mixes() -> None:
    assert min(check(range(33, 52), torch.float32, n_requests=4).values()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_wide_models(dtype: torch.dtype) -> None:
    assert check(range(5, 34, 7), dtype, n_requests=9, **WIDE)["tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bits_of_all_random_mixes(dtype: torch.dtype) -> None:
    assert min(check(range(FAST, FAST + ALL), dtype).values()) > 0
