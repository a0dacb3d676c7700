"""Columns of parquet files as they come: bad UTF-8, binary, nested, with dots in their names."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from open_mythos.cli import main
from open_mythos.data.documents import cut_into_units, find_files, first_text, place_of, read_documents
from open_mythos.data.prepare import Settings, prepare
from open_mythos.data.records import Reading
from open_mythos.data.skipped import SkipLog, Skipped
from open_mythos.evals.by_loops import read_texts
from open_mythos.tasks import Stream
from open_mythos.tokenization.tokenizer import ByteTokenizer

GOOD = [f"row {i} caf\u00e9 \u20ac" for i in range(30)]
BAD = 17


def read(path: Path, column: str = "text") -> list[str | Skipped]:
    reading = Reading(column)
    return [text for unit in cut_into_units([path], reading, 1) for text in read_documents(unit, reading)]


def strings(kind: pa.DataType, bad: bool = False) -> pa.Array:
    """The texts as a column, one of them in Latin-1 if `bad`."""
    data = [text.encode() for text in GOOD]
    if bad:
        data[BAD] = "caf\u00e9".encode("latin1")
    binary = pa.large_binary() if kind == pa.large_string() else pa.binary()
    # Other writers do not check what they write either.
    return pa.array(data, binary).view(kind)


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "bad.parquet"
    path.parent.mkdir()
    parquet.write_table(pa.table({"text": strings(pa.string(), bad=True)}), path, row_group_size=8)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_row_that_is_not_utf8(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": strings(kind, bad=True)}), path, row_group_size=8)
    texts = read(path)
    found = texts[BAD]
    assert isinstance(found, Skipped) and texts[:BAD] + texts[BAD + 1 :] == GOOD[:BAD] + GOOD[BAD + 1 :]
    assert (found.reason, found.file, found.place) == ("not UTF-8", str(path), f"row {BAD}")


@pytest.mark.parametrize(
    "column",
    [
        strings(pa.binary()),
        pa.array([text.encode() for text in GOOD], pa.large_binary()),
        strings(pa.string()).dictionary_encode(),
        pa.array(GOOD, pa.string_view()),
    ],
    ids=["binary", "large binary", "dictionary", "string view"],
)
def test_kinds_of_columns(tmp_path: Path, column: pa.Array) -> None:
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=8)
    assert read(tmp_path / "a.parquet") == GOOD


def test_columns_in_structs(tmp_path: Path) -> None:
    """By their path; a plain column of that name goes before, and names may hold dots at every level."""
    rows = [{"text": text, "deep": {"a.b": text[::-1]}} if i != 4 else None for i, text in enumerate(GOOD)]
    path = tmp_path / "a.parquet"
    plain = ["plain"] * len(GOOD)
    parquet.write_table(pa.table({"data": rows, "x.y": plain, "data.deep": plain}), path, row_group_size=8)
    null = Skipped("no text in the record")
    assert read(path, "data.text") == [text if i != 4 else null for i, text in enumerate(GOOD)]
    assert read(path, "data.deep.a.b") == [text[::-1] if i != 4 else null for i, text in enumerate(GOOD)]
    assert read(path, "x.y") == read(path, "data.deep") == plain
    with pytest.raises(ValueError, match=r"which has data\.text, data\.deep\.a\.b, x\.y, data\.deep; name one"):
        read(path, "data.nothing")


def test_a_row_in_a_struct_that_is_not_utf8(tmp_path: Path) -> None:
    column = pa.StructArray.from_arrays([strings(pa.string(), bad=True)], ["text"])
    parquet.write_table(pa.table({"data": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "data.text").count(Skipped("not UTF-8")) == 1


def test_every_command_skips_and_names_the_row(
    bad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["prepare-data", "data", "--held-out", "0.1"], ["train-tokenizer", "data", "--vocab-size", "300"]):
        assert main([*command, "--out", command[0]]) == 0
        err = capsys.readouterr().err
        assert f"bad.parquet, row {BAD}: byte 233 at 3" in err and "-> write the column anew" in err
        assert main([*command, "--out", f"strict-{command[0]}", "--strict"]) == 2
        assert "--strict refuses inputs of which something is skipped (1 here" in capsys.readouterr().err
    assert not Path("strict-prepare-data/dataset.json").exists() and not Path("strict-train-tokenizer").exists()
    texts, skipped = read_texts(["data"])  # of `mythos eval`
    assert len(texts) == 29 and f"bad.parquet, row {BAD}: byte 233 at 3" in "".join(skipped.lines())


def test_a_stream_goes_on_behind_the_row(bad: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From any state, with the good rows as they are, and the bad one named."""
    rng = np.random.default_rng(0)
    task = Stream(str(bad.parent), vocabulary="bytes", seq_len=11, held_out=0.2)
    lanes, states, batches = task.lanes(range(1), 1), [], []
    good = [text for i, text in enumerate(GOOD) if i != BAD and place_of(text) >= 0.2]
    n = sum(len(text.encode()) + 1 for text in good) // 11
    with caplog.at_level(logging.WARNING):
        for _ in range(n):
            states.append(lanes.state.copy())
            batches.append(lanes.next().input_ids)
    ids = torch.cat(batches, dim=1)[0].tolist()
    read = bytes(255 if i == ByteTokenizer.eos_id else i for i in ids).split(b"\xff")
    assert {part.decode() for part in read[:-1]} <= set(good) and len(read) > len(good) - 3
    assert lanes.skipped == {"not UTF-8": 1}
    assert caplog.messages == [f"skipped {bad}, row {BAD}: not UTF-8 (byte 233 at 3)"]
    for i in range(0, n, 5):
        again = task.lanes(range(1), 1, states[i])
        assert all(torch.equal(again.next().input_ids, batch) for batch in batches[i : i + 5])
    assert task.validation_batch(rng, 1).input_ids.shape == (1, 11)


def test_the_cases_that_were_reported(shared: Path, tmp_path: Path) -> None:
    cases = shared / "cases"
    settings = Settings(held_out=0.1)
    info = prepare([str(cases / "parquet-bad-utf8" / "badutf8.parquet")], tmp_path / "bad", settings=settings)
    assert sum(counts["documents"] for counts in info["counts"].values()) == 39 and info["skipped"] == {"not UTF-8": 1}
    info = prepare([str(cases / "parquet-binary")], tmp_path / "binary", settings=settings)
    assert sum(counts["documents"] for counts in info["counts"].values()) == 40 and not info["skipped"]
    log = SkipLog()
    assert sum(1 for _ in first_text(find_files([str(cases / "parquet-bad-utf8")]), Reading(), 10**6, log)) > 400
    assert log.counts == {"not UTF-8": 2}
    lanes = Stream(str(cases / "parquet-bad-utf8" / "folder"), vocabulary="bytes", seq_len=64).lanes(range(2), 2)
    for _ in range(200):
        lanes.next()
    assert lanes.skipped["not UTF-8"] > 0
