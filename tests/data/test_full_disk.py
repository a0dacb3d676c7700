"""A disk without room: said in these words, with the path, and nothing half written is left."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from open_mythos.cli import main
from open_mythos.data import corpus
from open_mythos.data.shards import TokenShards


@contextmanager
def files_up_to(n_bytes: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond that: a short write first, and then an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    records = [{"text": f"document {i} " + "words that take room " * 20} for i in range(200)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def test_prepare_data(texts: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["prepare-data", "a.jsonl", "--out", "out", "--held-out", "0.1"]
    with files_up_to(20_000):
        assert main(command) == 2
    err = capsys.readouterr().err
    assert os.strerror(errno.EFBIG) in err and f"{texts}/out/train/00000.bin is not written" in err
    assert "bytes are needed" in err and "repeat the command, which goes on from here" in err
    assert not list(Path("out/train").iterdir()) and not list(Path("out").rglob("*.partial"))
    assert main(command) == 0 and TokenShards("out", "train").n_documents > 100


@pytest.mark.parametrize("name", ["plan.json", "00000.json", "skipped.jsonl", "dataset.json", "mythos_tokenizer.json"])
def test_prepare_data_where_a_small_file_does_not_fit(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
) -> None:
    """ENOSPC itself, at each of the other files."""
    Path("a.jsonl").write_text(Path("a.jsonl").read_text() + "\n[]\n")
    command = ["prepare-data", "a.jsonl", "--out", "out", "--held-out", "0.1"]
    whole = Path.open

    def full(self: Path, mode: str = "r", *args, **kwargs):
        if self.name.removesuffix(".partial") == name and "w" in mode:
            with whole(self, "w") as file:
                file.write("{")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, mode, *args, **kwargs)

    def write_text(self: Path, text: str, *args, **kwargs) -> int:
        with self.open("w", encoding="utf-8") as file:
            return file.write(text)

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(Path, "write_text", write_text)
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err and f"{texts}/out" in err and "make room" in err
    assert not list(texts.rglob("*.partial")) and not list(texts.glob(".out-*"))
    monkeypatch.undo()
    monkeypatch.chdir(texts)
    assert main(command) == 0


def test_train_tokenizer(texts: Path, capsys: pytest.CaptureFixture) -> None:
    """Whose library reports the error in a form of its own."""
    command = ["train-tokenizer", "a.jsonl", "--vocab-size", "300", "--out", "bpe"]
    with files_up_to(3000):
        assert main(command) == 2
    err = capsys.readouterr().err
    assert os.strerror(errno.EFBIG) in err and "bpe is not written" in err and not Path("bpe").exists()
    assert main(command) == 0


def test_fetch_corpus(texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(corpus, "_download", lambda name, folder: None)
    monkeypatch.setattr(corpus, "_plays", lambda path: iter([("text " * 10_000, "source")]))
    monkeypatch.setattr(corpus, "_chapters", lambda path: iter([]))
    with files_up_to(100_000):
        assert main(["fetch-corpus", "--out", "new/c.jsonl"]) == 2
    err = capsys.readouterr().err
    assert os.strerror(errno.EFBIG) in err and "new/c.jsonl is not written" in err and "bytes are needed" in err
    assert not list(Path("new").iterdir())
    assert main(["fetch-corpus", "--out", "other/deep/c.jsonl"]) == 0
    assert "Created the folders other, other/deep." in capsys.readouterr().out
