"""dtype="auto": chosen by speed, recorded, the same for all processes, and the same when a run goes on."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.tasks import Addition
from open_mythos.train import dtypes
from open_mythos.train.checkpoint import CheckpointConfig
from open_mythos.train.config import LossConfig, OptimConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.distributed import World
from open_mythos.train.muon import orthogonalize
from open_mythos.train.optim import build_optimizers
from open_mythos.train.trainer import Trainer
from tests.models import tiny
from tests.train.ranks import run_ranks

FAST, SLOW = (2.0, 3.0), (0.5, 0.4)
"""Gains of a step and of Muon."""


def config(**changes: object) -> TrainConfig:
    values = {
        "model": tiny(halting="none"), "data": Addition(1, 2), "steps": 4, "batch_size": 4, "dtype": "auto",
        "optim": OptimConfig("muon", lr=1e-2), "loops": LoopsConfig("poisson", 2, max_loops=3),
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def trainer(folder: Path | str, cfg: TrainConfig, **options: object) -> Trainer:
    return Trainer(cfg, folder, device="cpu", threads=1, checkpoint=CheckpointConfig(2), **options)


def gains(monkeypatch: pytest.MonkeyPatch, found: tuple[float, float]) -> None:
    monkeypatch.setattr(dtypes, "measured_gains", lambda *_: found)


def chosen(cfg: TrainConfig) -> tuple[str, str | None]:
    return cfg.dtype, cfg.optim.muon_dtype


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (FAST, ("bfloat16", "bfloat16")),
        (SLOW, ("float32", "float32")),
        ((0.8, 4.0), ("float32", "bfloat16")),
        ((1.05, 1.05), ("float32", "float32")),
    ],
)
def test_the_faster_dtypes_are_chosen_said_and_recorded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    found: tuple[float, float],
    expected: tuple[str, str],
) -> None:
    gains(monkeypatch, found)
    run = trainer(tmp_path / "run", config())
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "dtype auto" in line]
    assert f"steps in {expected[0]}" in line and f"Muon in {expected[1]}" in line and "--dtype float32" in line
    run.run()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    for cfg in (run.cfg, TrainConfig.load(tmp_path / "run/config.yaml"), TrainConfig.load(checkpoint / "config.yaml")):
        assert chosen(cfg) == expected


@pytest.mark.parametrize("lost", [[], ["config.yaml"]])
def test_a_run_goes_on_in_its_dtypes_on_a_machine_that_would_choose_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: list[str]
) -> None:
    gains(monkeypatch, FAST)
    trainer(tmp_path / "whole", config()).run()
    trainer(tmp_path / "run", config(steps=2)).run()
    for name in lost:
        (tmp_path / "run" / name).unlink()
    gains(monkeypatch, SLOW)
    longer = dataclasses.replace(config(), steps=4)
    with pytest.warns(UserWarning, match="goes on to 4"):
        run = trainer(tmp_path / "run", longer, resume=True)
    assert chosen(run.cfg) == ("bfloat16", "bfloat16") and run.steps_done == 2
    run.run()
    assert chosen(TrainConfig.load(tmp_path / "run/config.yaml")) == ("bfloat16", "bfloat16")
    with pytest.raises(ValueError, match="dtype: 'bfloat16' in the run, 'float32' now"):
        trainer(tmp_path / "run", config(dtype="float32"), resume=True)


def test_a_run_without_muon_names_no_dtype_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gains(monkeypatch, FAST)
    assert chosen(trainer(tmp_path / "run", config(optim=OptimConfig("adamw"))).cfg) == ("bfloat16", None)


def test_float32_by_choice_is_float32_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gains(monkeypatch, SLOW)
    auto, named = (trainer(tmp_path / name, config(dtype=name)) for name in ("auto", "float32"))
    assert chosen(named.cfg) == ("float32", None)
    assert (auto.run() / "model.safetensors").read_bytes() == (named.run() / "model.safetensors").read_bytes()


def train_as_rank(folder: str) -> None:
    """Let every rank measure something else."""
    dtypes.measured_gains = lambda cfg, n_rows: FAST if torch.distributed.get_rank() == 0 else SLOW
    run = trainer(folder, config(), progress=False)
    assert chosen(run.cfg) == ("bfloat16", "bfloat16")
    run.run()


def test_ranks_agree(tmp_path: Path) -> None:
    run_ranks(2, train_as_rank, str(tmp_path / "run"))
    assert chosen(TrainConfig.load(tmp_path / "run/config.yaml")) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("losses", [LossConfig(), LossConfig(per_loop=True)])
def test_a_real_step_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: LossConfig) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dtypes.routes, "bfloat16_gain", lambda *_: 2.0)
    cfg = config(losses=losses, loops=LoopsConfig("fixed", 2, per="batch"))
    found = dtypes.measured_gains(cfg, 4)
    assert all(0 < gain < math.inf for gain in found) and len(list(tmp_path.rglob("*.json"))) == 2
    assert dtypes.measured_gains(cfg, 4) == found
    # Without fast products no step is tried: on a processor without bfloat16 it could take minutes.
    monkeypatch.setattr(dtypes.routes, "bfloat16_gain", lambda *_: 0.01)
    monkeypatch.setattr(dtypes, "_step_gain", None)
    assert dtypes.measured_gains(cfg, 4)[0] == 0.01


@pytest.mark.parametrize("has_units", [True, False])
def test_a_gpu_decides_by_what_it_has(monkeypatch: pytest.MonkeyPatch, has_units: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_units)
    world = World(torch.device("cpu"), config().parallel)
    cfg = dtypes.settled(config(), torch.device("cuda"), world, print)
    assert chosen(cfg) == ("bfloat16" if has_units else "float32", None)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype='bfloat32' must be one of"):
        config(dtype="bfloat32")
    with pytest.raises(ValueError, match="muon_dtype='float16' must be one of"):
        OptimConfig("muon", muon_dtype="float16")


@pytest.mark.parametrize(
    ("dtype", "named", "expected"),
    [("float32", None, "float32"), ("bfloat16", None, "bfloat16"), ("bfloat16", "float32", "float32")],
)
def test_muons_dtype_follows_the_runs(dtype: str, named: str | None, expected: str) -> None:
    model = OpenMythos(tiny())
    muon = build_optimizers(model, OptimConfig("muon", muon_dtype=named), dtype)[1]
    assert muon.dtype is getattr(torch, expected)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 170, 128), (2, 128, 352)])
def test_muon_in_bfloat16_is_as_orthogonal(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, half = orthogonalize(x), orthogonalize(x, torch.bfloat16)
    assert half.dtype is torch.float32 and not torch.equal(half, exact)
    assert (half - exact).norm() < 0.02 * exact.norm()
    off = [(torch.linalg.svdvals(y) - 1).square().mean().sqrt() for y in (exact, half)]
    assert off[1] < 1.02 * off[0]


def test_recipes_of_text_leave_the_dtype_open_and_others_do_not() -> None:
    open_ones = {"tiny-text", "small-text", "chat"}
    assert {
        name for name in ("tiny-khop", "tiny-addition", *open_ones) if load_recipe(name).dtype == "auto"
    } == open_ones
