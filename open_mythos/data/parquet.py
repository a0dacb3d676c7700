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


def read_column(path: str, groups: range, column: str) -> Iterator[Any]:
    """The values of a column in some row groups.

    Raises:
        ValueError: the file has no such column.
        OSError: the file cannot be read, or is damaged.
    """
    with _named(path), _open(path) as file:
        if column not in (names := file.schema_arrow.names):
            raise ValueError(f"column={column!r} is not in {path}, which has {', '.join(names)}; name one of these")
        for batch in file.iter_batches(ROWS, groups, [column]):
            yield from batch.column(0).to_pylist()


def _sizes(path: str) -> list[int]:
    with _named(path):
        metadata = _remote_metadata(path) if is_remote(path) else _library().ParquetFile(path).metadata
        return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


@contextmanager
def _named(path: str) -> Generator[None]:
    """Errors of what is inside become an OSError that names the file."""
    _library()
    # Not when it is needed: generators are closed when the interpreter ends, and then nothing can be imported.
    damaged = importlib.import_module("pyarrow").ArrowInvalid
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


def _library() -> Any:
    return load("pyarrow.parquet", "data", "parquet files")
