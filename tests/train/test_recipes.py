"""Every recipe builds, and what is published about a recipe is exact."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch

from open_mythos.cli import main
from open_mythos.model import OpenMythos
from open_mythos.recipes import DATA, RECIPES, load_recipe
from open_mythos.train.config import EvalConfig
from open_mythos.train.metrics import read_metrics
from open_mythos.train.trainer import Trainer

TRAINING = (Path(__file__).resolve().parents[2] / "docs/training.md").read_text("utf-8")


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not recipe().data.on_disk])
def test_recipe_takes_a_step(name: str, tmp_path: Path) -> None:
    cfg = dataclasses.replace(RECIPES[name](), steps=1, batch_size=2, eval=EvalConfig())
    Trainer(cfg, tmp_path, device="cpu", progress=False).run()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] > 0


def test_addition_dgx_is_the_published_experiment() -> None:
    cfg = load_recipe("addition-dgx")
    with torch.device("meta"):
        model = OpenMythos(cfg.model)
    assert sum(p.numel() for p in model.parameters()) == 3_386_658
    assert (cfg.steps, cfg.batch_size, cfg.dtype) == (30_000, 128, "float32")
    assert (cfg.data.min_digits, cfg.data.max_digits) == (2, 5)
    assert cfg.schedule.factor(30_000, 30_000) * cfg.optim.lr == pytest.approx(1e-5)
    assert list(cfg.loops.depths(0, 0, 3)) == [4, 4, 4]


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean tiny-text"):
        load_recipe("tinytext")
    with pytest.raises(ValueError, match="tiny-addition, addition-dgx"):
        load_recipe("x")


def test_data_that_is_not_there_is_named_with_the_commands_that_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, commands in DATA.items():
        assert main(["train", name, "--out", "run", "--device", "cpu"]) == 2
        assert commands in capsys.readouterr().err
        for line in commands.splitlines():
            assert line in inspect.getdoc(RECIPES[name]) and line in TRAINING
        assert commands.endswith(f"--out {load_recipe(name).data.paths[0]}")
    assert not list(tmp_path.iterdir())
