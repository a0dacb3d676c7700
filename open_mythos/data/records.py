"""Records of files, each with its place: lines and paragraphs of text, JSON values, rows of parquet."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

from open_mythos.checks import check_choice, check_int
from open_mythos.data.json_values import BadJson, json_values
from open_mythos.data.parquet import read_column
from open_mythos.data.skipped import Skipped
from open_mythos.data.text_files import convert_command, has_byte_lines, open_utf8

Cut = Literal["file", "paragraphs", "lines"]
Record = tuple[int, bytes | str | Skipped]
"""The number of a record, which `place` makes a place in its file of, and its text or why there is none."""
WHOLE = -1
"""The number of a record that is all of its file."""

JSON_ROOM, JSON_BYTES = 4, 2**20
"""How many times as long as the longest document its JSON record may be, and how many bytes it may be in any case:
escapes take room, and so do other fields."""


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
    """Settings for reading documents from files."""

    column: str = "text"
    """The field of a JSON record, or the column of a parquet file, that holds the text; a.b is the field b of a."""
    cut: Cut = "file"
    """Documents of a text file: all of it, every paragraph (separated by blank lines), or every line."""
    max_document_bytes: int = 50 * 2**20
    """A longer document is skipped."""

    def __post_init__(self) -> None:
        check_choice("cut", self.cut, get_args(Cut))
        check_int("max_document_bytes", self.max_document_bytes, 1)


def place(unit: Unit, number: int) -> str:
    """Return the place of a record in its file, in words; empty if it is the whole file."""
    # The number of a line is known from the beginning of the file on; see `name_lines`.
    name = {"parquet": "row", "json": "record"}.get(unit.kind, "byte" if unit.start else "line")
    return "" if number == WHOLE else f"{name} {number}"


def read_records(unit: Unit, reading: Reading) -> Iterator[Record]:
    """Yield the records of a unit, in order."""
    if unit.kind == "text":
        yield from _text_records(unit, reading)
    elif unit.kind == "parquet":
        for row, text in read_column(unit.path, range(unit.start, unit.end), reading.column):
            missing = Skipped("no text in the record", f"{reading.column} is {'null' if text is None else 'no text'}")
            yield row, text if isinstance(text, str | bytes) else missing
    else:
        for number, value in json_records(unit, JSON_ROOM * reading.max_document_bytes + JSON_BYTES):
            yield number, value if isinstance(value, Skipped) else _text_of(value, reading.column, unit.path)


def conversion(unit: Unit) -> str:
    """Return what to do about a record that is not UTF-8."""
    if unit.kind == "parquet":
        return "write the column anew as UTF-8, or take the row out"
    command = convert_command(unit.path)
    return command if unit.kind == "text" else f"correct it, or if all of the file is in another encoding: {command}"


def too_long(unit: Unit, reading: Reading) -> Skipped:
    cut = ", or cut it with --cut paragraphs" if unit.kind == "text" and reading.cut == "file" else ""
    why = f"more than {reading.max_document_bytes / 2**20:.4g} MiB"
    return Skipped("too long", why, f"raise --max-document-mb{cut}")


def _text_records(unit: Unit, reading: Reading) -> Iterator[Record]:
    most = reading.max_document_bytes
    if reading.cut == "lines":
        for number, line in _lines(unit, most + 2):
            yield number, too_long(unit, reading) if line is None else line.rstrip(b"\r\n")
    elif reading.cut == "file":
        with open_utf8(unit.path) as file:
            yield WHOLE, file.read(most + 1)
    else:
        yield from _paragraphs(unit, reading)


def _paragraphs(unit: Unit, reading: Reading) -> Iterator[Record]:
    paragraph, size, first = list[bytes](), 0, 0
    for number, line in chain(_lines(unit, reading.max_document_bytes + 2), [(0, b"")]):
        if line is None or line.strip():
            first = first or number
            size += len(line) if line is not None else reading.max_document_bytes + 1
            if line is not None and size <= reading.max_document_bytes:
                paragraph.append(line)
        elif first:
            is_whole = size <= reading.max_document_bytes
            yield first, b"".join(paragraph) if is_whole else too_long(unit, reading)
            paragraph, size, first = [], 0, 0


def json_records(unit: Unit, max_bytes: int) -> Iterator[tuple[int, Any]]:
    """Yield the values of a JSON file or of JSON lines with their numbers; a `Skipped` for what is no JSON.

    Args:
        max_bytes: of a value; a longer one is skipped.
    """
    if unit.kind == "json":
        n = 0
        with open_utf8(unit.path) as file:
            try:
                for n, value in enumerate(json_values(file, max_bytes), 1):
                    yield n, value
            except BadJson as error:
                remedy = "correct it, or name it .jsonl if each line is a record; python -m json.tool finds the place"
                why = f"no JSON from there on: {error}"
                yield n + 1, Skipped("no text in the record", why, remedy)
        return
    for number, line in _lines(unit, max_bytes):
        if line is None:
            yield number, Skipped("too long", f"the record has more than {max_bytes:,} bytes", "make it shorter")
        elif line.strip():
            try:
                yield number, json.loads(line.decode("utf-8"))
            except UnicodeError:
                yield number, Skipped("not UTF-8", "", conversion(unit))
            except (ValueError, RecursionError) as error:
                why = "nested too deeply" if isinstance(error, RecursionError) else f"no JSON: {error}"
                yield number, Skipped("no text in the record", why, "make each line one JSON object")


def _text_of(record: Any, column: str, path: str) -> str | Skipped:
    """Return the text of a JSON record."""
    if not isinstance(record, dict):
        return Skipped("no text in the record", "it is no object", f'make it one: {{"{column}": "..."}}')
    value = _look_up(record, column)
    if isinstance(value, str):
        return value
    others = f"it has {', '.join(record):.100}" if record else "it has no fields"
    why = f"{column} is null" if column in record else f"no {column}; {others}"
    if value is not None:
        why = f"{column} is no text but {json.dumps(value):.40}"
    return Skipped("no text in the record", why, _suggest(record, path))


def _look_up(record: Any, column: str) -> Any:
    """Return the field `column`, or field b of a for the name a.b (either may contain dots), or None."""
    if not isinstance(record, dict) or column in record:
        return record[column] if isinstance(record, dict) else None
    dots = [i for i, c in enumerate(column) if c == "."]
    found = (_look_up(record[column[:i]], column[i + 1 :]) for i in dots if column[:i] in record)
    return next((value for value in found if value is not None), None)


def _suggest(record: dict[str, Any], path: str) -> str:
    """Return what to type to read a record of which the column has no text."""
    if any(name in record for name in ("messages", "conversations", "instruction")):
        return f"conversations are for: mythos train chat --init-from RUN/final --data.paths {shlex.quote(path)}"
    for name, inner in record.items():
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            return f"jq -c {shlex.quote(f'.[{json.dumps(name)}][]')} {shlex.quote(path)} > records.jsonl"
    texts = {name: value for name, value in record.items() if isinstance(value, str)}
    for name, inner in record.items():
        if isinstance(inner, dict):
            texts |= {f"{name}.{key}": value for key, value in inner.items() if isinstance(value, str)}
    longest = max(texts, key=lambda name: len(texts[name]), default=None)
    return "take it out" if longest is None else f"--column {shlex.quote(longest)}"


def _lines(unit: Unit, most: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line that begins inside the unit, line break included, with its position.

    The position is the line number, from 1, if the unit starts at byte 0, otherwise the line's byte offset in the file.

    The last line may extend past the end of the unit. A line of more than `most` bytes is None, so that memory stays
    bounded. A file without `has_byte_lines` is read to its end.
    """
    with open_utf8(unit.path) as file:
        is_part = has_byte_lines(unit.path)
        if unit.start:
            file.seek(unit.start - 1)
            _pass_line(file)  # the rest of a line that begins in the unit before
        number = 0
        while not is_part or file.tell() < unit.end:
            number = file.tell() if unit.start else number + 1
            line = file.readline(most + 1)
            if not line:
                return
            if len(line) > most and not line.endswith(b"\n"):
                _pass_line(file)
                yield number, None
            else:
                yield number, line


def _pass_line(file: Any) -> None:
    """Read to the end of a line without storing it."""
    while (part := file.readline(2**20)) and not part.endswith(b"\n"):
        pass


def name_lines(path: str, places: Sequence[str]) -> list[str]:
    """Places of one file, in order, with the numbers of lines for those that are bytes. The file is read once."""
    named, n, at = [], 1, 0
    with open(path, "rb") as file:
        for place in places:
            kind, _, number = place.partition(" ")
            while kind == "byte" and at < int(number):
                part = file.read(min(2**20, int(number) - at))
                if not part:
                    break
                n, at = n + part.count(b"\n"), at + len(part)
            named.append(f"line {n}" if kind == "byte" else place)
    return named
