"""What is taken out of files, and what is left out and why."""

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.data.documents import Reading, Skipped, Unit, cut_into_units, find_files, first_text, read_documents

WHOLE = Reading()


def read(path: Path, reading: Reading = WHOLE, unit_bytes: int = 2**20) -> list[str | Skipped]:
    units = cut_into_units([path], reading, unit_bytes)
    return [document for unit in units for document in read_documents(unit, reading)]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("file", ["one\ntwo\n\n\nthree \n  \nfour"]),
        ("paragraphs", ["one\ntwo\n", "three \n", "four"]),
        ("lines", ["one", "two", Skipped("empty"), Skipped("empty"), "three ", Skipped("empty"), "four"]),
    ],
)
def test_text_is_cut(tmp_path: Path, cut, expected: list[str | Skipped]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree \n  \nfour")
    assert read(path, Reading(cut=cut)) == expected


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8"))), unit_bytes=st.integers(1, 60))
def test_units_share_lines_out(tmp_path_factory: pytest.TempPathFactory, lines: list[str], unit_bytes: int) -> None:
    """Wherever a file is cut, every line is in one unit."""
    path = tmp_path_factory.mktemp("units") / "a.txt"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="")
    expected = [line if line.strip() else Skipped("empty") for line in lines]
    assert read(path, Reading(cut="lines"), unit_bytes) == expected


def test_records_that_are_no_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [
        json.dumps({"text": "good"}).encode(),
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"{not json",
        b"[1]",
        b'{"body": "x"}',
        b'{"text": 3}',
        b'{"text": " "}',
        b"",
        json.dumps({"text": "x" * 100}).encode(),
        json.dumps({"text": "\u20ac" * 20}).encode(),
        json.dumps({"text": "last"}).encode(),
    ]
    path.write_bytes(b"\n".join(records))
    no_text = Skipped("no text in the record")
    assert read(path, Reading(max_document_bytes=50)) == [
        "good", Skipped("not UTF-8"), Skipped("not UTF-8"), no_text, no_text, no_text, no_text, Skipped("empty"),
        Skipped("too long"), Skipped("too long"), "last",
    ]  # fmt: skip
    assert read(path, Reading(column="body")).count(no_text) == 9 and "x" in read(path, Reading(column="body"))


def test_deep_json_is_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ' + "[" * 200_000 + "\n" + '{"text": "good"}')
    assert read(path) == [Skipped("no text in the record"), "good"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [None if i == 7 else f"document {i}" for i in range(100)]
    parquet.write_table(pyarrow.table({"text": texts, "id": list(range(100))}), path, row_group_size=9)
    expected = [Skipped("no text in the record") if text is None else text for text in texts]
    for unit_bytes in (1, 300, 2**20):
        assert read(path, unit_bytes=unit_bytes) == expected
    with pytest.raises(ValueError, match=r"column='body' is not in .*, which has text, id; name one of these"):
        read(path, Reading(column="body"))


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    units = cut_into_units([tmp_path / "a.parquet"], WHOLE)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for call in (
        lambda: cut_into_units([tmp_path / "a.parquet"], WHOLE),
        lambda: list(read_documents(units[0], WHOLE)),
    ):
        with pytest.raises(ImportError, match=r"parquet files: the package pyarrow is missing; run: pip install"):
            call()


def test_files_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.jsonl", "a.md", "b/picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path / "b"), str(tmp_path / "a.md")])
    assert [path.name for path in found] == ["1.jsonl", "2.txt", "a.md"]
    assert list(first_text([str(tmp_path / "b" / "2.txt"), str(tmp_path / "a.md")], Reading(), 1)) == ["x"]
    for inputs, message in (
        ([], "no input is named"),
        (["absent"], "input absent does not exist"),
        ([str(tmp_path / "b/picture.png")], "of no known kind; use files that end in .txt"),
        ([str(tmp_path / "a.md")] * 2, "is named twice"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            find_files(inputs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt, \.md, \.jsonl, \.ndjson, \.json, \.parquet file"):
        find_files([str(tmp_path / "empty")])


def test_text_for_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "abcdef"}\n{"text": "gh"}\n', encoding="utf-8")
    for n_bytes, expected in ((3, ["abc"]), (7, ["abcdef", "g"]), (99, ["abcdef", "gh"])):
        assert list(first_text([str(path)], Reading(), n_bytes)) == expected
    with pytest.raises(ValueError, match=r"hold no text \(skipped: \{'no text in the record': 2\}\)"):
        list(first_text([str(path)], Reading(column="body"), 9))


def test_an_empty_file_has_no_documents(tmp_path: Path) -> None:
    for cut in ("file", "lines"):
        path = tmp_path / "a.txt"
        path.write_bytes(b"")
        assert [d for d in read(path, Reading(cut=cut)) if isinstance(d, str)] == []
    assert list(read_documents(Unit(str(path), "text", 0, 0, 0), Reading(cut="lines"))) == []
