"""Token shards: what `prepare` writes and training reads.

    folder/
      dataset.json              counts, settings and the shards with their SHA-256; written last
      train/00000.bin           tokens one after another, uint16 or uint32, little-endian
      train/00000.ends          where each document ends in it, int64
      validation/00000.bin ...
      tokenizer files

Every document ends with the tokenizer's end token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from open_mythos.checks import check_choice, check_int, check_text, shown
from open_mythos.files import blamed_on, inside, read_json, sha256, to_disk, writing
from open_mythos.tokenization.tokenizer import HUB_FILE, HUB_ROLES, OWN_FILE

FORMAT = 1
INDEX = "dataset.json"
SPLITS = ("train", "validation")
DTYPES = ("uint16", "uint32")
GO_ON = "make room and repeat the command, which goes on from here"
"""The remedy for a full disk."""
MAX_INDEX_BYTES = 2**27
"""Bytes of the largest `dataset.json` that is read: about 600,000 shards."""
MAX_COUNT = 2**40
"""The most tokens, documents or bytes of one shard."""


@dataclass(frozen=True)
class Shard:
    """The documents of one unit in one split."""

    path: str
    """Path of the tokens, relative to the folder; the ends of documents are beside it, under `.ends`."""
    tokens: int
    documents: int
    bytes: int
    """Bytes of the documents' text in UTF-8."""
    sha256: str
    """Digest of the tokens' file followed by the ends' file."""

    def __post_init__(self) -> None:
        check_text("path", self.path)
        if not Path(self.path).name:
            raise ValueError(f"path={shown(self.path)} must name a file, such as train/00000.bin")
        if not isinstance(self.sha256, str):
            raise TypeError(f"sha256={shown(self.sha256)} must be a string")
        for name in ("tokens", "documents", "bytes"):
            check_int(name, getattr(self, name), 0, MAX_COUNT)

    @staticmethod
    def from_dict(values: Any) -> "Shard":
        """Build from an entry of `dataset.json`. Raises TypeError or ValueError unless that has exactly the fields."""
        names = Shard.__annotations__.keys()
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"{shown(values)} must be an object with the fields {', '.join(sorted(names))}")
        return Shard(**values)


