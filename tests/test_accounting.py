"""The formulas of `accounting` against built models, for every variant and every option that changes a count."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from open_mythos import VARIANTS, MythosConfig, OpenMythos
from open_mythos.accounting import count_parameters, flops_per_token, kv_bytes_per_token
from open_mythos.variants import PARAMETERS

SMALL = MythosConfig(
    vocab_size=50, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=16, max_loop_iters=3, prelude_layers=1, coda_layers=1,
    attn_type="gqa", kv_lora_rank=8, q_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=10, n_experts=4,
    n_shared_experts=1, n_experts_per_tok=2, expert_dim=24, lora_rank=3,
)  # fmt: skip
OPTIONS = [
    {},
    {"attn_type": "mla"},
    {"injection": "diagonal", "prelude_norm": True, "halting": "none", "lora_rank": 0},
    {"injection": "concat", "block_norm": "sandwich", "qk_norm": True},
    {"injection": "add", "recurrent_layers": 2, "n_experts": 0},
    {"recurrent_layers": 0, "n_shared_experts": 0},
    {"recurrent_layers": 2, "prelude_layers": 0, "coda_layers": 0, "n_shared_experts": 0},
]


def built_parameters(cfg: MythosConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in OpenMythos(cfg).parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_counted_exactly(name: str) -> None:
    cfg = VARIANTS[name]()
    assert count_parameters(cfg).total == built_parameters(cfg) == PARAMETERS[name]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_is_counted_exactly(options: dict) -> None:
    cfg = dataclasses.replace(SMALL, **options)
    assert count_parameters(cfg).total == built_parameters(cfg)


@pytest.mark.parametrize(
    ("name", "active_millions", "share"), [("1b", 244, 0.229), ("10b", 1269, 0.127), ("50b", 4992, 0.099)]
)
def test_the_active_share_is_the_one_worked_out_by_hand(name: str, active_millions: int, share: float) -> None:
    parameters = count_parameters(VARIANTS[name]())
    assert parameters.active / 1e6 == pytest.approx(active_millions, abs=1)
    assert parameters.active_share == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("n_loops", [1, 3])
@pytest.mark.parametrize("injection", ["lti", "diagonal", "concat"])
def test_flops_match_the_counted_matrix_products(attn_type: str, n_loops: int, injection: str) -> None:
    """Dense feed-forward, because torch counts no grouped products; the formula treats experts like any weight."""
    cfg = dataclasses.replace(
        SMALL, attn_type=attn_type, n_experts=0, dim=512, vocab_size=300, max_seq_len=64, lora_rank=0,
        injection=injection,
    )  # fmt: skip
    model = OpenMythos(cfg).eval()
    T = 16
    # The plain backend, because torch does not count the fused one of a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.long), n_loops=n_loops)
    # The causal square is counted whole by torch, so every token meets T keys.
    assert counter.get_total_flops() / T == pytest.approx(flops_per_token(cfg, n_loops, T), rel=0.01)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_kv_bytes_are_those_of_the_cache(attn_type: str) -> None:
    cfg = dataclasses.replace(SMALL, attn_type=attn_type)
    cache = OpenMythos(cfg).make_cache(2, 16, n_loops=5)
    assert cache.nbytes == 2 * 16 * kv_bytes_per_token(cfg, 5, bytes_per_value=4)
