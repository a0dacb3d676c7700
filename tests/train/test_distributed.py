"""Several processes against one: the same numbers, whatever is spread over them and how."""

import dataclasses
import resource
from pathlib import Path

import pytest
import torch

from open_mythos.accounting import count_parameters
from open_mythos.model import OpenMythos
from open_mythos.tasks import Addition
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.distributed import ParallelConfig, World
from open_mythos.train.losses import LossConfig
from open_mythos.train.metrics import read_metrics
from open_mythos.train.optim import OptimConfig
from open_mythos.train.sharding import ShardedModel
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


def assert_close(got: Path, expected: Path) -> None:
    worst = 0.0
    for a, b in zip(numbers(got), numbers(expected), strict=True):
        assert a.keys() == b.keys()
        worst = max(worst, *(abs(a[name] - b[name]) / max(abs(b[name]), 1e-3) for name in b))
    assert worst < 1e-9
    a, b = (OpenMythos.from_pretrained(folder / "final").state_dict() for folder in (got, expected))
    # Muon makes much of directions in which there is next to no gradient, and so of rounding.
    far = max((a[name] - x).abs().max().item() for name, x in b.items())
    assert far < 1e-7
    print(f"log {worst:.1e}, weights {far:.1e}")  # with -s: the figures of docs/results


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
    assert_close(tmp_path / "many", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["fsdp", "experts", "experts twice"])
@pytest.mark.parametrize("changes", [{"checkpoint_loops": True}, {"optim": OptimConfig("adamw", lr=3e-3)}], ids=str)
def test_equal_to_one_process_also(tmp_path: Path, spread: str, changes: dict) -> None:
    size, parallel = SPREADS[spread]
    train(str(tmp_path / "one"), config("act", **changes))
    run_ranks(size, train, str(tmp_path / "many"), config("act", parallel, **changes))
    assert_close(tmp_path / "many", tmp_path / "one")


@pytest.mark.parametrize("spread", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_first_step_in_float32(tmp_path: Path, spread: str) -> None:
    size, parallel = SPREADS[spread]
    train(str(tmp_path / "one"), config(dtype="float32", steps=1))
    run_ranks(size, train, str(tmp_path / "many"), config(dtype="float32", steps=1, parallel=parallel))
    one, many = (numbers(tmp_path / name)[0]["train/loss"] for name in ("one", "many"))
    assert many == pytest.approx(one, rel=1e-6)


def build(folder: str, cfg: TrainConfig) -> None:
    """Write how many bytes of memory it takes to make this process's part of the model."""
    world = World(torch.device("cpu"), cfg.parallel)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sharded = ShardedModel(cfg, world, torch.device("cpu"))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    (Path(folder) / f"{cfg.parallel.kind}{world.rank}").write_text(str(grown * 1024))
    assert sum(p.numel() for p in sharded.model.parameters()) == count_parameters(cfg.model).total


@pytest.mark.slow
def test_a_process_never_holds_the_whole_model(tmp_path: Path) -> None:
    """Of 4 bytes a parameter each of two processes needs half, and room for libraries and what it draws at once."""
    model = tiny(dim=512, vocab_size=400_000, n_experts=16, expert_dim=2048, prelude_layers=0, coda_layers=0)
    cfg = config(model="poisson", dtype="float32")
    cfg = dataclasses.replace(cfg, model=model, losses=LossConfig(), loops=LoopsConfig())
    run_ranks(1, build, str(tmp_path), cfg)
    run_ranks(2, build, str(tmp_path), dataclasses.replace(cfg, parallel=ParallelConfig("fsdp")))
    whole = 4 * count_parameters(model).total
    one, *many = (int((tmp_path / name).read_text()) for name in ("ddp0", "fsdp0", "fsdp1"))
    assert one > 0.95 * whole
    assert max(many) < 0.75 * whole
