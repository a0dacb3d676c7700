"""The commands as a user types them, in this process; what they print, write and refuse."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import models

from open_mythos.cli import COMMANDS, main
from open_mythos.model import OpenMythos
from open_mythos.recipes import RECIPES, load_recipe
from open_mythos.train.config import TrainConfig

demo = import_module("open_mythos.cli.demo")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text run of three steps."""
    out = tmp_path_factory.mktemp("runs") / "text"
    options = ["--steps", "3", "--seed", "5", "--optim.lr", "1e-3", "--device", "cpu", "--threads", "1"]
    assert main(["train", "tiny-text", "--out", str(out), *options]) == 0
    return out


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_answers_without_torch(command: str) -> None:
    code = f"import sys; from open_mythos.cli import main; main({[command, '--help'] if command else ['--help']!r})"
    check = "\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch was imported'"
    result = subprocess.run([sys.executable, "-c", f"try:\n  {code}{check}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: mythos" in result.stdout


def test_train_writes_a_run_that_its_config_reproduces(run_folder: Path, tmp_path: Path) -> None:
    cfg = TrainConfig.load(run_folder / "config.yaml")
    assert (cfg.steps, cfg.seed, cfg.optim.lr) == (3, 5, 1e-3)
    again = ["--config", str(run_folder / "config.yaml"), "--out", str(tmp_path / "again")]
    assert main(["train", *again, "--device", "cpu", "--threads", "1"]) == 0
    weights = Path("final") / "model.safetensors"
    assert (run_folder / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def test_generate_prints_the_prompt_and_its_continuation(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    options = [
        "--max-new-tokens",
        "4",
        "--n-loops",
        "8",
        "--exit",
        "kl",
        "--show-loops",
        "--seed",
        "0",
        "--device",
        "cpu",
    ]
    assert main(["generate", str(run_folder / "final"), "She was ", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("She was ")
    # Colours that nobody sees are not explained.
    assert "loops per token on average (in a terminal" in out and "loops:  1" not in out


def test_generate_prints_exactly_what_the_model_wrote(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Tabs, what rich reads as markup or an emoji, and long lines, in the prompt and after it."""
    text = "x :cat:\t[b]tab[/b] " + 100 * "y" + "\n"

    def write(self: OpenMythos, prompt: str, *args: object, on_token: Callable, **options: object) -> tuple:
        for byte in text.encode():
            on_token(0, byte, 1)
        return prompt + text, [1] * len(text)

    monkeypatch.setattr(OpenMythos, "generate", write)
    assert main(["generate", str(run_folder / "final"), text, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == text + text + "\n"


def test_generate_prints_nothing_before_a_refusal(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", str(run_folder / "final"), "She", "--n-loops", "0", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--n-loops 0" in err


def test_help_names_every_recipe(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert all(name in out for name in RECIPES)


@pytest.mark.parametrize(
    "args",
    [
        ["tiny-text", "--out", "run", "--steps", "1"],
        ["--out", "run", "tiny-text", "--steps", "1"],
        ["--out", "run", "--steps", "1", "tiny-text"],
    ],
)
def test_a_recipe_may_stand_anywhere(args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *args, "--device", "cpu", "--threads", "1", "--dtype", "float32"]) == 0
    expected = dataclasses.replace(load_recipe("tiny-text"), steps=1, dtype="float32")
    assert TrainConfig.load("run/config.yaml") == expected


@pytest.mark.parametrize("model", ["1b", "mythos_1b"])
def test_info_of_a_variant(model: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["info", model]) == 0
    out = capsys.readouterr().out
    for figure in ("1,064,028,034", "243,517,194", "22.9 %", "11.25 KiB"):
        assert figure in out


def test_info_counts_what_pages_hold(capsys: pytest.CaptureFixture) -> None:
    """11,520 bytes are a token of 1b at 16 loops, in pages of 16 tokens: 576 for each of 16 loops and 4 layers."""
    assert main(["info", "1b", "--kv-gb", "0.1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "10,850 pages of 9 KiB" in out and "576 B per loop and 2.25 KiB in 4 layers" in out
    blocks = int(0.1e9) // (16 * 576) // (16 + 4)
    assert f"{blocks * 16:,}" in out and f" {blocks // 64} " in out and f" {blocks // 256} " in out
    assert main(["info", "1b", "--kv-gb", "0"]) == 2
    assert "--kv-gb 0.0 must be a finite number above 0" in capsys.readouterr().err


def test_info_of_a_folder(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["info", str(run_folder / "final")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert str(run_folder / "final") in out.replace(" ", "")
    # Of a model this small: room for 32 whole contexts, and no column that says 1 in every row.
    assert "one GPU of 80 GB holds each" in out and "GPUs of" not in out
    assert re.search(r"4 . 3 KiB . 16,384 . 32 .", out)


def test_info_with_another_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The largest id of gpt-oss-20b's tokenizer is 200,018, and a row of the embedding of 3b is 3,072 wide."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|return|>": 200_018}, "a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    for vocabulary in (["--tokenizer", str(tmp_path)], ["--vocab-size", "200019"]):
        assert main(["info", "mythos_3b", *vocabulary]) == 0
        out = capsys.readouterr().out
        for figure in ("3,041,725,186", "3,557,879,554", f"{200_019 * 3072:,}", f"{32_000 * 3072:,}"):
            assert figure in out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["trian"], "no command"),
        (["info", "3b", "--vocab-size", "9", "--tokenizer", "bytes"], "are both given; give one"),
        (["info", "3b", "--vocab-size", "0"], "--vocab-size 0 must be between 1 and 1073741824"),
        (["info", "2b"], "is no variant"),
        (["info", "1b", "--gpu-gb", "0"], "--gpu-gb 0.0 must be above 0"),
        (["train", "tiny-txet", "--out", "x"], "did you mean tiny-text?"),
        (["train", "--out", "x", "tiny-txet"], "did you mean tiny-text?"),
        (["train", "--out", "x"], "give either a recipe (tiny-khop, "),
        (["train", "--out", "x", "--config", "."], "Is a directory"),
        (["demo", "--out", __file__], "Not a directory"),
        (["train", "tiny-text"], "--out is missing"),
        (["generate", "nowhere", "a"], "folder nowhere does not exist"),
        (["generate", "runs/typo", "a"], "folder runs/typo does not exist"),
    ],
)
def test_a_failed_command_says_what_to_do(args: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    assert main(args) == 2
    assert told in capsys.readouterr().err


def test_a_run_is_not_overwritten(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "tiny-text", "--out", str(run_folder)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_demo_refuses_a_device_before_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    missing = next(name for name in ("mps", "cuda") if not getattr(torch.backends, name).is_built())
    assert main(["demo", "--out", str(tmp_path / "out"), "--device", missing]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"--device {missing} is not available" in err and not list(tmp_path.iterdir())


def test_demo_writes_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two steps of each recipe: the numbers mean nothing, the path through the demo is whole."""
    demo = importlib.import_module("open_mythos.cli.demo")  # the package has a function of this name
    monkeypatch.setattr(demo, "load_recipe", lambda name: dataclasses.replace(load_recipe(name), steps=2, batch_size=4))
    monkeypatch.setattr(demo, "EVALUATION_ROWS", 4)
    monkeypatch.setattr(demo, "TEXT_STEPS", 2)
    for _ in range(2):
        demo.run_demo(tmp_path / "out", "cpu", "float32", 1, 0)
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert len(results["khop"]["accuracy"]) == len(results["khop"]["distances"])
    assert len(results["text"]["bits_per_byte"]) == len(results["text"]["loops"])
    for name in ("khop.png", "text.png", "khop/final/model.safetensors", "text/final/mythos_tokenizer.json"):
        assert (tmp_path / "out" / name).exists(), name
    assert out.count("mythos ") >= 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="no demo wrote"):
        demo.run_demo(tmp_path / "mine", "cpu", "float32", 1, 0)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("command", ["chat", "serve", "info"])
def test_a_line_break_in_a_folders_name_stays_in_the_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "a\nb\x1b[31m"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and r"a\nb\x1b[31m" in error
