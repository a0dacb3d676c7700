"""What a run says before it starts, and the commands that it names at its end: each works as printed."""

import dataclasses
import io
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from open_mythos.cli import main
from open_mythos.cli.plugins import program
from open_mythos.data.documents import Reading
from open_mythos.data.prepare import Settings, prepare
from open_mythos.recipes import CPU_SECONDS, RECIPES, load_recipe
from open_mythos.reports import terminal
from open_mythos.reports.terminal import duration
from open_mythos.tasks import TASKS, Addition, Brackets, Chat, KHop, Mixed, Parity, Shards, Text
from open_mythos.tasks.task import IGNORE, example
from open_mythos.train.config import EvalConfig, TrainConfig

CONVERSATIONS = str(Path(__file__).parents[1] / "tasks" / "chat.jsonl")
SYNTHETIC = [KHop(), Addition(), Parity(), Brackets(), Mixed()]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    words = np.random.default_rng(0).choice(["it's", "a", '"quoted"', "$HOME", "caf\u00e9", "\u4e2d\u6587"], (40, 60))
    (folder / "text.txt").write_text("\n".join(" ".join(line) for line in words), encoding="utf-8")
    prepare([str(folder / "text.txt")], folder / "data", "bytes", Settings(Reading(cut="lines"), 0.2), progress=False)
    return str(folder / "data")


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell that finds `mythos`."""
    monkeypatch.setattr(terminal.shutil, "which", lambda name: name)


def train(data: object, out: Path, capsys: pytest.CaptureFixture) -> str:
    """What `mythos train` prints for one step of a small model on a task."""
    base = load_recipe("tiny-addition")
    model = dataclasses.replace(base.model, vocab_size=259, dim=16, n_heads=2, n_kv_heads=2, expert_dim=16)
    model = dataclasses.replace(model, max_seq_len=max(32, data.seq_len))
    cfg = TrainConfig(model, data, steps=1, batch_size=2, loops=base.loops, eval=EvalConfig(rows=3))
    (out / "a run.yaml").write_text(cfg.to_yaml(), encoding="utf-8")
    assert main(["train", "--config", str(out / "a run.yaml"), "--out", str(out / "a run"), "--device", "cpu"]) == 0
    return capsys.readouterr().out


def commands(said: str) -> list[list[str]]:
    """The commands behind "Next:", as a shell would read them."""
    lines = said.split("Next:\n")[1].splitlines()
    found = [shlex.split(line) for line in lines if not line.startswith("  (")]
    assert len(found) in (2, 3) and all(words[0] == "mythos" for words in found)
    return [words[1:] for words in found]


def test_every_next_command_works(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/max 2\nHello.\n"))
    tasks = [
        *SYNTHETIC,
        Text(seq_len=32),
        Shards((shards,), seq_len=32),
        Chat((CONVERSATIONS,), seq_len=400, held_out=0),
    ]
    assert {task.name for task in tasks} == set(TASKS) - {"stream"}, "a task is missing here"
    for task in tasks:
        (tmp_path / task.name).mkdir()
        said = train(task, tmp_path / task.name, capsys)
        for words in commands(said):
            assert main(words) == 0, words
            out = capsys.readouterr().out
            if words[0] == "generate" and task in SYNTHETIC:
                assert out.startswith(words[2]), "the prompt stands before the answer"


@pytest.mark.parametrize("task", SYNTHETIC, ids=lambda task: task.name)
def test_an_example_is_asked_as_training_asks(task: KHop) -> None:
    """The prompt is the beginning of a row, and the answer is what the labels say from there on."""
    tokenizer = task.tokenizer()
    for seed in range(20):
        batch = task.validation_batch(np.random.default_rng(seed), 1)
        prompt, answer, n_tokens = example(batch, tokenizer)
        ids, labels = tokenizer.encode(prompt), batch.labels[0].tolist()
        assert ids == batch.input_ids[0, : len(ids)].tolist()
        told = labels[len(ids) - 1 : len(ids) - 1 + n_tokens]
        assert IGNORE not in told and tokenizer.decode(told) == answer
        # Nothing is asked behind the answer.
        assert all(label == IGNORE for label in labels[len(ids) - 1 + n_tokens :])


def test_examples_by_hand() -> None:
    def shown(task: object) -> tuple[str, str, int]:
        return example(task.validation_batch(np.random.default_rng(5), 1), task.tokenizer())

    prompt, answer, n_tokens = shown(Addition(2, 3))
    a, b = prompt.removesuffix("=").split("+")
    assert answer == str(int(a) + int(b))[::-1] and n_tokens == len(answer) + 1
    prompt, answer, n_tokens = shown(Parity(12))
    assert prompt[0] == "^" and answer == str(prompt.count("1") % 2) and n_tokens == 1
    prompt, answer, n_tokens = shown(KHop())
    at = prompt[-1]
    while prompt["abcdefghijklmnopqrstuvwx".index(at)] != at:
        at = prompt["abcdefghijklmnopqrstuvwx".index(at)]
    assert answer == at and n_tokens == 1


def test_size_and_time_are_told_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--out", str(tmp_path / "run"), "--steps", "2", "--eval.every", "1000", "--device", "cpu"]
    assert main(["train", "tiny-khop", *options[:4], "--device", "cpu", "--threads", "1"]) == 0
    first, second, *lines = capsys.readouterr().out.splitlines()
    assert first == "tiny-khop: 47,040 parameters; 2 steps of 256 rows of 25 tokens, 12,800 tokens in all."
    seconds = CPU_SECONDS["tiny-khop"] * 2 / 600
    assert second.startswith(f"About {duration(seconds)} on one core of a server CPU")
    assert lines[0].startswith("khop: step 1/2  loss ") and lines[1].startswith("khop: step 2/2  loss ")
    # Of a run that is none of the recipe's, nothing is known before it has run.
    assert main(["train", "tiny-khop", *options, "--batch-size", "8", "--out", str(tmp_path / "other")]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "The time left is measured from the first steps."


def test_recipes_with_a_time_are_recipes() -> None:
    assert set(CPU_SECONDS) <= set(RECIPES)


def test_commands_are_named_as_the_shell_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal.program() == "mythos"
    monkeypatch.setattr(terminal.shutil, "which", lambda name: None)
    folder = tmp_path / "my env" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setattr(terminal.sys, "executable", str(folder / "python"))
    assert terminal.program() == f"'{folder}/python' -m open_mythos"
    (folder / "mythos").touch()
    assert terminal.program() == f"'{folder}/mythos'"
    monkeypatch.chdir(tmp_path)
    assert terminal.program() == "'my env/bin/mythos'"


def test_commands_name_the_plugins_that_they_need(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A recipe of a plugin's own is named by --help, and what comes after its run is named with the plugin."""
    plugin = tmp_path / "my parts.py"
    plugin.write_text(
        "from open_mythos.recipes import RECIPES, load_recipe\nRECIPES['mine'] = lambda: load_recipe('tiny-addition')\n"
    )
    try:
        words = ["--plugin", str(plugin), "train", "mine", "--out", str(tmp_path / "run"), "--device", "cpu"]
        assert main([*words, "--steps", "1", "--batch-size", "2", "--eval.rows", "2"]) == 0
        assert all(words[:2] == ["--plugin", str(plugin)] for words in commands(capsys.readouterr().out))
        with pytest.raises(SystemExit, match="0"):
            main(["--plugin", str(plugin), "train", "--help"])
        assert ", mine." in " ".join(capsys.readouterr().out.split())
    finally:
        del RECIPES["mine"]
    assert main(["info", "3m"]) == 0 and program() == "mythos", "the next command is one without the plugin"
