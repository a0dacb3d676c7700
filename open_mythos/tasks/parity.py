"""Parity of the bits so far, asked after every bit, so that one row asks about every length: "^0110" is "0100".

The mark in front has parity 0, so that one rule serves every place: what the place before says, and this bit.
"""

from dataclasses import dataclass

import numpy as np

from open_mythos.checks import PositiveInt
from open_mythos.tasks.task import IGNORE, Batch, Task

START = 2
"""Id of the mark, after the two bits."""


@dataclass(frozen=True)
class Parity(Task):
    """Uniform bits behind a start mark. A row is max_bits + 1 tokens."""

    max_bits: PositiveInt = 12

    name = "parity"
    symbols = ("0", "1", "^")

    @property
    def seq_len(self) -> int:
        return self.max_bits + 1

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        """Draw rows that are asked for the parity of at most as many bits as they have loops, or without `depths` of
        all bits."""
        bits = rng.integers(0, 2, size=(rows, self.max_bits))
        ids = np.insert(bits, 0, START, axis=1)
        labels = np.insert(bits.cumsum(axis=1) % 2, 0, IGNORE, axis=1)
        if depths is not None:
            labels[np.arange(self.seq_len) > depths[:, None]] = IGNORE
        return Batch.of(ids, labels)
