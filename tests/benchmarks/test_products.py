"""The work that a share of the limit is taken of, against the package's own accounting."""

import pytest

from benchmarks import models
from benchmarks.case import Reach
from benchmarks.cases import CASES, reach_of
from benchmarks.job import Job
from benchmarks.products import decode_bytes, decode_flops, flops, forward_products, training_products, workload_of
from open_mythos.accounting import count_parameters, flops_per_token
from open_mythos.config import MythosConfig


@pytest.mark.parametrize("name", ["ADDITION", "SMALL_GQA", "SMALL_MLA", "MID", "ONE_B"])
def test_products_are_the_accounted_flops(name: str) -> None:
    cfg = MythosConfig(**getattr(models, name))
    rows, tokens, loops = 2, 64, 5
    products = forward_products(cfg, rows, tokens, loops)
    accounted = rows * tokens * flops_per_token(cfg, loops, (tokens + 1) // 2)
    # Norms, gates and halting are no products.
    assert flops(products) == pytest.approx(accounted, rel=0.01 if cfg.dim > 256 else 0.03)
    assert flops(training_products(products)) == 3 * flops(products)


def test_last_position_alone_has_a_head() -> None:
    cfg = MythosConfig(**models.MID)
    whole, last = (flops(forward_products(cfg, 2, 64, 8, last_only)) for last_only in (False, True))
    assert whole - last == 2 * 2 * 63 * cfg.vocab_size * cfg.dim
    forward = workload_of(Job("forward", models.MID, rows=2, tokens=64, n_loops=8))
    prefill = workload_of(Job("prefill", models.MID, rows=2, tokens=64, n_loops=8))
    assert forward.flops - prefill.flops == whole - last


def test_decoding_touches_each_row_s_experts() -> None:
    cfg = MythosConfig(**models.MID)
    one = decode_bytes(cfg, 1, 0, 8)
    assert one == 4 * (count_parameters(cfg).unrolled(8) + cfg.vocab_size * cfg.dim)
    four, many = decode_bytes(cfg, 4, 0, 8), decode_bytes(cfg, 10_000, 0, 8)
    assert one < four < one + 3 * 8 * 4 * count_parameters(cfg).chosen_experts
    assert many == pytest.approx(
        4 * (count_parameters(cfg).routed_experts - count_parameters(cfg).chosen_experts) * 8 + one
    )
    assert decode_flops(cfg, 1, 0, 8) == one / 2
    per_token = 4 * 12 * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    assert decode_bytes(cfg, 2, 100, 8) - decode_bytes(cfg, 2, 0, 8) == 200 * per_token


def test_time_of_the_limit() -> None:
    work = workload_of(Job("generate", models.MID, tokens=8, n_loops=2, new_tokens=3))
    assert work.bytes > 0
    at_one_rate = work.seconds([1e9] * len(work.shapes), 1e9)
    assert at_one_rate == pytest.approx((work.flops + work.bytes) / 1e9)
    assert work.seconds([2e9] * len(work.shapes), 2e9) == pytest.approx(at_one_rate / 2)


def test_models_are_the_published_ones() -> None:
    counts = {"ADDITION": 3_386_658, "MID": 39_187_906, "ONE_B": 1_064_028_034, "ONE_T": 999_326_352_386}
    assert {name: count_parameters(MythosConfig(**getattr(models, name))).total for name in counts} == counts
    assert flops_per_token(MythosConfig(**models.MID), 8) == pytest.approx(87.1e6, rel=1e-3)
    with pytest.raises(ValueError, match="injection='add' does not exist"):
        models.published(MythosConfig(injection="add"))


def test_the_bound_of_a_row_is_its_case_s() -> None:
    assert reach_of("train_mid") == Reach(1.4) and reach_of("train_mid_poisson.allowed") == Reach(0.9)
    assert reach_of("decode_llama_b4_compiled") == Reach(0.8) and reach_of("train_mid.checkout") is None
    assert reach_of("train_30m") is None and len({case.name for case in CASES.values()}) == len(CASES)
