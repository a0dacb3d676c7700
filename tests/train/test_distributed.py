"""Several processes against one: the same numbers, whatever is spread over them and how."""

from pathlib import Path

import pytest
import torch

from open_mythos.model import OpenMythos
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.distributed import ParallelConfig
from open_mythos.train.loops import LoopsConfig
from open_mythos.train.losses import LossConfig
from open_mythos.train.metrics import read_metrics
from open_mythos.train.optim import OptimConfig
from open_mythos.train.tasks import Addition
from open_mythos.train.trainer import Trainer
from tests.models import tiny
from tests.train.ranks import run_ranks

SPREADS = {
    "in parts": (1, ParallelConfig(rows=3)),
    "one fsdp": (1, ParallelConfig("fsdp")),
    "ddp": (2, ParallelConfig()),
    "ddp in parts": (2, ParallelConfig(rows=3)),
    "fsdp": (2, ParallelConfig("fsdp")),
    "experts": (2, ParallelConfig("fsdp", experts=2)),
    "experts in parts": (2, ParallelConfig("fsdp", experts=2, rows=3)),
    "experts twice": (4, ParallelConfig("fsdp", experts=2)),
}
MODELS = {
    "poisson": {"halting": "none"},
    "act": {"halting": "act"},
    "two layers": {"recurrent_layers": 2, "halting": "none", "injection": "diagonal", "attn_type": "mla"},
    "bare": {"prelude_layers": 0, "coda_layers": 0, "halting": "none", "lora_rank": 0, "initial_state": "zero"},
}


def config(model: str = "poisson", parallel: ParallelConfig | None = None, **changes: object) -> TrainConfig:
    act = model == "act"
    values = {
        # Odd widths, so that rows do not divide evenly.
        "model": tiny(dim=40, **MODELS[model]), "data": Addition(1, 2), "steps": 20, "batch_size": 8, "log_every": 1,
        "dtype": "float64", "optim": OptimConfig("muon", lr=3e-3, muon_lr=3e-3),
        "loops": LoopsConfig("poisson", 3, max_loops=6, backprop_depth=None if act else 3),
        "losses": LossConfig(router_z=1e-3, ponder=1e-2 if act else 0.0), "expert_bias_rate": 1e-3,
        "parallel": parallel or ParallelConfig(), "eval": EvalConfig(every=7, rows=5, loops=(1, 4)),
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def train(folder: str, cfg: TrainConfig, **options: object) -> None:
    Trainer(cfg, folder, device="cpu", threads=1, progress=False, **options).run()


def numbers(folder: Path) -> list[dict[str, float]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def assert_close(got: Path, expected: Path, tolerance: float) -> None:
    for a, b in zip(numbers(got), numbers(expected), strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=1e-12)
    a, b = (OpenMythos.from_pretrained(folder / "final").state_dict() for folder in (got, expected))
    for name, x in b.items():
        torch.testing.assert_close(a[name], x, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("model", "spread"),
    [
        pytest.param(model, spread, marks=[] if fast else pytest.mark.slow)
        for model in MODELS
        for spread in SPREADS
        for fast in [(model, spread) in {("poisson", "ddp"), ("act", "experts in parts"), ("two layers", "fsdp")}]
    ],
)
def test_equal_to_one_process(tmp_path: Path, model: str, spread: str) -> None:
    size, parallel = SPREADS[spread]
    train(str(tmp_path / "one"), config(model))
    run_ranks(size, train, str(tmp_path / "many"), config(model, parallel))
    assert_close(tmp_path / "many", tmp_path / "one", 1e-8 if "fsdp" in parallel.kind else 1e-9)


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_first_step_in_float32(tmp_path: Path, spread: str) -> None:
    size, parallel = SPREADS[spread]
    train(str(tmp_path / "one"), config(dtype="float32", steps=1))
    run_ranks(size, train, str(tmp_path / "many"), config("poisson", parallel, dtype="float32", steps=1))
    # Muon and AdamW both; the latter's first update is the gradient over itself, where next to nothing is left of it
    # up to 4e-6 of a weight.
    assert_close(tmp_path / "many", tmp_path / "one", 1e-6)
