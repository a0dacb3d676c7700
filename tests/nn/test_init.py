"""Initial values against the table in nn/init.py, and that every parameter has one."""

import math

import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.nn.init import init_weights
from tests.models import ATTENTIONS, tiny


def expected_std(name: str, depth: int, dim: int) -> float:
    if name.endswith(("wo.weight", "ffn.down.weight", "shared.down.weight", "experts.down")):
        return 0.02 / math.sqrt(2 * depth)
    return math.sqrt(2 / (5 * dim)) if name.endswith("adapter.weight") else 0.02


EXACT = {
    "log_A": 0.0,
    "log_dt": 0.0,
    "injection.B": 0.1,
    "A_log": 0.0,
    "dt_bias": math.log(math.expm1(0.5 * math.log(5))),
    "scale.weight": 1.0,
    "lora.B": 0.0,
    "act.halt.weight": 0.0,
    "act.halt.bias": -math.log(7),
    "router_bias": 0.0,
}


@pytest.mark.parametrize("injection", ["lti", "diagonal", "concat", "add"])
@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_table(attn_type: str, injection: str) -> None:
    cfg = tiny(
        dim=64,
        vocab_size=211,
        attn_type=attn_type,
        injection=injection,
        max_loop_iters=8,
        recurrent_layers=2,
        coda_layers=2,
    )
    model = OpenMythos(cfg)
    # Whatever stood in the memory before: init_weights sets every parameter and buffer.
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            x.fill_(math.nan)
        init_weights(model, cfg)
    depth = 1 + 2 * 8 + 2
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if injection == "diagonal" and name.endswith("injection.B"):
            assert torch.equal(x, torch.eye(64))
            continue
        exact = next((value for end, value in EXACT.items() if name.endswith(end)), 1.0 if "norm" in name else None)
        if exact is not None:
            assert torch.allclose(x, torch.full_like(x, exact), rtol=1e-6, atol=0), name
            continue
        std = expected_std(name, depth, 64)
        # Five standard errors of a standard deviation and of a mean.
        assert abs(x.std().item() / std - 1) < 5 / math.sqrt(2 * x.numel()), name
        assert abs(x.mean().item()) < 5 * std / math.sqrt(x.numel()), name


def test_seed_decides() -> None:
    cfg = tiny()
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(OpenMythos(cfg).embed.weight)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_the_head_is_the_embedding() -> None:
    for model in (OpenMythos(tiny()), OpenMythos(tiny()).to(torch.bfloat16), OpenMythos(tiny()).double()):
        assert model.head.weight is model.embed.weight
    with torch.device("meta"):
        model = OpenMythos(tiny())
    assert model.head.weight is model.embed.weight and all(p.is_meta for p in model.parameters())
