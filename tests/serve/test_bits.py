"""In batch-invariant mode a request gets the same bits alone and beside others, from any chunks and reused pages."""

import dataclasses
import random

import pytest
import torch

from open_mythos.serve import engine as engine_module
from open_mythos.serve.engine import EngineConfig
from tests.models import CASES, PARTS, scaled, tiny
from tests.serve.mixes import carry_out, random_load

FAST, ALL = 50, 500


def check(seeds: range, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    monkeypatch.setattr(engine_module, "computes_alone", lambda runner: True)
    seen = {"tokens": 0, "reused": 0, "preempted": 0}
    for seed in seeds:
        attn_type, part = CASES[seed % len(CASES)]
        if dtype is torch.float64 and part == "odd-experts":
            # MKL's float64 products of odd widths depend on where a row lies in memory.
            continue
        model = scaled(tiny(max_seq_len=256, attn_type=attn_type, **PARTS[part]), seed=seed, dtype=dtype)
        load = random_load(random.Random(seed), model)
        load.config = dataclasses.replace(load.config, batch_invariant=True)
        together = carry_out(model, load)
        for (_, prompt, params), request in zip(load.requests, together.requests, strict=True):
            mine = dataclasses.replace(load, requests=[(0, prompt, params)], cancelled={})
            mine.config = EngineConfig(max_rows=3, kv_tokens=300, prefix_reuse=False)
            expected = carry_out(model, mine).logits[0]
            got = together.logits.get(request.id, [])
            assert all(map(torch.equal, got, expected)), (seed, request.id)
            seen["tokens"] += len(got)
            seen["reused"] += request.n_cached
        seen["preempted"] += together.n_preempted
    print(seen)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_of_random_mixes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(check(range(FAST // 2), dtype, monkeypatch).values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bits_of_all_random_mixes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(check(range(FAST, FAST + ALL), dtype, monkeypatch).values()) > 0
