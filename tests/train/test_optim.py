"""Which group a parameter goes to, for every kind of module; and AdamW against torch's own loop."""

import copy

import pytest
import torch

from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import LoopPlan
from open_mythos.train.muon import Muon
from open_mythos.train.optim import OptimConfig, build_optimizers, is_hidden_matrix, set_lr


def tiny(**changes) -> MythosConfig:
    fields = {
        "vocab_size": 16, "dim": 16, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 16, "max_loop_iters": 2,
        "prelude_layers": 1, "coda_layers": 1, "attn_type": "gqa", "n_experts": 4, "n_shared_experts": 1,
        "n_experts_per_tok": 2, "expert_dim": 8, "lora_rank": 2, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    }  # fmt: skip
    return MythosConfig(**(fields | changes))


MODELS = {
    "defaults": tiny(),
    "mla": tiny(attn_type="mla"),
    "diagonal": tiny(injection="diagonal", halting="none", prelude_norm=True, qk_norm=True),
    "concat": tiny(injection="concat", recurrent_layers=2, block_norm="sandwich"),
    "plain": tiny(recurrent_layers=0, n_experts=0, lora_rank=0),
}


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(cfg: MythosConfig, kind: str) -> None:
    model = OpenMythos(cfg)
    groups = [g for o in build_optimizers(model, OptimConfig(kind)) for g in o.param_groups]
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_hidden_matrices() -> None:
    model = OpenMythos(MODELS["defaults"])
    hidden = {name for name, p in model.named_parameters() if is_hidden_matrix(name, p)}
    assert {"recurrent.block.ffn.experts.gate_up", "recurrent.block.ffn.experts.down"} <= hidden
    assert not [name for name in hidden if name.startswith(("embed", "head", "recurrent.lora", "recurrent.act"))]
    assert not [name for name in hidden if "norm" in name or "router" in name or "injection" in name]
    blocks = ("prelude.", "recurrent.block.", "coda.")
    weights = {name for name, p in model.named_parameters() if name.startswith(blocks) and p.ndim > 1}
    assert weights - hidden == {"recurrent.block.ffn.router.weight"}
    diagonal = OpenMythos(MODELS["diagonal"])
    assert not is_hidden_matrix("recurrent.injection.B", diagonal.get_parameter("recurrent.injection.B"))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_spares_what_is_no_hidden_matrix(kind: str) -> None:
    model = OpenMythos(MODELS["defaults"])
    for p in model.parameters():
        p.data.add_(1.0)
        p.grad = torch.zeros_like(p)
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizers = build_optimizers(model, OptimConfig(kind, lr=0.5, muon_lr=0.5, weight_decay=0.1))
    for optimizer in optimizers:
        optimizer.step()
    for name, p in model.named_parameters():
        shrink = 1 - 0.5 * 0.1 if is_hidden_matrix(name, p) else 1
        torch.testing.assert_close(p.data, shrink * before[name].data, msg=name)


def test_decay_all_is_plain_adamw() -> None:
    ours, theirs = OpenMythos(MODELS["defaults"]), OpenMythos(MODELS["defaults"])
    theirs.load_state_dict(ours.state_dict())
    (optimizer,) = build_optimizers(ours, OptimConfig("adamw", lr=1e-2, weight_decay=0.1, decay="all"))
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    ids = torch.arange(16)[None]
    for _ in range(3):
        for model, step in ((ours, optimizer), (theirs, reference)):
            model.train()
            step.zero_grad()
            model(ids, plan=LoopPlan((2,))).logits.square().mean().backward()
            step.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def test_set_lr_scales_every_peak() -> None:
    optimizers = build_optimizers(OpenMythos(MODELS["defaults"]), OptimConfig("muon", lr=0.2, muon_lr=0.4))
    for factor in (0.5, 0.25):
        set_lr(optimizers, factor)
        assert {g["lr"] for o in optimizers for g in o.param_groups} == {0.2 * factor, 0.4 * factor}
    assert isinstance(optimizers[1], Muon)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"kind": "sgd"}, "optim.kind='sgd'"),
        ({"lr": 0}, "optim.lr=0"),
        ({"lr": float("nan")}, "optim.lr=nan"),
        ({"betas": (0.9,)}, "optim.betas"),
        ({"betas": 0.9}, "optim.betas"),
        ({"betas": (0.9, 1.0)}, r"optim.betas\[1\]=1.0"),
        ({"eps": 0.0}, "optim.eps=0"),
        ({"weight_decay": -0.1}, "optim.weight_decay=-0.1"),
        ({"decay": "some"}, "optim.decay='some'"),
        ({"muon_lr": -1.0}, "optim.muon_lr=-1"),
        ({"momentum": 1.1}, "optim.momentum=1.1"),
        ({"adjust_lr": "none"}, "optim.adjust_lr='none'"),
        ({"clip_norm": 0.0}, "optim.clip_norm=0"),
    ],
)
def test_refuses(kwargs: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        OptimConfig(**kwargs)
