"""Rows of three tasks in one vocabulary: parity, addition and brackets. A row's symbols tell which it is."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from open_mythos.checks import PositiveInt, Range
from open_mythos.tasks import brackets
from open_mythos.tasks.addition import Addition
from open_mythos.tasks.brackets import Brackets
from open_mythos.tasks.parity import Parity
from open_mythos.tasks.task import IGNORE, Batch, Task

SYMBOLS = (*brackets.SYMBOLS, "+", "^")


@dataclass(frozen=True)
class Mixed(Task):
    """Each row is of one of the three tasks, equally likely, padded on the right to the longest."""

    max_bits: PositiveInt = 8
    max_digits: PositiveInt = 2
    max_length: Annotated[int, Range(2, 98)] = 12
    """Brackets, nested up to half as deep."""

    name = "mixed"
    symbols = SYMBOLS

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.parts  # which check their own fields

    @property
    def parts(self) -> tuple[Parity, Addition, Brackets]:
        """Return the three tasks."""
        brackets = Brackets(2, self.max_length, 1, self.max_length // 2)
        return Parity(self.max_bits), Addition(1, self.max_digits), brackets

    @property
    def seq_len(self) -> int:
        return max(part.seq_len for part in self.parts)

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        kind = rng.integers(0, len(self.parts), size=rows)
        ids, labels = np.empty((2, rows, self.seq_len), np.int64)
        for i, part in enumerate(self.parts):
            at = np.flatnonzero(kind == i)
            drawn = self.translate(part, part.batch(rng, len(at), None if depths is None else depths[at]))
            ids[at], labels[at] = drawn.input_ids.numpy(), drawn.labels.numpy()
        return Batch.of(ids, labels)

    def translate(self, part: Task, batch: Batch) -> Batch:
        """Return rows of one of the three tasks as rows of the mixture."""
        table = np.array([SYMBOLS.index(symbol) for symbol in part.symbols])
        labels = batch.labels.numpy()
        labels = np.where(labels == IGNORE, IGNORE, table[labels.clip(0)])
        space = ((0, 0), (0, self.seq_len - labels.shape[1]))
        ids = np.pad(table[batch.input_ids.numpy()], space, constant_values=brackets.PAD)
        return Batch.of(ids, np.pad(labels, space, constant_values=IGNORE))
