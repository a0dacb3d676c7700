"""Documents from files of text, JSON and parquet. Files are cut into units, which workers read independently."""

import codecs
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from open_mythos.data.hub import is_remote
from open_mythos.data.parquet import row_group_bytes
from open_mythos.data.records import Reading, Unit, conversion, json_records, place, read_records, too_long
from open_mythos.data.skipped import SkipLog, Skipped, unknown_kind
from open_mythos.data.text_files import DAMAGE, ENDINGS, Unreadable, explain, has_byte_lines, kind_of
from open_mythos.tokenization.tokenizer import Tokenizer

UNIT_BYTES = 8 * 2**20
"""About how much of a file one unit covers: seconds of work, which is what an interruption can lose."""


def find_files(inputs: list[str], passed_over: list[Skipped] | None = None) -> list[Path]:
    """Return the files named, and those of known kinds in the folders named, in order of their names.

    Args:
        passed_over: gets the files in the folders that are of no known kind, and what is no regular file.

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
            found, others = _search(path)
            if not found:
                there = f" ({others[0].file}: {others[0].why or others[0].reason})" if others else ""
                raise FileNotFoundError(f"folder {path} holds no {', '.join(ENDINGS)} file{there}; name another")
            files += found
            if passed_over is not None:
                passed_over += others
        elif not path.is_file():
            raise FileNotFoundError(f"input {path} does not exist; name a file or a folder")
        elif kind_of(path) is None:
            remedy = f"use files that end in {', '.join(ENDINGS)}, or .gz behind one of them"
            raise ValueError(f"input {path} is of no known kind; {remedy}: {unknown_kind(name, path.suffix).remedy}")
        else:
            files.append(path)
    if twice := [path for path, n in Counter(files).items() if n > 1]:
        raise ValueError(f"input {twice[0]} is named twice; name it once")
    return files


def _search(folder: Path) -> tuple[list[Path], list[Skipped]]:
    """Return the files of a folder and of the folders in it: those that are read, and the others."""

    def refuse(error: OSError) -> None:
        raise error  # a folder that cannot be listed, which `rglob` passes over

    paths = [Path(top) / name for top, *names in os.walk(folder, onerror=refuse) for name in chain(*names)]
    found, others = [], []
    for path in sorted(paths):
        if not path.is_file():
            if path.is_symlink() or not path.is_dir():
                why = "a link to a folder" if path.is_dir() else "no regular file, or a link to nothing"
                others.append(Skipped("unknown kind of file", why, "name what it leads to", file=str(path)))
        elif kind_of(path) is None:
            others.append(unknown_kind(str(path), path.suffix.lower()))
        else:
            found.append(path)
    return found, others


def cut_into_units(
    files: Sequence[str | Path], reading: Reading, unit_bytes: int = UNIT_BYTES, *, progress: bool = False
) -> list[Unit]:
    """Return the units of all files. They depend on the files alone, so another run on the same files has the same."""
    names = [str(file) for file in files]
    parquet = [name for name in names if kind_of(name) == "parquet"]
    sizes = dict(zip(parquet, row_group_bytes(parquet, progress), strict=True))
    return [unit for name in names for unit in _cut(name, reading, unit_bytes, sizes.get(name, []))]


def _cut(path: str, reading: Reading, unit_bytes: int, sizes: list[int]) -> list[Unit]:
    """Return the units of one file; `sizes` are the bytes of its row groups."""
    kind = kind_of(path)
    assert kind is not None
    if kind != "parquet":
        size = Path(path).stat().st_size
        # A file that is one document cannot be cut, nor can paragraphs be told apart from the middle of one.
        in_lines = kind == "jsonl" or (kind == "text" and reading.cut == "lines")
        cuttable = size and in_lines and has_byte_lines(path)
        edges = [*range(0, size, unit_bytes), size] if cuttable else [0, size]
        return [Unit(path, kind, start, end, end - start) for start, end in pairwise(edges)]
    edges = [0]
    for i in range(len(sizes)):
        if sum(sizes[edges[-1] : i + 1]) >= unit_bytes:
            edges.append(i + 1)
    edges += [len(sizes)] * (edges[-1] < len(sizes) or not sizes)
    return [Unit(path, kind, start, end, sum(sizes[start:end])) for start, end in pairwise(edges)]


def read_documents(unit: Unit, reading: Reading, *, clip: bool = False) -> Iterator[str | Skipped]:
    """Yield the documents of a unit, in order, with a `Skipped` in the place of each record that is none.

    Args:
        clip: cut a document that is too long instead of skipping it.

    Raises:
        OSError: the file cannot be read.
    """
    for at, record in _undamaged(read_records(unit, reading), unit):
        document = record if isinstance(record, Skipped) else _document(record, unit, reading, clip)
        yield replace(document, place=at, file=unit.path) if isinstance(document, Skipped) else document


def read_values(unit: Unit, max_bytes: int) -> Iterator[tuple[str, Any]]:
    """Yield the places and JSON values of a unit, with a `Skipped` for each that is not JSON or too long."""
    return _undamaged(json_records(unit, max_bytes), unit)


def _undamaged(records: Iterator[tuple[int, Any]], unit: Unit) -> Iterator[tuple[str, Any]]:
    """Yield the records and their places, and a `Skipped` for the rest of the file where its contents are damaged.

    Raises:
        OSError: the file cannot be read.
    """
    at = None
    try:
        for number, record in records:
            at = place(unit, number)
            yield at, record
        if at is None and unit.kind != "text" and unit.start == 0:
            # A parquet file without row groups has one unit of none.
            if unit.end == (0 if unit.kind == "parquet" else Path(unit.path).stat().st_size):
                yield "", Skipped("empty", "it has no records")
    except (Unreadable, *DAMAGE) as error:
        yield f"behind {at}" if at else "", explain(error, unit.path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, unit.path) from error


def encode(text: str, tokenizer: Tokenizer) -> np.ndarray | Skipped:
    """Return the ids of a document, (tokens,) int64; the last is the end token."""
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.int64)
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        return Skipped("ids out of range")
    return ids


def place_of(text: str) -> float:
    """Return the place of a document in [0, 1), from a hash of its text: it is for validation at all larger shares.

    Its text alone decides, so all copies of it are on the same side.
    """
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:6], "big") / 2**48


def first_text(
    files: Sequence[str | Path], reading: Reading, n_bytes: int, skipped: SkipLog | None = None
) -> Iterator[str]:
    """Yield the first documents of the files, until they hold `n_bytes`; the last one is cut.

    Args:
        skipped: gets what is skipped before that.

    Raises:
        ValueError: there is no text at all.
    """
    skipped = SkipLog() if skipped is None else skipped
    reading = replace(reading, max_document_bytes=min(n_bytes, reading.max_document_bytes))
    left = n_bytes
    # File by file, since the footer of one on the hub is a request.
    units = chain.from_iterable(cut_into_units([file], reading) for file in files)
    for text in chain.from_iterable(read_documents(unit, reading, clip=True) for unit in units):
        if isinstance(text, Skipped):
            skipped.add(text)
            continue
        yield text[:left]
        left -= len(text.encode("utf-8"))
        if left <= 0:
            return
    if left == n_bytes:
        raise ValueError(
            f"the files hold no text (skipped: {dict(skipped.counts) or 'none'}); name others, or another column"
        )


def fingerprint(unit: Unit) -> dict[str, Any]:
    """Return what identifies a unit: its place, and size and time of a local file. A commit never changes."""
    place = {"path": unit.path, "kind": unit.kind, "start": unit.start, "end": unit.end}
    if is_remote(unit.path):
        return place
    stat = Path(unit.path).stat()
    return {**place, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _document(record: bytes | str, unit: Unit, reading: Reading, clip: bool) -> str | Skipped:
    most = reading.max_document_bytes
    clip = clip and len(record) > most
    if clip:
        record = record[:most]
    elif len(record) > most:
        return too_long(unit, reading)
    try:
        # Without an end, half a character that is left by the cut is left out.
        text = codecs.utf_8_decode(record, "strict", not clip)[0] if isinstance(record, bytes) else record
        # A JSON string may hold half of a surrogate pair, which is no text either.
        n_bytes = len(record) if isinstance(record, bytes) else len(text.encode("utf-8"))
    except UnicodeDecodeError as error:
        return Skipped("not UTF-8", f"byte {error.object[error.start]} at {error.start}", conversion(unit))
    except UnicodeEncodeError as error:
        what = f"half of a surrogate pair at character {error.start}"
        # Bytes that were not UTF-8 are such halves by now.
        is_byte = 0xDC80 <= ord(text[error.start]) <= 0xDCFF and unit.kind == "json"
        return Skipped("not UTF-8", "" if is_byte else what, conversion(unit) if is_byte else "correct the record")
    if n_bytes > most and not clip:
        return too_long(unit, reading)
    if unit.kind == "text":
        text = text.replace("\r\n", "\n")
    return text if text.strip() else Skipped("empty")
