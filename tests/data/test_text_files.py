"""Files as they come: compressed, in other encodings, cut short, or made to fill memory."""

import codecs
import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from open_mythos.data import text_files
from open_mythos.data.documents import cut_into_units, find_files, first_text, read_documents
from open_mythos.data.records import Reading
from open_mythos.data.skipped import SkipLog, Skipped
from open_mythos.data.text_files import kind_of

LINES = Reading(cut="lines")
TEXT = "Caf\u00e9 \u20ac 1\nsecond \U0001f600\n\nthird"


def read(path: Path, reading: Reading = Reading(), unit_bytes: int = 2**20) -> list[str | Skipped]:  # noqa: B008
    return [text for unit in cut_into_units([path], reading, unit_bytes) for text in read_documents(unit, reading)]


def skipped(path: Path, reading: Reading = Reading()) -> list[Skipped]:  # noqa: B008
    return [document for document in read(path, reading) if isinstance(document, Skipped)]


def test_kinds_by_name() -> None:
    named = {"a.TXT": "text", "a.b.md": "text", "A.JsonL": "jsonl", "a.ndjson": "jsonl", "a.JSON": "json"}
    for name, kind in named.items():
        assert kind_of(name) == kind_of(name + ".gz") == kind_of(name + ".GZ") == kind
    assert kind_of("a.Parquet") == "parquet"
    assert [kind_of(name) for name in ("a.parquet.gz", "a.gz", "gz", ".txt", "a.txt.zst", "a")] == [None] * 6


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_encodings_with_a_byte_order_mark(tmp_path: Path, encoding: str, packed: bool) -> None:
    """The text is the same in every encoding, whole, by lines and as JSON, and no mark is left in it."""
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    marks |= {"utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}

    def write(name: str, text: str) -> Path:
        data = marks.get(encoding, b"") + text.encode(encoding)
        path = tmp_path / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
        return path

    assert read(write("a.txt", TEXT)) == [TEXT]
    assert read(write("a.txt", TEXT), LINES, 5)[::3] == [TEXT.split("\n")[0], "third"]
    assert read(write("a.txt", TEXT), Reading(cut="paragraphs")) == [TEXT[: TEXT.index("\n\n") + 1], "third"]
    records = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in TEXT.split("\n"))
    assert read(write("a.jsonl", records), unit_bytes=7) == [*TEXT.split("\n")[:2], Skipped("empty"), "third"]
    assert read(write("a.json", json.dumps([{"text": TEXT}], ensure_ascii=False))) == [TEXT]


