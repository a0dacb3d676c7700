"""bf16, float64 and autocast: nothing crashes, precision is what the dtype can give, delicate parts stay wide."""

import math

import pytest
import torch
import torch.nn.functional as F

from open_mythos import LoopPlan, OpenMythos
from tests.models import ATTENTIONS, CASES, PARTS, RULES, THRESHOLDS, random_ids, scaled, tiny, worst

HALF_TOLERANCE = 0.1
"""Of the logits' scale: bf16 keeps 8 bits, and the loop feeds each rounding back."""

WAYS = ("bfloat16", "float64", "autocast")
WAY_CASES = [
    # Each part in one way, one part in every way; all pairs in the slow tier.
    pytest.param(*case, way, marks=() if case[1] == "default" or (i + j) % len(WAYS) == 0 else pytest.mark.slow)
    for i, case in enumerate(CASES)
    for j, way in enumerate(WAYS)
]


def use_everything(model: OpenMythos, ids: torch.Tensor) -> torch.Tensor:
    """Forward, trace, every rule, cache, padding, generation, training backward. Returns the logits of the first."""
    with torch.no_grad():
        logits = model(ids, 3)
        for exit in RULES:
            trace = model(ids, 5, exit=exit, exit_threshold=THRESHOLDS.get(exit or ""), trace=True)
            assert torch.isfinite(trace.logits).all() and torch.isfinite(trace.hidden).all()
            assert (trace.halt_weight.sum(0) - 1).abs().max() < 1e-6
            cache = model.make_cache(2, 7, 5)
            for chunk in ids.split([4, 1, 2], 1):
                cached = model(chunk, cache=cache, exit=exit, exit_threshold=THRESHOLDS.get(exit or ""))
                assert torch.isfinite(cached).all()
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        assert torch.isfinite(model(ids, 3, attention_mask=mask)).all()
    assert model.generate(ids, max_new_tokens=3, n_loops=2).shape == (2, 10)
    for checkpointing in (False, True):
        model.recurrent.checkpoint_loops = checkpointing
        out = model.train()(ids, plan=LoopPlan((2, 3)))
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        for extra in (out.ponder_cost, out.router_z_loss):
            loss = loss if extra is None else loss + 0.01 * extra
        model.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.dtype == p.dtype and torch.isfinite(p.grad).all(), name
    model.eval()
    return logits


@pytest.mark.parametrize(("attn_type", "part", "way"), WAY_CASES)
def test_every_part_runs(attn_type: str, part: str, way: str) -> None:
    cfg = tiny(attn_type=attn_type, **PARTS[part])
    single, ids = scaled(cfg), random_ids(cfg, 2, 7)
    with torch.no_grad():
        expected = single(ids, 3)
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            logits = use_everything(single, ids)
    else:
        dtype = getattr(torch, way)
        model = scaled(cfg).to(dtype)
        logits = use_everything(model, ids)
        assert logits.dtype == dtype
    if way == "float64":
        # Rounding of float32, and nothing that float64 would not also have computed.
        assert worst(expected, logits) < 1e-4
        assert worst(expected, logits) > 1e-9, "the float64 model has to be more precise than the float32 one"
    elif cfg.n_experts == 0 and cfg.halting == "none":
        assert worst(logits, expected) < HALF_TOLERANCE


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_bf16_is_as_near_as_bf16_can_be(attn_type: str) -> None:
    """Without discrete decisions that rounding may flip: in bf16 and under autocast."""
    cfg = tiny(attn_type=attn_type, n_experts=0, halting="none")
    model, ids = scaled(cfg), random_ids(cfg, 2, 7)
    expected = model(ids, 4)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(ids, 4)
    for logits in (under_autocast, model.to(torch.bfloat16)(ids, 4)):
        assert worst(logits, expected) < HALF_TOLERANCE


def test_there_and_back() -> None:
    """A cast to bf16 rounds the parameters and nothing else; the balancing bias is not rounded at all."""
    cfg = tiny(recurrent_layers=2)
    model, ids = scaled(cfg), random_ids(cfg, 1, 7)
    biases = [block.ffn.router_bias.clone() for block in model.recurrent.blocks]
    rounded = {name: p.bfloat16().float() for name, p in model.named_parameters()}
    model = model.to(torch.bfloat16).to(torch.float32)
    for block, bias in zip(model.recurrent.blocks, biases, strict=True):
        assert block.ffn.router_bias.dtype == torch.float32 and torch.equal(block.ffn.router_bias, bias)
    fresh = scaled(cfg)
    with torch.no_grad():
        for name, p in fresh.named_parameters():
            p.copy_(rounded[name])
        assert torch.equal(model(ids), fresh(ids))


def test_delicate_parts_stay_wide() -> None:
    model = scaled(tiny()).to(torch.bfloat16)
    ids = random_ids(model.cfg, 1, 5)
    assert model.recurrent.injection.get_A().dtype == torch.float32
    assert model.recurrent.act(torch.zeros(1, 1, 32, dtype=torch.bfloat16)).dtype == torch.float32
    trace = model(ids, trace=True)
    assert trace.halt_weight.dtype == torch.float32 and trace.hidden.dtype == torch.bfloat16
    out = model.train()(ids, plan=LoopPlan((3,)))
    assert out.ponder_cost.dtype == out.router_z_loss.dtype == torch.float32
    cos, _, _ = model.make_view((1, 5)).rope
    assert cos.dtype == torch.float32
    double = model.double()
    assert double.recurrent.injection.get_A().dtype == torch.float64
    assert double(ids, trace=True).halt_weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halting_sums_do_not_stall(dtype: torch.dtype) -> None:
    """Sums of p = 0.001 in bf16 stall at 0.5; here a token still reaches the threshold after 990 loops."""
    cfg = tiny(dim=16, n_experts=0, lora_rank=0, prelude_layers=0, coda_layers=0)
    model = scaled(cfg, dtype=dtype)
    with torch.no_grad():
        model.recurrent.act.halt.weight.zero_()
        model.recurrent.act.halt.bias.fill_(math.log(0.001 / 0.999))
        trace = model(torch.zeros(1, 1, dtype=torch.int64), 1200, trace=True)
    assert 960 < int(trace.exit_loop) < 1020
