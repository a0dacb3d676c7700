"""From files to shards: nothing lost, nothing twice, the same however it was done, and damage is named."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from open_mythos.data import documents
from open_mythos.data import prepare as module
from open_mythos.data.documents import Reading
from open_mythos.data.prepare import Settings, prepare
from open_mythos.data.shards import TokenShards, write_shard
from open_mythos.tokenization.tokenizer import BPETokenizer, ByteTokenizer, SymbolTokenizer, load_tokenizer

LINES = Settings(Reading(cut="lines"), held_out=0.2)
TEXTS = [f"Document {i}: {'what it says ' * (i % 7)}\u20ac" for i in range(400)]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files in units of about 1,000 bytes, with bad records and a document that occurs twice."""
    monkeypatch.setattr(documents, "UNIT_BYTES", 1000)
    monkeypatch.setattr(documents.cut_into_units, "__defaults__", (1000,))
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(TEXTS[:250]) + "\n\n", encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in [*TEXTS[250:], TEXTS[0]]]
    (folder / "b.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents_of(folder: Path, split: str) -> list[str]:
    """Every document as text, told apart by the ends and checked against the end token."""
    shards, tokenizer = TokenShards(folder, split), load_tokenizer(folder)
    found, start = [], 0
    for i, shard in enumerate(shards.shards):
        ends = shards.document_ends(i)
        assert len(ends) == shard.documents and ends[-1] == shard.tokens
        for first, end in zip([0, *ends[:-1]], ends, strict=True):
            ids = shards.read(start + int(first), int(end - first)).tolist()
            assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
            found.append(tokenizer.decode(ids))
        start += shard.tokens
    return found


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_document_comes_back(corpus: Path, tmp_path: Path, kind: str) -> None:
    name = "bytes"
    if kind == "bpe":
        name = str(tmp_path / "bpe")
        BPETokenizer.train(TEXTS, 300).save(name)
    info = prepare([str(corpus)], tmp_path / "out", name, LINES, progress=False)
    train, validation = (documents_of(tmp_path / "out", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted([*TEXTS, TEXTS[0]])
    assert not set(train) & set(validation)
    assert 0.1 < len(validation) / len(TEXTS) < 0.3
    assert info["skipped"] == {"empty": 1, "not UTF-8": 1}
    for split, texts in (("train", train), ("validation", validation)):
        shards = TokenShards(tmp_path / "out", split)
        assert info["counts"][split]["documents"] == shards.n_documents == len(texts)
        assert info["counts"][split]["bytes"] == shards.n_bytes == sum(len(text.encode()) for text in texts)
        assert info["counts"][split]["tokens"] == shards.n_tokens
        shards.verify()
    assert len(TokenShards(tmp_path / "out", "train").shards) > 10


def test_workers_change_nothing(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare([str(corpus)], tmp_path / str(workers), "bytes", LINES, workers=workers, progress=False)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_worker_that_dies_is_an_error_and_no_wait(corpus: Path, tmp_path: Path) -> None:
    """As in a script that starts processes while it is imported, which every worker then does again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from open_mythos.data import documents; documents.cut_into_units.__defaults__ = (1000,)\n"
        "from open_mythos.data.prepare import prepare, Settings; from open_mythos.data.documents import Reading\n"
        "settings = Settings(Reading(cut='lines'), 0.2)\n"
        "prepare([sys.argv[1]], sys.argv[2], 'bytes', settings, workers=2, progress=False)\n"
    )
    command = [sys.executable, str(script), str(corpus), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1 and "a worker process died" in done.stderr


def test_an_interrupted_call_goes_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare([str(corpus)], tmp_path / "whole", "bytes", LINES, progress=False)
    run, done = module._tokenize, []

    def interrupted(out, settings, dtype, i, unit):
        if i == 5 and 5 not in done:
            done.append(5)
            # Some of the unit is written, and it has no mark.
            write_shard(out, f"train/{i:05d}.bin", [np.arange(3)], 3, "uint16")
            raise KeyboardInterrupt
        done.append(i)
        return run(out, settings, dtype, i, unit)

    monkeypatch.setattr(module, "_tokenize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([str(corpus)], tmp_path / "out", "bytes", LINES, progress=False)
    with pytest.raises(FileNotFoundError, match="holds no finished data"):
        TokenShards(tmp_path / "out", "train")
    prepare([str(corpus)], tmp_path / "out", "bytes", LINES, progress=False)
    assert done == [*range(6), *range(5, max(done) + 1)]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    done.clear()
    prepare([str(corpus)], tmp_path / "out", "bytes", LINES, progress=False)
    assert not done


@pytest.mark.parametrize("trials", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_any_instant(corpus: Path, tmp_path: Path, trials: int) -> None:
    """SIGKILL, again and again until a call gets through; the result is that of an undisturbed call."""
    code = (
        "import sys; from open_mythos.data import documents, prepare as p; from tests.data.test_prepare import LINES;"
        "documents.cut_into_units.__defaults__ = (1000,);"
        "p.prepare([sys.argv[1]], sys.argv[2], 'bytes', LINES, progress=False)"
    )
    prepare([str(corpus)], tmp_path / "whole", "bytes", LINES, progress=False)
    rng, kills = random.Random(0), 0
    for trial in range(trials):
        out = tmp_path / f"out{trial}"
        while True:
            done = len(list(out.glob("units/*.json")))
            process = subprocess.Popen([sys.executable, "-c", code, str(corpus), str(out)])
            # Something is done in every round, so that there is an end; the kill falls somewhere behind it.
            while process.poll() is None and len(list(out.glob("units/*.json"))) <= done:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        assert process.returncode == 0
        assert {k: v for k, v in contents(out).items() if not k.endswith(".partial")} == contents(tmp_path / "whole")
    assert kills


def test_a_folder_is_of_one_preparation(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare([str(corpus)], out, "bytes", LINES, progress=False)
    before = contents(out)
    BPETokenizer.train(TEXTS, 300).save(tmp_path / "bpe")
    calls = [
        (([str(corpus)], out, "bytes", Settings(LINES.reading, 0.1)), "data made with other settings"),
        (([str(corpus / "a.txt")], out, "bytes", LINES), "data made with other inputs"),
        (([str(corpus)], out, str(tmp_path / "bpe"), LINES), "data made with other tokenizers"),
        (([str(corpus)], corpus, "bytes", LINES), "is not empty and holds no prepared data"),
    ]
    for arguments, message in calls:
        with pytest.raises(ValueError, match=message):
            prepare(*arguments, progress=False)
    os.utime(corpus / "a.txt", ns=(0, 0))
    with pytest.raises(ValueError, match="data made with other inputs"):
        prepare([str(corpus)], out, "bytes", LINES, progress=False)
    assert contents(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "out", "bpe"}


def test_only_its_own_folder_is_touched(corpus: Path, tmp_path: Path) -> None:
    """Whatever stands beside it, and whatever it is called."""
    tokenizer = tmp_path / "out.tokenizer"
    BPETokenizer.train(TEXTS, 300).save(tokenizer)
    (tokenizer / "README.md").write_text("mine")
    before = contents(tokenizer)
    for _ in range(2):
        prepare([str(corpus)], tmp_path / "out", str(tokenizer), LINES, progress=False)
    with pytest.raises(ValueError, match="data made with other settings"):
        prepare([str(corpus)], tmp_path / "out", str(tokenizer), Settings(LINES.reading, 0.1), progress=False)
    assert contents(tokenizer) == before
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "out", "out.tokenizer"}


def test_missing_shards_are_made_again(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare([str(corpus)], out, "bytes", LINES, progress=False)
    before = contents(out)
    (out / "train" / "00000.bin").unlink()
    (out / "train" / "00001.ends").write_bytes(b"")
    with pytest.raises(ValueError, match="there is nothing; repeat the mythos prepare-data that made"):
        TokenShards(out, "train")
    prepare([str(corpus)], out, "bytes", LINES, progress=False)
    assert contents(out) == before
    path = out / "train" / "00002.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"remove .*00002\.json and repeat") as error:
        TokenShards(out, "train").verify()
    assert str(out / "units" / "00002.json") in str(error.value)
    (out / "units" / "00002.json").unlink()
    prepare([str(corpus)], out, "bytes", LINES, progress=False)
    assert contents(out) == before


def test_refuses_what_gives_no_data(corpus: Path, tmp_path: Path) -> None:
    SymbolTokenizer(["a", "b"]).save(tmp_path / "symbols")
    with pytest.raises(ValueError, match="has no end token"):
        prepare([str(corpus)], tmp_path / "out", str(tmp_path / "symbols"), LINES, progress=False)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"no document to train on \(skipped: 1 records: empty\); add text"):
        prepare([str(tmp_path / "blank.txt")], tmp_path / "out", "bytes", LINES, progress=False)
    with pytest.raises(ValueError, match=r"held_out=0\.6"):
        Settings(held_out=0.6)
    with pytest.raises(ValueError, match="cut='words' must be one of"):
        Reading(cut="words")  # ty: ignore[invalid-argument-type]


def test_ids_that_the_vocabulary_lacks_are_counted(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = ByteTokenizer.encode

    def wrong_once(self: ByteTokenizer, text: str) -> list[int]:
        return [9999] if text.startswith("Document 17:") else encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", wrong_once)
    info = prepare([str(corpus)], tmp_path / "out", "bytes", LINES, progress=False)
    assert info["skipped"]["ids out of range"] == 1


def test_damage_is_named(corpus: Path, tmp_path: Path) -> None:
    """Every single-bit flip by `verify`, every other length when the data is opened."""
    out, rng = tmp_path / "out", random.Random(0)
    prepare([str(corpus)], out, "bytes", LINES, progress=False)
    files = [path for path in sorted(out.rglob("*")) if path.suffix in (".bin", ".ends") and path.stat().st_size]
    for _ in range(30):
        path = rng.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        shards = TokenShards(out, path.parent.name)
        with pytest.raises(ValueError, match=f"{path.stem}.bin is damaged"):
            shards.verify()
        path.write_bytes(good[: rng.randrange(len(good))])
        with pytest.raises(ValueError, match=f"{path.name} should have {len(good)} bytes"):
            TokenShards(out, path.parent.name)
        path.write_bytes(good)
    files[0].unlink()
    with pytest.raises(ValueError, match="and there is nothing"):
        TokenShards(out, files[0].parent.name)
    (out / "dataset.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="is of another format than 1"):
        TokenShards(out, "train")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_reading_across_shards(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    parts = [rng.integers(top, size=n, endpoint=True) for n in (5, 1, 40, 7)]
    shards = [write_shard(tmp_path, f"train/{i}.bin", [part], 1, dtype) for i, part in enumerate(parts)]
    info = {"format": 1, "dtype": dtype, "splits": {"train": [vars(shard) for shard in shards], "validation": []}}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    read, whole = TokenShards(tmp_path, "train"), np.concatenate(parts)
    for start in range(len(whole) + 1):
        for end in range(start, len(whole) + 1):
            assert np.array_equal(read.read(start, end - start), whole[start:end])
    for start, n in ((-1, 1), (0, 54), (54, 0)):
        with pytest.raises(ValueError, match=r"are not all in \[0, 53\)"):
            read.read(start, n)
    assert TokenShards(tmp_path, "validation").n_tokens == 0
