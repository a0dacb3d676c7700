"""Documents out of files: plain text, JSON lines and parquet, cut into units that workers read on their own."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from open_mythos.checks import check_choice, check_int
from open_mythos.data.hub import is_remote
from open_mythos.data.parquet import read_column, row_group_bytes
from open_mythos.tokenizer import Tokenizer

Cut = Literal["file", "paragraphs", "lines"]

READERS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
"""The kind of file by the end of its name."""
UNIT_BYTES = 8 * 2**20
"""About how much of a file one unit covers: seconds of work, which is what an interruption can lose."""


@dataclass(frozen=True)
class Unit:
    """A part of one file: bytes [start, end) of text or JSON lines, row groups [start, end) of parquet."""

    path: str
    """Or the address of a file on the hub."""
    kind: str
    start: int
    end: int
    n_bytes: int
    """About how much there is to read, for the progress bar."""


@dataclass(frozen=True)
class Reading:
    """How documents are taken out of files."""

    column: str = "text"
    """The field of a JSON line, or the column of a parquet file, that holds the text."""
    cut: Cut = "file"
    """What of a text file is a document: all of it, every paragraph (blank lines between), or every line."""
    max_document_bytes: int = 50 * 2**20
    """A longer document is skipped."""

    def __post_init__(self) -> None:
        check_choice("cut", self.cut, get_args(Cut))
        check_int("max_document_bytes", self.max_document_bytes, 1)


@dataclass(frozen=True)
class Skipped:
    """A record that gave no document, and why."""

    reason: Literal["empty", "not UTF-8", "too long", "no text in the record", "ids out of range"]


def find_files(inputs: list[str]) -> list[Path]:
    """The files named, and those of known kinds in the folders named, in order of their names.

    Raises:
        FileNotFoundError: an input is absent, or a folder holds no file of a known kind.
        ValueError: nothing is named, a file is of no known kind, or is named twice.
    """
    if not inputs:
        raise ValueError("no input is named; name files or folders")
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in READERS and p.is_file())
            if not found:
                raise FileNotFoundError(f"folder {path} holds no {', '.join(READERS)} file; name another")
            files += found
        elif not path.is_file():
            raise FileNotFoundError(f"input {path} does not exist; name a file or a folder")
        elif path.suffix not in READERS:
            raise ValueError(f"input {path} is of no known kind; use files that end in {', '.join(READERS)}")
        else:
            files.append(path)
    if twice := [path for path, n in Counter(files).items() if n > 1]:
        raise ValueError(f"input {twice[0]} is named twice; name it once")
    return files


def cut_into_units(
    files: Sequence[str | Path], reading: Reading, unit_bytes: int = UNIT_BYTES, *, progress: bool = False
) -> list[Unit]:
    """The units of all files. They depend on the files alone, so another run on the same files has the same."""
    names = [str(file) for file in files]
    parquet = [name for name in names if _kind(name) == "parquet"]
    sizes = dict(zip(parquet, row_group_bytes(parquet, progress), strict=True))
    return [unit for name in names for unit in _cut(name, reading, unit_bytes, sizes.get(name, []))]


def _cut(path: str, reading: Reading, unit_bytes: int, sizes: list[int]) -> list[Unit]:
    """The units of one file; `sizes` are the bytes of its row groups."""
    kind = _kind(path)
    if kind != "parquet":
        # A file that is one document cannot be cut, nor can paragraphs be told apart from the middle of one.
        whole = kind == "text" and reading.cut != "lines"
        size = Path(path).stat().st_size
        edges = [0, size] if whole else [*range(0, size, unit_bytes), size]
        return [Unit(path, kind, start, end, end - start) for start, end in pairwise(edges)]
    edges = [0]
    for i in range(len(sizes)):
        if sum(sizes[edges[-1] : i + 1]) >= unit_bytes:
            edges.append(i + 1)
    edges += [len(sizes)] * (edges[-1] < len(sizes))
    return [Unit(path, kind, start, end, sum(sizes[start:end])) for start, end in pairwise(edges)]


def _kind(path: str) -> str:
    return READERS[Path(path).suffix]


def read_documents(unit: Unit, reading: Reading) -> Iterator[str | Skipped]:
    """The documents of a unit, in order, with a `Skipped` in the place of each record that is none."""
    for record in _RECORDS[unit.kind](unit, reading):
        yield _document(record, reading)


def encode(text: str, tokenizer: Tokenizer) -> np.ndarray | Skipped:
    """The ids of a document, (tokens,) int64; the last is the end token."""
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.int64)
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        return Skipped("ids out of range")
    return ids


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is for validation. Its text alone decides, so all copies of it are on the same side."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:6], "big") / 2**48 < share


def first_text(files: Sequence[str | Path], reading: Reading, n_bytes: int) -> Iterator[str]:
    """The first documents of the files, until they hold `n_bytes`; the last one is cut.

    Raises:
        ValueError: there is no text at all.
    """
    skipped: Counter[str] = Counter()
    left = n_bytes
    # File by file, since the footer of one on the hub is a request.
    units = (unit for file in files for unit in cut_into_units([file], reading))
    for unit in units:
        for text in read_documents(unit, reading):
            if isinstance(text, Skipped):
                skipped[text.reason] += 1
                continue
            yield text[:left]
            left -= len(text.encode("utf-8"))
            if left <= 0:
                return
    if left == n_bytes:
        raise ValueError(f"the files hold no text (skipped: {dict(skipped) or 'none'}); name others, or another column")


def fingerprint(unit: Unit) -> dict[str, Any]:
    """What tells whether a unit is still the same: its place, and size and time of the file. A commit never changes."""
    place = {"path": unit.path, "kind": unit.kind, "start": unit.start, "end": unit.end}
    if is_remote(unit.path):
        return place
    stat = Path(unit.path).stat()
    return {**place, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _document(record: bytes | str | Skipped, reading: Reading) -> str | Skipped:
    if isinstance(record, Skipped):
        return record
    if len(record) > reading.max_document_bytes:
        return Skipped("too long")
    try:
        text = record.decode("utf-8") if isinstance(record, bytes) else record
        # A JSON string may hold half of a surrogate pair, which is no text either.
        n_bytes = len(record) if isinstance(record, bytes) else len(text.encode("utf-8"))
    except UnicodeError:
        return Skipped("not UTF-8")
    if n_bytes > reading.max_document_bytes:
        return Skipped("too long")
    return text if text.strip() else Skipped("empty")


def _text_records(unit: Unit, reading: Reading) -> Iterator[bytes]:
    if reading.cut == "lines":
        yield from (line.rstrip(b"\r\n") for line in _lines(unit))
        return
    if reading.cut == "file":
        yield Path(unit.path).read_bytes()
        return
    paragraph: list[bytes] = []
    for line in _lines(unit):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield b"".join(paragraph)
            paragraph = []
    if paragraph:
        yield b"".join(paragraph)


def _json_records(unit: Unit, reading: Reading) -> Iterator[str | Skipped]:
    for line in _lines(unit):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeError:
            yield Skipped("not UTF-8")
            continue
        except (ValueError, RecursionError):
            yield Skipped("no text in the record")
            continue
        text = record.get(reading.column) if isinstance(record, dict) else None
        yield text if isinstance(text, str) else Skipped("no text in the record")


def _parquet_records(unit: Unit, reading: Reading) -> Iterator[str | Skipped]:
    for text in read_column(unit.path, range(unit.start, unit.end), reading.column):
        yield text if isinstance(text, str) else Skipped("no text in the record")


def _lines(unit: Unit) -> Iterator[bytes]:
    """The lines that begin inside the unit; the last one may end behind it."""
    with open(unit.path, "rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # the byte order mark of some editors
            file.seek(0)
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()  # the rest of a line that begins in the unit before
        while file.tell() < unit.end and (line := file.readline()):
            yield line


_RECORDS = {"text": _text_records, "jsonl": _json_records, "parquet": _parquet_records}
