"""Parquet files read row group by row group while a run goes on, from the hub or a folder: nothing is stored.

A lane is one row of the global batch. The row groups of the dataset, in another order every epoch, are dealt to the
lanes in turn: lane b of B reads the groups b, b + B, b + 2B, ... So what it reads depends on `order_seed`, B and its
own position alone, whichever process reads it. Shapes: B rows, T tokens.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np

from open_mythos.checks import NonNegativeInt, PositiveInt, Range, check_int, shown
from open_mythos.data.documents import encode, place_of
from open_mythos.data.hub import HubDataset
from open_mythos.data.permutation import in_epochs, permute
from open_mythos.data.records import Reading
from open_mythos.data.row_groups import RowGroups
from open_mythos.data.skipped import Skipped
from open_mythos.tasks.task import Batch, FileTask
from open_mythos.tokenization.tokenizer import Tokenizer, open_tokenizer

READERS = 16
"""Lanes of a process that read or tokenize at the same time."""
COMMIT_WORDS = 3
"""Integers of a state that hold the commit of the data."""
NAMED = 10
"""Rows skipped by a lane before it counts further ones without naming them."""
log = logging.getLogger("open_mythos.data")
SAMPLE_TOKENS = 100_000
"""Tokens of held-out documents from which `bytes_per_token` is measured."""


@dataclass(frozen=True)
class Stream(FileTask):
    """Windows of `seq_len` tokens of a dataset of the hub, or of a folder of parquet files, tokenized as they are read.

    Documents stand one behind the other, each with its end token. A document is held out by a hash of its text, as
    `mythos prepare-data` does it.
    """

    dataset: str
    """OWNER/NAME on the hub, or a folder."""
    subset: str | None = None
    """As the dataset's card names it; None: its default."""
    revision: str | None = None
    """Branch, tag or commit; None: what the hub has when the run begins."""
    limit_files: PositiveInt | None = None
    """Read only the first files of a dataset of the hub."""
    vocabulary: str = "openai/gpt-oss-20b"
    """"bytes", a folder that holds a tokenizer, a tokenizer.json, or a model's name on the hub."""
    column: str = "text"
    seq_len: PositiveInt = 2048
    held_out: Annotated[float, Range(0, 0.5)] = 0.01
    """Share of the documents that is never trained on."""
    order_seed: NonNegativeInt = 0

    name = "stream"

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, str) or not self.dataset:
            raise ValueError(f"data.dataset={shown(self.dataset)} must name a dataset of the hub or a folder; set it")
        super().__post_init__()

    @cached_property
    def bytes_per_token(self) -> float:
        """Bytes per token of the first held-out documents; end tokens count as tokens."""
        n_bytes, ids = zip(*self._held_out(SAMPLE_TOKENS), strict=True)
        return sum(n_bytes) / sum(len(part) for part in ids)

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        raise ValueError(
            "data 'stream' has a position in every lane and gives no batch by its number; read it through lanes()"
        )

    def lanes(self, rows: range, batch_size: int, state: np.ndarray | None = None) -> "Lanes":
        """The lanes that are the rows `rows` of a global batch of `batch_size`, from the start or from a `Lanes.state`.

        Raises:
            ValueError: `state` is of other rows or of other data, or the data has no documents.
            OSError: the data cannot be read.
        """
        check_int("batch_size", batch_size, 1)
        if not rows or rows.step != 1 or rows.start < 0 or rows.stop > batch_size:
            raise ValueError(f"rows={rows} must be some of the {batch_size} rows of the batch; use range({batch_size})")
        groups, shape = self._groups, (len(rows), 3 + COMMIT_WORDS)
        if state is None:
            state = np.zeros(shape, np.int64)
            # The 40 hexadecimal digits of a commit as integers.
            state[:, 3:] = np.frombuffer(bytes.fromhex(groups.commit).ljust(8 * COMMIT_WORDS, b"\0"), "<i8")
        if state.shape != shape:
            raise ValueError(
                f"state has the shape {state.shape}, not {shape}: it is of other rows; resume with the batch size that "
                "the run began with"
            )
        commit = state[0, 3:].astype("<i8").tobytes()[:20].hex()
        if commit != groups.commit and not self._is_local:
            # The dataset has moved on since the run began; the run stays where it was.
            groups = replace(self, revision=commit)._groups
        if commit != groups.commit:
            raise ValueError(
                f"the files of data.dataset={self.dataset!r} are not those that the run began with; restore them, or "
                "begin another run"
            )
        return Lanes([_Lane(self, groups, row, batch_size, at) for row, at in zip(rows, state, strict=True)], state)

    def validation_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        """Windows of the first held-out documents, in an order of the row groups that no setting changes."""
        n_tokens = rows * self.seq_len + 1
        tokens = np.concatenate([ids for _, ids in self._held_out(n_tokens)])
        if len(tokens) < n_tokens:
            raise ValueError(
                f"data.held_out={self.held_out} keeps {len(tokens)} tokens for validation, and {rows} rows of "
                f"{self.seq_len} need {n_tokens}; hold out more, or evaluate on fewer rows"
            )
        return Batch.shifted(tokens[np.arange(rows)[:, None] * self.seq_len + np.arange(self.seq_len + 1)])

    def digests(self) -> dict[str, str]:
        return {"data.dataset": self._groups.digest() if self._is_local else self._groups.commit}

    def resume(self, digests: Mapping[str, str], tokenizer: Tokenizer) -> None:
        # A dataset of the hub is read as it was at the commit that the run began with, also for validation.
        commit = digests["data.dataset"]
        if not self._is_local and commit != self._groups.commit:
            self._replace_cached("_groups", replace(self, revision=commit)._groups)

    def open_tokenizer(self) -> Tokenizer:
        tokenizer = open_tokenizer(self.vocabulary)
        if tokenizer.eos_id is None:
            raise ValueError(f"data.vocabulary={self.vocabulary!r} has no end token to separate documents; use another")
        return tokenizer

    @property
    def _is_local(self) -> bool:
        return Path(self.dataset).is_dir()

    @cached_property
    def _groups(self) -> RowGroups:
        if not self._is_local:
            dataset = HubDataset(self.dataset, self.subset, self.revision, self.limit_files)
            return RowGroups(dataset, Reading(self.column))
        for name in ("subset", "revision", "limit_files"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"data.{name}={value!r} is for a dataset of the hub, not for a folder; leave it out")
        return RowGroups(Path(self.dataset), Reading(self.column))

    def _held_out(self, n_tokens: int) -> list[tuple[int, np.ndarray]]:
        """Bytes and ids of the first held-out documents that have so many tokens, or of all there are.

        Raises:
            ValueError: nothing is held out.
        """
        groups, found, left = self._groups, [], n_tokens
        for i in permute(np.arange(len(groups)), len(groups), (0,)):
            for text in groups.read(int(i)):
                if not isinstance(text, str) or place_of(text) >= self.held_out:
                    continue
                if isinstance(ids := encode(text, self._tokenizer), np.ndarray):
                    found.append((len(text.encode("utf-8")), ids))
                    left -= len(ids)
                if left <= 0:
                    return found
        if not found:
            raise ValueError(f"data.held_out={self.held_out} keeps no document for validation; hold out more")
        return found