def test_line_ends_and_zeros(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\r\ntwo\0\r\nthree\r")
    assert read(path) == ["one\n\ntwo\0\nthree\r"]
    assert read(path, Reading(cut="paragraphs")) == ["one\n", "two\0\nthree\r"]
    for cut in ("file", "paragraphs"):
        limited = Reading(cut=cut, max_document_bytes=10)
        assert read(write_gz(tmp_path / "long.txt", b"a\r\n" * 4), limited) == [Skipped("too long")]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\r\\nb"}\r\n')
    assert read(path) == ["a\r\nb"]


@pytest.mark.parametrize(
    ("name", "data", "why", "remedy"),
    [
        (
            "a b.txt",
            "caf\u00e9".encode("latin1"),
            "byte 233 at 3",
            "iconv -f latin1 -t utf-8 'a b.txt' > 'a b-utf8.txt'",
        ),
        ("a.txt", "no mark".encode("utf-16-le"), "UTF-16 without a byte", "iconv -f utf-16le -t utf-8 a.txt"),
        ("a.txt", "no mark".encode("utf-16-be"), "UTF-16 without a byte", "iconv -f utf-16be -t utf-8 a.txt"),
        (
            "a.txt.gz",
            gzip.compress("caf\u00e9".encode("latin1"), mtime=0),
            "byte 233",
            "gzip -dc a.txt.gz | iconv -f latin1",
        ),
        ("a.jsonl", '{"text": "no mark"}'.encode("utf-16-le"), "UTF-16 without a byte", "utf-16le -t utf-8 a.jsonl"),
        ("a.txt", b"MZ" + bytes(200), "binary", "take it out"),
        ("a.txt", gzip.compress(b"text", mtime=0), "it is a gzip file", "add .gz to its name"),
        ("a.md", b"%PDF-1.7 text", "it is a PDF file", "extract its text"),
        ("a.txt", codecs.BOM_UTF16_LE + b"a\0b", "utf-16-le that its byte order mark names", "get it again"),
    ],
)
def test_no_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, why: str, remedy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    (found,) = skipped(Path(name))
    assert (found.reason, found.file, found.place) == ("not UTF-8", name, "")
    assert why in found.why and remedy in found.remedy


def test_one_bad_record_of_many(tmp_path: Path) -> None:
    """With the number of its line, and the others as they are."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "\xff"}\n{"text": "three"}\n{"body": "longest", "id": "x"}\n')
    assert [text for text in read(path) if isinstance(text, str)] == ["one", "three"]
    bad, missing = skipped(path)
    assert (bad.place, missing.place) == ("line 3", "line 5")
    assert "correct it, or if all of the file" in bad.remedy and missing.remedy == "--column body"
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "one"}, {"text": "\xff"}, {"text": "\\ud800"}, 7, {"text": null}, {"text": "three"}]')
    assert [text for text in read(path) if isinstance(text, str)] == ["one", "three"]
    assert [(one.place, one.reason) for one in skipped(path)] == [
        ("record 2", "not UTF-8"), ("record 3", "not UTF-8"),
        ("record 4", "no text in the record"), ("record 5", "no text in the record"),
    ]  # fmt: skip


def test_gzip_that_is_damaged(tmp_path: Path) -> None:
    """What comes before the damage is read; the place behind which nothing is, is named."""
    lines = [json.dumps({"text": f"{i} {'abc' * (i % 7)}"}) for i in range(20_000)]
    whole = gzip.compress("\n".join(lines).encode())
    path = tmp_path / "a.jsonl.gz"
    flipped = whole[: len(whole) // 2] + bytes(8) + whole[len(whole) // 2 + 8 :]
    check = f"gzip -t {path}"
    for data, why, remedy in (
        (whole[:-100], "ends too early", check),
        (flipped, "damaged", check),
        (b"no gzip at all", "not compressed", "take .gz off its name"),
    ):
        path.write_bytes(data)
        texts = read(path)
        found = texts.pop()
        assert found == Skipped("damaged") and why in found.why and remedy in found.remedy
        assert texts == [json.loads(line)["text"] for line in lines[: len(texts)]]
        assert found.place == (f"behind line {len(texts)}" if texts else "")
    assert read(write_gz(path, whole + gzip.compress(b'\n{"text": "second member"}', mtime=0)))[-1] == "second member"


def write_gz(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("filler", [b"a", b"\n", b'{"text": "'])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.gz"])
def test_a_file_that_unpacks_to_a_thousand_times_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, filler: bytes
) -> None:
    """Neither memory nor work grow with what it claims to hold."""
    monkeypatch.setattr(text_files, "UNPACKED_BYTES", 2**19)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9) as file:
        file.write(filler * (2**23 // len(filler)))
    path, reading = write_gz(tmp_path / name, buffer.getvalue()), Reading(max_document_bytes=2**16)
    tracemalloc.start()
    try:
        texts = read(path, reading)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(texts) == 1 and isinstance(texts[0], Skipped) and texts[0].remedy
    assert peak < 6 * 2**20


def test_prose_that_is_compressed_well_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "UNPACKED_BYTES", 1000)
    text = "She had been forced into prudence in her youth. " * 80
    path = write_gz(tmp_path / "a.txt.gz", gzip.compress(text.encode(), mtime=0))
    assert read(path) == [text]
    path.write_bytes(gzip.compress(text.encode() * 100, mtime=0))
    assert "gzip -dk" in skipped(path)[0].remedy


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_that_is_too_long_is_not_stored(tmp_path: Path, name: str) -> None:
    reading, path = Reading(cut="lines", max_document_bytes=1000), tmp_path / name
    good = b'{"text": "good"}' if name == "a.jsonl" else b"good"
    path.write_bytes(good + b"\n" + b"x" * 2**24 + b"\n" + good)
    tracemalloc.start()
    try:
        texts = read(path, reading)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert texts == ["good", Skipped("too long"), "good"] and peak < 2**23
    assert skipped(path, reading)[0].place == "line 2"


def test_long_documents_are_cut_for_a_tokenizer(tmp_path: Path) -> None:
    """At a whole character; what is no UTF-8 inside of that is skipped as elsewhere."""
    path = tmp_path / "a.txt"
    path.write_text("\u20ac" * 100, encoding="utf-8")
    assert list(first_text([path], Reading(), 10)) == ["\u20ac" * 3]
    path.write_bytes(b"abc\xe2\x82")
    log = SkipLog()
    with pytest.raises(ValueError, match="hold no text"):
        list(first_text([path], Reading(), 10, log))
    assert log.counts == {"not UTF-8": 1}


def test_every_file_of_a_folder_is_read_or_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.TXT", "b.csv", "c.png", "sub/d.jsonl.zst", "sub/README", "sub/e.Md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    passed_over: list[Skipped] = []
    found = find_files([str(tmp_path)], passed_over)
    assert [path.name for path in found] == ["a.TXT", "e.Md"]
    named = {str(Path(one.file).relative_to(tmp_path)): one.remedy for one in passed_over}
    assert named == {
        "b.csv": "turn it into JSON lines, one object with the field text in each line",
        "c.png": "extract its text into a .txt file",
        "gone.txt": "name what it leads to",
        "linked": "name what it leads to",
        "sub/README": "rename it to end in .txt if it is text",
        "sub/d.jsonl.zst": "unpack it first",
    }


def test_fields_with_dots_in_their_names(tmp_path: Path) -> None:
    """The column that is proposed is one that works."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a": {"b.c": {"d": "deep"}, "e.f": "the longest text"}, "a.g": "flat"}))
    assert skipped(path)[0].remedy == "--column a.e.f"
    for column, text in (("a.e.f", "the longest text"), ("a.b.c.d", "deep"), ("a.g", "flat")):
        assert read(path, Reading(column)) == [text]


def test_an_array_inside_an_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"version": "1", "data": [{"text": "a"}]}')
    assert skipped(path)[0].remedy == f"jq -c '.[\"data\"][]' {path} > records.jsonl"


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is an error, and not passed over without a word."""
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "sub").mkdir()
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="sub"):
        find_files([str(tmp_path)])


def test_files_without_records_are_named(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", ""), ("b.jsonl", " \n\n"), ("c.json", "[]"), ("d.json", ""), ("e.txt", "")):
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name) == [Skipped("empty")], name


def test_a_read_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")

    def broken(path: str) -> io.BytesIO:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("open_mythos.data.records.open_utf8", broken)
    with pytest.raises(OSError, match=r"Input/output error: '.*a\.txt'"):
        read(path)
