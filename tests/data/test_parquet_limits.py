"""Parquet files of a few kilobytes that would unpack to gigabytes."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from open_mythos.data import parquet
from open_mythos.data.parquet import MAX_DICTIONARY_BYTES, read_column

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def write(path: Path, column: Any, **options: Any) -> str:
    pq.write_table(pa.table({"text": column, "other": pa.nulls(len(column))}), path, compression="zstd", **options)
    return str(path)


def values(path: str) -> list[Any]:
    """The column, whether it comes as values or with the numbers of their rows."""
    return [each[1] if isinstance(each, tuple) else each for each in read_column(path, range(1), "text")]


def test_a_large_dictionary_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["x" * (MAX_DICTIONARY_BYTES + 1)], dictionary_pagesize_limit=2**30)
    assert Path(path).stat().st_size < 10_000
    with pytest.raises(OSError, match=r"a\.parquet has in row group 0 a column 'text' of \d+ bytes .* dictionary of"):
        values(path)


def test_pages_that_unpack_to_far_more_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "DECODED_BYTES", 2**20)
    path = write(tmp_path / "a.parquet", ["x" * 2**14 + str(i) for i in range(1000)], use_dictionary=False)
    with pytest.raises(OSError, match=r"that unpacks to 16"):
        values(path)
    path = write(tmp_path / "b.parquet", ["x" * 2**14 + str(i) for i in range(50)], use_dictionary=False)
    assert len(values(path)) == 50


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}])
def test_a_long_value_in_every_row_is_decoded_a_few_rows_at_a_time(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "DECODED_BYTES", 2**22)
    monkeypatch.setattr(parquet, "MAX_RATIO", 2**30)
    path = write(tmp_path / "a.parquet", ["x" * 2**20] * 64, dictionary_pagesize_limit=2**30, **options)
    tracemalloc.start()
    n = sum(len(each[1] if isinstance(each, tuple) else each) for each in read_column(path, range(1), "text"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 64 * 2**20 and peak < 16 * 2**20


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_ordinary_files_are_read_by_256_rows(compression: str, use_dictionary: bool, tmp_path: Path) -> None:
    texts = [f"the cat sat {i} on the mat" * 20 for i in range(3000)]
    pq.write_table(
        pa.table({"text": texts}), tmp_path / "a.parquet", compression=compression, use_dictionary=use_dictionary
    )
    metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
    assert parquet._rows_at_a_time(str(tmp_path / "a.parquet"), metadata, range(1), "text") == 256
