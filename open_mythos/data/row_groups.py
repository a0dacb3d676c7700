"""Row groups of parquet files as one list with random access, local or on the hub."""

import hashlib
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from open_mythos.data.documents import find_files, read_documents
from open_mythos.data.hub import HubDataset, first_line, is_remote
from open_mythos.data.parquet import row_group_bytes
from open_mythos.data.records import Reading, Unit
from open_mythos.data.skipped import Skipped
from open_mythos.data.text_files import kind_of

WAITS_S = (1.0, 4.0, 16.0, 64.0)
"""Before each further try to read a row group of the hub."""


class RowGroups:
    """All row groups of some parquet files, in order of the files' names.

    Raises:
        ValueError: a file is no parquet file, or all are empty.
    """

    def __init__(self, dataset: HubDataset | Path, reading: Reading) -> None:
        if isinstance(dataset, Path):
            self._files = [str(path) for path in find_files([str(dataset)])]
        else:
            self._files = dataset.files()
        if other := [file for file in self._files if kind_of(file) != "parquet"]:
            raise ValueError(f"{other[0]} is no parquet file, which a stream reads; use mythos prepare-data for others")
        sizes = row_group_bytes(self._files, progress=True)
        if isinstance(dataset, Path):
            names = [str(Path(file).relative_to(dataset)) for file in self._files]
            contents = list(zip(names, sizes, strict=True))
            self.commit = hashlib.sha1(repr(contents).encode(), usedforsecurity=False).hexdigest()
        else:
            self.commit = self._files[0].partition("@")[2].partition("/")[0]
        self._ends = np.cumsum([len(size) for size in sizes])
        self._reading = reading
        if not len(self):
            raise ValueError(f"the parquet files of {dataset} hold no rows; use others")

    def digest(self) -> str:
        """Return the SHA-256 of local files' sizes and footers, which hold the places and statistics of all columns.

        It is quick, and misses bytes that were changed in the middle of a file.
        """
        hasher = hashlib.sha256()
        for path in map(Path, self._files):
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(-8, os.SEEK_END)
                footer = int.from_bytes(file.read(4), "little") + 8
                file.seek(-min(footer, size), os.SEEK_END)
                hasher.update(size.to_bytes(8, "little") + file.read())
        return hasher.hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, i: int, first: int = 0) -> Iterator[str | Skipped]:
        """Yield the documents of row group i from row `first` on, and a `Skipped` for each row without one.

        Raises:
            OSError: the row group cannot be read, however often that is tried.
        """
        file = int(np.searchsorted(self._ends, i, side="right"))
        group = i - int(self._ends[file - 1] if file else 0)
        unit = Unit(self._files[file], "parquet", group, group + 1, 0)
        waits = WAITS_S if is_remote(unit.path) else ()
        for wait in (*waits, None):
            try:
                for document in islice(read_documents(unit, self._reading), first, None):
                    first += 1
                    yield document
                return
            except OSError as error:
                if wait is None:
                    raise OSError(
                        f"row group {group} of {unit.path} cannot be read ({first_line(error)}; tries: "
                        f"{len(waits) + 1}); check the connection or the file, and go on with --resume"
                    ) from error
                time.sleep(wait)
