"""Columns of parquet files, local or on the Hugging Face hub, read row group by row group within bounded memory."""

import importlib
import itertools
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from open_mythos.data.hub import first_line, is_remote, open_remote, remember
from open_mythos.extras import load
from open_mythos.files import open_ordinary

ROWS, DECODED_BYTES = 256, 2**29
"""Rows decoded at a time, and about the most memory that they may take."""
MAX_DICTIONARY_BYTES = 2**26
"""Writers end a dictionary at about 1 MB."""
DICTIONARY_PAGE = 2
MAX_RATIO = 256
"""How many times as large as in the file a column's pages may be, once they are larger than `DECODED_BYTES`."""


def row_group_bytes(files: list[str], progress: bool = False) -> list[list[int]]:
    """Uncompressed bytes of every row group of every file, from the files' footers."""
    remote = iter(remember([file for file in files if is_remote(file)], _sizes, progress))
    return [next(remote) if is_remote(file) else _sizes(file) for file in files]


def read_column(path: str, groups: range, column: str) -> Iterator[tuple[int, Any]]:
    """Yield the values of a column in some row groups, each with the number of its row in the file, from 0 on.

    Text comes as its bytes, which need not be UTF-8. `a.b` is the column of that name, or the field b of the column a.

    Raises:
        ValueError: the file has no such column.
        OSError: the file cannot be read, or is damaged.
    """
    with _named(path), _open(path) as file:
        if (place := _find(file.schema_arrow, column)) is None:
            names = ", ".join(_names(file.schema_arrow))
            raise ValueError(f"column={column!r} is not in {path}, which has {names}; name one of these")
        row = sum(file.metadata.row_group(i).num_rows for i in range(groups.start))
        for batch in file.iter_batches(_rows_at_a_time(path, file.metadata, groups, column), groups, [column]):
            for value in _values(batch.column(batch.schema.names.index(place[0])), place[1:]):
                yield row, value
                row += 1


def _find(fields: Any, column: str) -> list[str] | None:
    """Return the names that lead to a column, through structs where it is in one; None if there is none."""
    names = [field.name for field in fields]
    if column in names:
        return [column]
    for name in names:
        if column.startswith(f"{name}.") and names.count(name) == 1 and _is_struct(fields.field(name).type):
            if (rest := _find(fields.field(name).type, column[len(name) + 1 :])) is not None:
                return [name, *rest]
    return None


def _names(fields: Any, prefix: str = "") -> list[str]:
    """Return the columns, with those in structs as `a.b`."""
    nested = ((prefix + f.name, f.type) for f in fields)
    parts = (_names(kind, f"{name}.") if _is_struct(kind) else [name] for name, kind in nested)
    return list(itertools.chain.from_iterable(parts))


def _is_struct(kind: Any) -> bool:
    return _arrow().types.is_struct(kind)


def _values(column: Any, names: list[str]) -> list[Any]:
    """Return the values of a column, or of a field in it: bytes for text, None for null."""
    arrow = _arrow()
    if names:
        compute: Any = importlib.import_module("pyarrow.compute")
        column = compute.struct_field(column, names)
    if isinstance(column, arrow.ExtensionArray):
        column = column.storage
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.type in (arrow.string(), arrow.large_string(), arrow.string_view()):
        # One value that is not UTF-8 would make an error of the whole batch.
        column = column.cast(arrow.large_binary())
    return column.to_pylist()


def _rows_at_a_time(path: str, metadata: Any, groups: range, column: str) -> int:
    """Return how many rows to decode at once: fewer than `ROWS` where one value may be very long.

    A few bytes of a file can stand for many of text: pages are compressed, and a dictionary, or the encoding of a value
    by what it shares with the one before it, repeats a long value in every row.

    Raises:
        OSError: a dictionary or a column is unpacked to far more than any writer makes.
    """
    longest = 1
    for i, j in itertools.product(groups, range(metadata.num_columns)):
        chunk = metadata.row_group(i).column(j)
        if not f"{chunk.path_in_schema}.".startswith(f"{column}."):
            continue
        packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
        dictionary = _dictionary_bytes(path, chunk)
        if dictionary > MAX_DICTIONARY_BYTES or unpacked > max(DECODED_BYTES, MAX_RATIO * packed):
            raise OSError(
                f"{path} has in row group {i} a column {column!r} of {packed} bytes that unpacks to {unpacked}, with a "
                f"dictionary of {dictionary} (at most {MAX_DICTIONARY_BYTES}); write the file again, or leave it out"
            )
        shares = "DELTA_BYTE_ARRAY" in chunk.encodings
        longest = max(longest, unpacked if shares else dictionary)
    return max(1, min(ROWS, DECODED_BYTES // longest))


def _dictionary_bytes(path: str, chunk: Any) -> int:
    """Return the bytes of a column's dictionary once it is unpacked, from the header of its first page; 0 without one.

    The header is a structure of Thrift's compact protocol: the kind of page, then its size, both as zigzag varints.
    """
    start = min(x for x in (chunk.dictionary_page_offset, chunk.data_page_offset) if x)
    with open_remote(path) if is_remote(path) else open_ordinary(Path(path)) as file:
        file.seek(start)
        header = file.read(16) + bytes(4)
    # A byte says a field's type and number. Seven bits a byte follow, the lowest first; the last byte is below 128.
    kind, size = (
        sum((byte & 0x7F) << 7 * i for i, byte in enumerate(value)) >> 1
        for value in re.findall(rb"(?s).([\x80-\xff]*[\x00-\x7f]?)", header)[:2]
    )
    return size if kind == DICTIONARY_PAGE else 0


def _sizes(path: str) -> list[int]:
    with _named(path):
        metadata = _remote_metadata(path) if is_remote(path) else _library().read_metadata(path)
        return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


@contextmanager
def _named(path: str) -> Generator[None]:
    """Errors of what is inside become an OSError that names the file."""
    _library()
    # Not when it is needed: generators are closed when the interpreter ends, and then nothing can be imported.
    damaged = _arrow().ArrowInvalid
    try:
        yield
    except damaged as error:
        raise OSError(f"{path} is damaged ({error}); get it again") from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # the hub's HTTP client raises its own kinds, which differ by version
        raise OSError(f"{path} cannot be read ({first_line(error)}); check the connection") from error


@contextmanager
def _open(path: str) -> Generator[Any]:
    if not is_remote(path):
        with _library().ParquetFile(path) as file:
            yield file
        return
    # Buffered ahead, which makes one request of all the pages that are asked for.
    with open_remote(path) as source:
        yield _library().ParquetFile(source, metadata=_remote_metadata(path), pre_buffer=True)


@lru_cache(maxsize=16)
def _remote_metadata(address: str) -> Any:
    """Return a footer, which never changes at a commit. With 700 row groups of 10 columns it takes 6 MB of memory."""
    with open_remote(address) as file:
        return _library().ParquetFile(file).metadata


def _arrow() -> Any:
    return importlib.import_module("pyarrow")


def _library() -> Any:
    return load("pyarrow.parquet", "data", "parquet files")
