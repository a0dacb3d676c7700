"""Row groups of parquet files, local or on the Hugging Face hub."""

import importlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from open_mythos.data.hub import first_line, is_remote, open_remote, remember
from open_mythos.extras import load

ROWS = 256
"""Rows decoded at a time."""


def row_group_bytes(files: list[str], progress: bool = False) -> list[list[int]]:
    """Uncompressed bytes of every row group of every file, from the files' footers."""
    remote = iter(remember([file for file in files if is_remote(file)], _sizes, progress))
    return [next(remote) if is_remote(file) else _sizes(file) for file in files]


def read_column(path: str, groups: range, column: str) -> Iterator[tuple[int, Any]]:
    """The values of a column in some row groups, each with the number of its row in the file, from 0 on.

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
        for batch in file.iter_batches(ROWS, groups, [column]):
            for value in _values(batch.column(batch.schema.names.index(place[0])), place[1:]):
                yield row, value
                row += 1


def _find(fields: Any, column: str) -> list[str] | None:
    """The names that lead to a column, through structs where it is in one; None if there is none."""
    names = [field.name for field in fields]
    if column in names:
        return [column]
    for name in names:
        if column.startswith(f"{name}.") and names.count(name) == 1 and _is_struct(fields.field(name).type):
            if (rest := _find(fields.field(name).type, column[len(name) + 1 :])) is not None:
                return [name, *rest]
    return None


def _names(fields: Any, prefix: str = "") -> list[str]:
    """The columns, with those in structs as `a.b`."""
    found: list[str] = []
    for field in fields:
        name = prefix + field.name
        found += _names(field.type, f"{name}.") if _is_struct(field.type) else [name]
    return found


def _is_struct(kind: Any) -> bool:
    return _arrow().types.is_struct(kind)


def _values(column: Any, names: list[str]) -> list[Any]:
    """The values of a column, or of a field in it: bytes for text, None for null."""
    arrow = _arrow()
    if names:
        compute: Any = importlib.import_module("pyarrow.compute")
        column = compute.struct_field(column, names)
    if isinstance(column, arrow.ExtensionArray):
        column = column.storage
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_string_view(kind):
        # One value that is not UTF-8 would make an error of the whole batch.
        column = column.cast(arrow.large_binary())
    return column.to_pylist()


def _sizes(path: str) -> list[int]:
    with _named(path):
        metadata = _remote_metadata(path) if is_remote(path) else _library().ParquetFile(path).metadata
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
    """A footer, which at a commit never changes: of 700 row groups of 10 columns half a megabyte, 6 in memory."""
    with open_remote(address) as file:
        return _library().ParquetFile(file).metadata


def _arrow() -> Any:
    return importlib.import_module("pyarrow")


def _library() -> Any:
    return load("pyarrow.parquet", "data", "parquet files")