class TokenShards:
    """One split of a prepared folder, as one long sequence of tokens. Files are mapped, not read.

    Raises:
        FileNotFoundError: the folder holds no finished data.
        ValueError: a file is missing or has another size than it was written with, or the format is unknown.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder = Path(folder)
        self.info = load_index(self.folder)
        self.shards: list[Shard] = self.info["splits"][split]
        self._dtype = np.dtype(self.info["dtype"]).newbyteorder("<")
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        for shard in self.shards:
            if (problem := find_problem(self.folder, shard, self.info["dtype"])) is not None:
                raise ValueError(f"{problem}; repeat the mythos prepare-data that made {self.folder}")

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the tokenizer that made the tokens."""
        value: Any = self.info.get("vocab_size")
        with blamed_on(self.folder / INDEX):
            check_int("vocab_size", value, 1, 2**32, "prepare the data again")
        return value

    @property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of the files of the tokenizer that made the tokens."""
        if not isinstance(value := self.info.get("tokenizer"), str):
            where = f"{self.folder / INDEX}: tokenizer={shown(value)}"
            raise ValueError(f"{where} must be a string; prepare the data again")
        return value

    @property
    def n_tokens(self) -> int:
        return int(self._starts[-1])

    @property
    def n_documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return sum(shard.bytes for shard in self.shards)

    def read(self, start: int, n: int) -> np.ndarray:
        """Return the tokens [start, start + n), (n,) int64."""
        parts = [self._maps[i][begin:end].astype(np.int64) for i, begin, end in self._spans(start, n)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def documents(self, start: int, n: int) -> np.ndarray:
        """Return which document each of the tokens [start, start + n) is of, counted from 0 there, (n,) int64."""
        begins, at = np.zeros(n, bool), 0
        for i, begin, end in self._spans(start, n):
            ends = self.document_ends(i)
            ends = ends[slice(*np.searchsorted(ends, (begin, end)))]
            self._check_ends(i, ends, begin, end - 1)
            begins[at] = True  # no document goes on in the next shard
            begins[at + ends - begin] = True
            at += end - begin
        return begins.cumsum() - 1

    def first_tokens(self) -> np.ndarray:
        """Return the token that each document begins with, (documents,) int64."""
        firsts = [np.zeros(0, np.int64)]
        for i, shard in enumerate(self.shards):
            ends = self.document_ends(i)
            self._check_ends(i, ends[:-1], 0, shard.tokens - 1)
            firsts.append(self._maps[i][np.append(0, ends)[:-1]])
        return np.concatenate(firsts)

    def document_ends(self, i: int) -> np.ndarray:
        """Return where the documents of shard i end in it, (documents,) int64."""
        # Mapped each time: a map that is kept holds a file open.
        return _map(inside(self.folder, _ends(self.shards[i])), np.dtype("<i8"))

    def _check_ends(self, i: int, ends: np.ndarray, low: int, high: int) -> None:
        if ends.size and not low <= ends.min() <= ends.max() <= high:
            path = self.folder / _ends(self.shards[i])
            raise ValueError(f"{path} is damaged: documents end outside their tokens; prepare the data again")

    def verify(self, rank: int = 0, size: int = 1, on_read: Callable[[int], None] = lambda n_bytes: None) -> None:
        """Read everything and compare it with the SHA-256 it was written with.

        Args:
            rank, size: of so many processes that read it together, each reads its share of the shards.
            on_read: called with the size of each shard that is as it was written.

        Raises:
            ValueError: a shard or the tokenizer is damaged; the message names it.
        """
        names = sorted(name for name in (HUB_FILE, HUB_ROLES, OWN_FILE) if (self.folder / name).is_file())
        if sha256(*(inside(self.folder, name) for name in names)) != self.tokenizer_sha256:
            found = f"{self.folder} has another tokenizer ({', '.join(names) or 'none'})"
            raise ValueError(f"{found} than its text was encoded with; restore it, or prepare the data again")
        for shard in self.shards[rank::size]:
            files = inside(self.folder, shard.path), inside(self.folder, _ends(shard))
            if sha256(*files) != shard.sha256:
                mark = self.folder / "units" / f"{Path(shard.path).stem}.json"
                remedy = f"remove {mark} and repeat the mythos prepare-data that made it"
                raise ValueError(f"{self.folder / shard.path} is damaged; {remedy}")
            on_read(sum(file.stat().st_size for file in files))

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [_map(inside(self.folder, shard.path), self._dtype) for shard in self.shards]

    def _spans(self, start: int, n: int) -> Iterator[tuple[int, int, int]]:
        """Yield where the tokens [start, start + n) are: a shard, and a part of its tokens that is not empty."""
        if not 0 <= start <= start + n <= self.n_tokens:
            raise ValueError(f"tokens {start} to {start + n} are not all in [0, {self.n_tokens}); ask for fewer")
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while n:
            begin = int(start - self._starts[shard])
            end = min(begin + n, self.shards[shard].tokens)
            if begin < end:
                yield shard, begin, end
            start, n, shard = start + end - begin, n - (end - begin), shard + 1


def write_shard(folder: Path, path: str, documents: list[np.ndarray], n_bytes: int, dtype: str) -> Shard:
    """Write documents, each the ids of one, as the files of one shard."""
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum([len(ids) for ids in documents], dtype="<i8")
    tokens = np.concatenate([np.zeros(0, np.int64), *documents]).astype(np.dtype(dtype).newbyteorder("<"))
    shard = Shard(path, len(tokens), len(documents), n_bytes, "")
    for file, values in ((path, tokens), (_ends(shard), ends)):
        target = folder / file
        with writing(target, GO_ON, values.nbytes, half=target):
            # `tofile` of numpy does not say why it has written less.
            target.write_bytes(values.data)
            to_disk(target)  # before anything says that it is there
    return replace(shard, sha256=sha256(folder / path, folder / _ends(shard)))


def load_index(folder: Path) -> dict[str, Any]:
    """Return the contents of `dataset.json`, with a list of `Shard` for each split.

    Raises:
        FileNotFoundError: the folder holds no finished data.
        ValueError: a field is missing or unusable, or the format is unknown.
    """
    path = inside(folder, INDEX)
    if not path.exists():
        remedy = f"make it with mythos prepare-data INPUT --out {folder}"
        raise FileNotFoundError(f"{folder} holds no finished data ({INDEX} is missing); {remedy}")
    info = read_json(path, MAX_INDEX_BYTES)
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError(f"{path} is of another format than {FORMAT}; prepare the data again with this version")
    with blamed_on(path):
        check_choice("dtype", info.get("dtype"), DTYPES)
        splits = info.get("splits")
        if not isinstance(splits, dict) or not all(isinstance(splits.get(split), list) for split in SPLITS):
            raise TypeError(f"splits={shown(splits)} must hold a list for each of {', '.join(SPLITS)}")
        return {**info, "splits": {split: _read_shards(f"splits.{split}", splits[split]) for split in SPLITS}}


def _read_shards(name: str, entries: list[Any]) -> list[Shard]:
    shards = []
    for i, entry in enumerate(entries):
        try:
            shards.append(Shard.from_dict(entry))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}[{i}]: {error}; prepare the data again") from error
    return shards


def find_problem(folder: Path, shard: Shard, dtype: str) -> str | None:
    """Return which of a shard's files has another size than it should, or None if both have theirs.

    Raises:
        ValueError: one of them lies outside the folder.
    """
    for file, size in ((shard.path, shard.tokens * np.dtype(dtype).itemsize), (_ends(shard), 8 * shard.documents)):
        path = inside(folder, file)
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
            return f"{path} should have {size} bytes and there is {found}"
    return None


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _ends(shard: Shard) -> str:
    return str(Path(shard.path).with_suffix(".ends"))
