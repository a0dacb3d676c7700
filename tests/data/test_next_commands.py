"""What a command says comes next is a command that runs as it is printed, up to a model that trains."""

import json
import re
import shlex
from pathlib import Path

import pytest

from open_mythos.assets import novel
from open_mythos.cli import main
from open_mythos.model import OpenMythos
from open_mythos.tokenization.tokenizer import load_tokenizer

SMALL = [
    "--steps",
    "1",
    "--batch-size",
    "2",
    "--eval.rows",
    "4",
    "--model.dim",
    "24",
    "--device",
    "cpu",
    "--threads",
    "1",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a space in its name. The command is called by its name alone."""
    monkeypatch.setattr("open_mythos.reports.terminal.program", lambda: "mythos")
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "my texts"
    made.mkdir()
    (made / "novel.TXT").write_text(novel()[:100_000])
    return made


def run(command: list[str], capsys: pytest.CaptureFixture) -> list[str]:
    """Run a command and return the one that it says comes next."""
    assert command[0] == "mythos" and main(command[1:]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("Next: ")]
    return shlex.split(line.removeprefix("Next: "))


def test_from_texts_to_a_model(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """With another vocabulary than the recipe's, into which the model's has to fit."""
    then = run(["mythos", "train-tokenizer", "my texts", "--vocab-size", "300", "--out", "my bpe"], capsys)
    then = run([*then, "--cut", "paragraphs", "--held-out", "0.1"], capsys)
    assert then[:3] == ["mythos", "train", "small-text"] and then[then.index("--model.vocab-size") + 1] == "300"
    assert main([*then[1:], *SMALL, "--data.seq-len", "64"]) == 0
    final = Path(then[then.index("--out") + 1]) / "final"
    assert OpenMythos.from_pretrained(final).cfg.vocab_size == load_tokenizer(final).vocab_size == 300


def test_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from open_mythos.data import corpus

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "_download", lambda name, folder: None)
    monkeypatch.setattr(
        corpus, "_plays", lambda path: iter([(novel()[i : i + 9000], "") for i in range(0, 90_000, 9000)])
    )
    monkeypatch.setattr(corpus, "_chapters", lambda path: iter([]))
    monkeypatch.setattr("open_mythos.reports.terminal.program", lambda: "mythos")
    monkeypatch.setattr(corpus, "novel", lambda: "A short novel. " * 100)
    then = run(["mythos", "fetch-corpus", "--out", "new folder/corpus.jsonl"], capsys)
    then = run([*then, "--vocab-size", "280"], capsys)
    assert run([*then, "--held-out", "0.2"], capsys)[:3] == ["mythos", "train", "small-text"]


def test_little_data_gets_shorter_rows(folder: Path, capsys: pytest.CaptureFixture) -> None:
    records = [json.dumps({"text": f"document {i} says what it has to say"}) for i in range(40)]
    Path("few.jsonl").write_text("\n".join(records))
    then = run(["mythos", "prepare-data", "few.jsonl", "--out", "few", "--held-out", "0.1"], capsys)
    n_tokens = json.loads(Path("few/dataset.json").read_text())["counts"]["validation"]["tokens"]
    assert 0 < n_tokens <= 256 and then[then.index("--data.seq-len") + 1] == str(n_tokens - 1)
    assert main([*then[1:], *SMALL]) == 0


def test_data_without_validation_is_prepared_anew(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """By paragraphs where it is one document, with a larger share where that is too small; an option is not doubled."""
    then = run(["mythos", "prepare-data", "my texts", "--out=one"], capsys)
    assert then == shlex.split("mythos prepare-data 'my texts' --cut paragraphs --held-out 0.1 --out one-2")
    assert run(then, capsys)[1] == "train"
    records = [json.dumps({"text": f"document {i} says what it has to say"}) for i in range(40)]
    Path("few.jsonl").write_text("\n".join(records))
    then = run(["mythos", "prepare-data", "few.jsonl", "--held-out", "0", "--out", "few"], capsys)
    assert then[:3] == ["mythos", "prepare-data", "few.jsonl"] and then.count("--held-out") == then.count("--out") == 1
    assert run(then, capsys)[1] == "train"
    Path("one.jsonl").write_text(records[0])
    assert main(["prepare-data", "one.jsonl", "--out", "single"]) == 0
    out = capsys.readouterr().out
    assert "Add documents, for there are too few to hold one out." in out and "Next" not in out


def test_a_vocabulary_that_does_not_fit(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Set to the data's where none is given, and refused with the flag to type where another is."""
    assert main(["prepare-data", "my texts", "--cut", "lines", "--held-out", "0.1", "--out", "data"]) == 0
    train = ["train", "small-text", "--data.paths", "data", "--data.seq-len", "32", *SMALL]
    for given in (["--model.vocab-size", "2048"], ["--model.vocab_size=258"]):
        capsys.readouterr()
        assert main([*train, "--out", "run", *given]) == 2
        err = capsys.readouterr().err
        assert "is not the 259 tokens of the data" in err and "use --model.vocab-size 259" in err
        assert not Path("run").exists()
    assert main([*train, "--out", "run"]) == 0
    assert "The model gets the data's 259 tokens instead of 2,048" in capsys.readouterr().out
    assert OpenMythos.from_pretrained("run/final").cfg.vocab_size == 259
    assert main(["train", "--config", "run/config.yaml", "--out", "again", "--device", "cpu"]) == 0
    # The same command again finds the run as it is.
    assert main([*train, "--out", "run", "--resume"]) == 0


def test_a_folder_for_a_task_of_one_file(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "tiny-text", "--data.path", "my texts", "--out", "run"]) == 2
    err = capsys.readouterr().err
    commands = [shlex.split(line) for line in err.splitlines() if line.startswith("mythos ") and ":" not in line]
    assert [command[1] for command in commands] == ["train-tokenizer", "prepare-data", "train"]
    commands[0][commands[0].index("2048")] = "300"
    commands[2] += [*SMALL, "--data.seq-len", "64"]
    for command in commands:
        assert main(command[1:]) == 0


def test_the_configuration_in_the_documents(folder: Path, repo_root: Path, capsys: pytest.CaptureFixture) -> None:
    """The run.yaml of docs/data.md trains on what the commands above it prepare."""
    text = (repo_root / "docs" / "data.md").read_text("utf-8")
    yaml = re.search(r"```yaml\n(# run.yaml.*?)```", text, re.DOTALL)
    assert yaml is not None
    Path("run.yaml").write_text(yaml[1].replace("4096", "300"))
    assert main(["train-tokenizer", "my texts", "--vocab-size", "300", "--out", "data/bpe"]) == 0
    prepare = ["prepare-data", "my texts", "--tokenizer", "data/bpe", "--cut", "paragraphs", "--held-out", "0.1"]
    assert main([*prepare, "--out", "data/corpus"]) == 0
    train = [
        "train",
        "--config",
        "run.yaml",
        "--out",
        "runs/corpus",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    assert main(train) == 0, capsys.readouterr().err
    n = sum(parameter.numel() for parameter in OpenMythos.from_pretrained("runs/corpus/final").parameters())
    assert n + (4096 - 300) * 64 == pytest.approx(400_000, rel=0.1)
