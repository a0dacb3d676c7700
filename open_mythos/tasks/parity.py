"""Parity of the bits so far, asked after every bit, so that one row asks about every length: "^0110" is "0100".

The mark in front has parity 0, so that one rule serves every place: what the place before says, and this bit.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from open_mythos.checks import check_int
from open_mythos.tasks.task import IGNORE, Batch, to_tensor
from open_mythos.tokenization.tokenizer import SymbolTokenizer

START = 2  # id after the two bits


@dataclass(frozen=True)
class Parity:
    """Uniform bits behind a start mark. A row is max_bits + 1 tokens."""

    max_bits: int = 12

    name: ClassVar[str] = "parity"
    on_disk: ClassVar[bool] = False
    vocab_size: ClassVar[int] = 3
    bytes_per_token: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_int("data.max_bits", self.max_bits, 1)

    @property
    def seq_len(self) -> int:
        return self.max_bits + 1

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        """Rows that are asked for the parity of no more bits than they have loops; of all of them without `depths`."""
        bits = rng.integers(0, 2, size=(rows, self.max_bits))
        ids = np.insert(bits, 0, START, axis=1)
        labels = np.insert(bits.cumsum(axis=1) % 2, 0, IGNORE, axis=1)
        if depths is not None:
            labels[np.arange(self.seq_len) > depths[:, None]] = IGNORE
        return Batch(to_tensor(ids), to_tensor(labels))

    def validation_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        return self.batch(rng, rows)

    def tokenizer(self) -> SymbolTokenizer:
        return SymbolTokenizer(["0", "1", "^"])