class Lanes:
    """Some rows of the global batch, window after window. Not for several threads."""

    def __init__(self, lanes: list["_Lane"], state: np.ndarray) -> None:
        self._lanes = lanes
        self._pool = ThreadPoolExecutor(min(READERS, len(lanes)))
        self.state = state.copy()
        """(B, 6) int64: how many row groups a lane has behind it, row and token in the next, and the data's commit."""

    def next(self) -> Batch:
        """The next `seq_len` tokens of every lane and what to predict there, (B, T).

        Raises:
            OSError: a row group cannot be read; `state` is as it was.
        """
        windows, places = zip(*self._pool.map(_Lane.next, self._lanes), strict=True)
        self.state[:, :3] = places
        return Batch.shifted(np.stack(windows))

    @property
    def skipped(self) -> Counter[str]:
        """How many rows of the files gave no document since the lanes were opened, by reason."""
        return sum((lane.skipped for lane in self._lanes), Counter())


class _Lane:
    """One row of the global batch."""

    def __init__(self, task: Stream, groups: RowGroups, number: int, batch_size: int, state: np.ndarray) -> None:
        turn, row, self._used = (int(value) for value in state[:3])
        self._task, self._groups, self._number, self._batch_size = task, groups, number, batch_size
        self._documents = self._read(turn, row)
        self._waiting: deque[tuple[int, int, np.ndarray]] = deque()
        """Documents with their places; of the first, `_used` tokens have been given."""
        self.skipped: Counter[str] = Counter()

    def next(self) -> tuple[np.ndarray, tuple[int, int, int]]:
        """A window, (seq_len + 1,), and the place where the next begins: on this one's last token."""
        n_tokens = self._task.seq_len
        there = sum(len(ids) for _, _, ids in self._waiting) - self._used
        while there <= n_tokens:
            self._waiting.append(next(self._documents))
            there += len(self._waiting[-1][2])
        parts, start, left = [], self._used, n_tokens + 1
        for _, _, ids in self._waiting:
            parts.append(ids[start : start + left])
            start, left = 0, left - len(parts[-1])
        self._used += n_tokens
        while self._used >= len(self._waiting[0][2]):
            self._used -= len(self._waiting.popleft()[2])
        return np.concatenate(parts), (*self._waiting[0][:2], self._used)

    def _read(self, turn: int, row: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Documents to train on, without end: turn, row in its row group, and ids."""
        n, last = len(self._groups), turn
        while turn - last <= n:
            place = np.array([self._number + turn * self._batch_size])
            group = int(in_epochs(place, n, (self._task.order_seed,))[0])
            for at, text in enumerate(self._groups.read(group, row), row):
                if isinstance(text, str) and place_of(text) < self._task.held_out:
                    continue
                ids = encode(text, self._task.tokenizer()) if isinstance(text, str) else text
                if isinstance(ids, Skipped):
                    self.skipped[ids.reason] += 1
                    # Nulls and empty rows are common, and nothing that one could correct.
                    if ids.reason not in ("empty", "no text in the record") and self.skipped.total() <= NAMED:
                        log.warning("skipped %s", ids)
                else:
                    last = turn
                    yield turn, at, ids
            turn, row = turn + 1, 0
        fault = f"data.dataset={self._task.dataset!r} has no document to train on (skipped: {dict(self.skipped)})"
        raise ValueError(f"{fault}; use another, or another column")
