"""Prepared token shards: windows in an order that a row's number decides, each once before any comes again.

Shapes: B rows, T tokens.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from open_mythos.checks import NonNegativeInt, PositiveInt, check_int, check_number, shown
from open_mythos.data.permutation import in_epochs, mix
from open_mythos.data.shards import TokenShards
from open_mythos.tasks.task import Batch, FileTask
from open_mythos.tokenization.tokenizer import Tokenizer, load_tokenizer, n_bytes

QUIET_S, REPEAT_S = 2.0, 10.0
"""Seconds of verifying before the first line about it, and between two lines."""


@dataclass(frozen=True)
class Shards(FileTask):
    """Windows of `seq_len` tokens of one or several folders that `mythos prepare-data` made.

    Documents stand one behind the other, each with its end token, so a window may hold several. Which window a row of
    the run reads depends on `order_seed` and the row's number alone.
    """

    paths: tuple[str, ...]
    """Folders, all made with the same tokenizer."""
    weights: tuple[float, ...] = ()
    """Share of the rows that each folder gives, of any sum; none: in proportion to their tokens."""
    seq_len: PositiveInt = 1024
    order_seed: NonNegativeInt = 0
    separate_documents: bool = False
    """True lets attention stop at the ends of documents. The first token of a document, which then follows from
    nothing, is not to be predicted."""

    name = "shards"

    def __post_init__(self) -> None:
        if not isinstance(self.paths, tuple) or not self.paths:
            raise ValueError(f"data.paths={shown(self.paths)} must name folders; use data.paths=('data/text',)")
        if self.weights and len(self.weights) != len(self.paths):
            fault = f"data.weights has {len(self.weights)} values for {len(self.paths)} folders"
            raise ValueError(f"{fault}; give one for each")
        for weight in self.weights:
            check_number("data.weights", weight, 0, 1e100, above=True)
        super().__post_init__()
        # Two tokens, for one alone may be the end of a document, behind which nothing is to be predicted.
        check_int("data.seq_len", self.seq_len, 2 if self.separate_documents else 1)

    @cached_property
    def _train(self) -> list[TokenShards]:
        return self._open("train")

    @cached_property
    def _validation(self) -> list[TokenShards]:
        return self._open("validation")

    def _open(self, split: str) -> list[TokenShards]:
        sources = [TokenShards(path, split) for path in self.paths]
        for source in sources:
            if source.tokenizer_sha256 != sources[0].tokenizer_sha256:
                fault = f"data.paths: {source.folder} was made with another tokenizer than {sources[0].folder}"
                raise ValueError(f"{fault}; prepare one of them again")
            if split == "train" and source.n_tokens <= self.seq_len:
                fault = f"data.seq_len={self.seq_len} must be below the {source.n_tokens} tokens of {source.folder}"
                raise ValueError(f"{fault}; use a shorter window or more text")
        if split == "validation" and max(source.n_tokens for source in sources) <= self.seq_len:
            raise ValueError(
                f"no folder of data.paths holds out more than data.seq_len={self.seq_len} tokens; use a shorter "
                "window, or prepare the data with a larger --held-out"
            )
        return sources

    def digests(self) -> dict[str, str]:
        made_of = [[source.info[name] for name in ("splits", "dtype", "tokenizer")] for source in self._train]
        texts = [json.dumps(values, default=vars, sort_keys=True) for values in made_of]
        return {f"data.paths[{i}]": hashlib.sha256(text.encode()).hexdigest() for i, text in enumerate(texts)}

    def verify(self, rank: int, size: int, report: Callable[[str], None]) -> None:
        sources = [*self._train, *self._validation]
        total = sum(source.n_tokens * np.dtype(source.info["dtype"]).itemsize for source in sources)
        done, next_line = 0, time.monotonic() + QUIET_S

        def on_read(n_bytes: int) -> None:
            nonlocal done, next_line
            done += n_bytes * size
            if time.monotonic() > next_line:
                next_line = time.monotonic() + REPEAT_S
                report(f"verifying the prepared data: {min(1.0, done / total):.0%} of {total / 1e9:.2f} GB")

        for source in sources:
            source.verify(rank, size, on_read)

    @property
    def vocab_size(self) -> int:
        return self._train[0].vocab_size

    @property
    def bytes_per_token(self) -> float:
        # Of the held-out documents, whose end tokens count as tokens; first tokens that are not predicted do not count.
        n_tokens, bytes_ = sum(s.n_tokens for s in self._validation), sum(s.n_bytes for s in self._validation)
        if self.separate_documents:
            tokenizer = self.tokenizer()
            firsts, counts = np.unique(np.concatenate([s.first_tokens() for s in self._validation]), return_counts=True)
            n_tokens -= counts.sum()
            bytes_ -= sum(n_bytes(tokenizer, token) * n for token, n in zip(firsts.tolist(), counts, strict=True))
        return float(bytes_ / n_tokens)

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        weights = self.weights or tuple(float(source.n_tokens) for source in self._train)
        sources, numbers = mix(first_row + np.arange(rows), weights, (self.order_seed, 0))
        starts = np.empty(rows, np.int64)
        for i, source in enumerate(self._train):
            here = sources == i
            windows = in_epochs(numbers[here], (source.n_tokens - 1) // self.seq_len, (self.order_seed, 1, i))
            starts[here] = windows * self.seq_len
        return self._rows(self._train, sources, starts)

    def validation_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        room = np.array([max(0, source.n_tokens - self.seq_len) for source in self._validation])
        places = rng.integers(room.sum(), size=rows)
        sources = np.searchsorted(room.cumsum(), places, side="right")
        starts = places - (room.cumsum() - room)[sources]
        return self._rows(self._validation, sources, starts)

    def _rows(self, shards: list[TokenShards], sources: np.ndarray, starts: np.ndarray) -> Batch:
        """Read the windows that begin at `starts` (B,) of `sources` (B,)."""
        places, n = [(shards[i], int(start)) for i, start in zip(sources, starts, strict=True)], self.seq_len + 1
        ids = np.stack([source.read(start, n) for source, start in places])
        if not self.separate_documents:
            return Batch.shifted(ids)
        documents = np.stack([source.documents(start, n) for source, start in places])
        return Batch.shifted(ids, np.diff(documents, axis=1, prepend=-1) == 0, documents)

    def open_tokenizer(self) -> Tokenizer:
        return load_tokenizer(Path(self.paths[0]))
