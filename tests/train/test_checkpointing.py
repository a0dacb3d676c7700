"""`checkpoint_loops` against a run without: the same weights and metrics, bit for bit, and fewer activations kept."""

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos.nn.depth import LoopPlan
from open_mythos.nn.moe import MoEFFN
from open_mythos.tasks import Addition
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.losses import LossConfig
from open_mythos.train.optim import OptimConfig
from open_mythos.train.trainer import Metrics, Trainer
from tests.models import random_ids, scaled, tiny

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "uneven-depths": ({"halting": "none"}, {"loops": LoopsConfig("poisson", 3)}),
    "short-window": ({"halting": "none"}, {"loops": LoopsConfig("poisson", 3, backprop_depth=2)}),
    "act": ({"halting": "act", "act_threshold": 0.6}, {"losses": LossConfig(ponder=0.01, router_z=1e-3)}),
    "act-uneven": ({"halting": "act", "act_threshold": 0.6}, {"loops": LoopsConfig("poisson", 3)}),
    "per-loop": ({"halting": "none"}, {"losses": LossConfig(per_loop=True), "loops": LoopsConfig(per="batch")}),
    "noisy": ({"halting": "none", "dropout": 0.2, "initial_state": "normal"}, {}),
    "two-layers": ({"halting": "none", "recurrent_layers": 2}, {"losses": LossConfig(router_z=1e-3)}),
    "bfloat16": ({"halting": "none"}, {"dtype": "bfloat16"}),
}
"""Changes of the model and of the run."""


def train(cfg: TrainConfig, folder: Path) -> tuple[Trainer, list[Metrics]]:
    trainer = Trainer(cfg, folder, device="cpu", progress=False)
    assert trainer.model.recurrent is not None and trainer.model.recurrent.checkpoint_loops == cfg.checkpoint_loops
    return trainer, [trainer.train_step(step)[1] for step in range(3)]


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_same_bit_for_bit(tmp_path: Path, case: str, attn_type: str) -> None:
    """Also what the router counts: recomputation runs the experts a second time, which must not be counted."""
    model, run = CASES[case]
    cfg = TrainConfig(
        model=tiny(attn_type=attn_type, **model), data=Addition(1, 2), steps=3, batch_size=6,
        optim=OptimConfig(lr=1e-2), **run,
    )  # fmt: skip
    plain, metrics = train(cfg, tmp_path / "a")
    saving, same_metrics = train(dataclasses.replace(cfg, checkpoint_loops=True), tmp_path / "b")
    assert same_metrics == metrics
    weights = saving.model.state_dict()
    for name, x in plain.model.state_dict().items():
        assert torch.equal(weights[name], x), name


def test_what_is_recomputed_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output holds the router's statistics, and through them a way back to each loop; not to its recomputation."""
    made: list[weakref.ref[torch.Tensor]] = []
    statistics = MoEFFN._statistics

    def watched(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(weakref.ref((result := statistics(*args))[0]))
        return result

    monkeypatch.setattr(MoEFFN, "_statistics", watched)
    cfg = tiny(halting="none")
    model = scaled(cfg).train()
    assert model.recurrent is not None
    model.recurrent.checkpoint_loops = True
    out = model(random_ids(cfg, 2, 9), plan=LoopPlan((4, 4)))
    assert len(made) == 4
    made.clear()
    out.logits.sum().backward()
    assert len(made) == 4 and out.router_z_loss is not None
    assert not [z for z in made if z() is not None]
