"""Every recipe builds, those of a size for it train, and what is published about a recipe is exact."""

import dataclasses
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from open_mythos.accounting import count_parameters
from open_mythos.cli import main
from open_mythos.data.documents import Reading
from open_mythos.data.prepare import Settings, prepare
from open_mythos.model import OpenMythos
from open_mythos.recipes import DATA, RECIPES, load_recipe
from open_mythos.tasks import Shards
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.distributed import ParallelConfig
from open_mythos.train.metrics import read_metrics
from open_mythos.train.optim import OptimConfig
from open_mythos.train.trainer import Trainer
from open_mythos.variants import VARIANTS

ON_SHARDS = [name for name in RECIPES if isinstance(load_recipe(name).data, Shards)]
FIT = ["ablation-118m", "parcae-style-140m"]

CONVERSATIONS = str(Path(__file__).parents[1] / "tasks" / "chat.jsonl")

TRAINING = (Path(__file__).resolve().parents[2] / "docs/training.md").read_text("utf-8")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared folder of random bytes."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text("\n".join("".join(rng.choice(list("abcdefgh "), 400)) for _ in range(50)))
    prepare([str(folder / "text.txt")], folder / "data", "bytes", Settings(Reading(cut="lines"), 0.2), progress=False)
    return str(folder / "data")


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ON_SHARDS])
def test_recipe_takes_a_step(name: str, tmp_path: Path) -> None:
    cfg = dataclasses.replace(RECIPES[name](), steps=1, batch_size=2, eval=EvalConfig())
    if name == "adaptive-text":  # 1,024 tokens of its 26 million parameters take a minute where others work too
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seq_len=128))
    if name == "chat":
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, paths=(CONVERSATIONS,), held_out=0))
    Trainer(cfg, tmp_path, device="cpu", progress=False).run()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] > 0


@pytest.mark.parametrize("name", FIT)
@pytest.mark.parametrize("steps", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_recipe_trains_on_shards(name: str, steps: int, shards: str, tmp_path: Path) -> None:
    """Its model as it is; few and short rows. In one step AdamW, for Muon takes ten seconds."""
    cfg = load_recipe(name)
    cfg = dataclasses.replace(cfg, data=Shards((shards,), seq_len=32), batch_size=2, parallel=ParallelConfig())
    if steps == 1:
        cfg = dataclasses.replace(cfg, optim=OptimConfig())
    trainer = Trainer(cfg, tmp_path, device="cpu", progress=False)
    losses = [trainer.train_step(step)[1]["train/loss"] for step in range(steps)]
    assert losses[0] == pytest.approx(math.log(cfg.model.vocab_size), rel=0.15)
    # The rate is still rising, but nine letters are soon told from fifty thousand tokens.
    assert steps == 1 or losses[-1] < losses[0]


@pytest.mark.parametrize("name", ON_SHARDS)
def test_recipe_is_there_before_its_data(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It can be read, written and read again, and to train it names the command that makes its data."""
    cfg = load_recipe(name)
    assert TrainConfig.from_yaml(cfg.to_yaml()) == cfg
    missing = str(tmp_path / "none")
    args = ["train", name, "--out", str(tmp_path / "run"), "--data.paths", missing, "--device", "cpu"]
    args += ["--parallel.experts", "1"]
    assert main(args) == 2
    assert f"mythos prepare-data INPUT --out {missing}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_mythos_3b_is_the_published_script() -> None:
    cfg = load_recipe("mythos-3b-fineweb-edu")
    tokens = cfg.batch_size * cfg.data.seq_len
    assert (cfg.data.seq_len, tokens, cfg.steps) == (2048, 524_288, 30_000_000_000 // 524_288)
    assert (cfg.optim.kind, cfg.optim.lr, cfg.optim.betas, cfg.optim.weight_decay) == ("adamw", 3e-4, (0.9, 0.95), 0.1)
    assert (cfg.optim.decay, cfg.optim.clip_norm, cfg.dtype, cfg.parallel.rows) == ("all", 1.0, "bfloat16", 4)
    # As its get_lr: a cosine from the peak, which step 2,000 has, to a tenth.
    for step in (2000, 10_000, 57_219):
        left = 0.5 * (1 + math.cos(math.pi * (step - 2000) / (cfg.steps - 2000)))
        assert cfg.schedule.factor(step, cfg.steps) == pytest.approx(0.1 + 0.9 * left)
    model = VARIANTS["3b"]()
    assert cfg.model == dataclasses.replace(model, vocab_size=201_088, max_seq_len=2048)
    assert count_parameters(cfg.model).total == 3_561_163_522
    assert count_parameters(dataclasses.replace(model, vocab_size=199_998)).total == 3_557_815_042


def test_ablation_has_the_published_parameters() -> None:
    cfg = load_recipe("ablation-118m")
    assert count_parameters(cfg.model).total == 117_808_066
    assert cfg.steps * cfg.batch_size * cfg.data.seq_len == 491_520_000


def test_the_published_command_starts_the_recipe(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["3b_fine_web_edu.py", "--device", "cpu", "--steps", "5"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(repo_root / "training/3b_fine_web_edu.py"), run_name="__main__")
    assert "mythos prepare-data INPUT --out data/fineweb-edu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
            assert line in TRAINING
        assert commands.endswith(f"--out {load_recipe(name).data.paths[0]}")
    assert not list(tmp_path.iterdir())
