"""Rows of three tasks in one vocabulary: parity, addition and brackets. A row's symbols tell which it is."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from open_mythos.checks import check_int
from open_mythos.tasks.addition import Addition
from open_mythos.tasks.brackets import SYMBOLS as BRACKETS
from open_mythos.tasks.brackets import Brackets
from open_mythos.tasks.parity import Parity
from open_mythos.tasks.task import IGNORE, Batch, to_tensor
from open_mythos.tokenization.tokenizer import SymbolTokenizer

SYMBOLS = (*BRACKETS, "+", "^")
PAD = SYMBOLS.index("<pad>")


@dataclass(frozen=True)
class Mixed:
    """Each row is of one of the three tasks, equally likely, padded on the right to the longest."""

    max_bits: int = 8
    max_digits: int = 2
    max_length: int = 12
    """Brackets, nested up to half as deep."""

    name: ClassVar[str] = "mixed"
    on_disk: ClassVar[bool] = False
    vocab_size: ClassVar[int] = len(SYMBOLS)
    bytes_per_token: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_int("data.max_length", self.max_length, 2, 98)
        _ = self.parts  # These check what is theirs.

    @property
    def parts(self) -> tuple[Parity, Addition, Brackets]:
        """The three tasks."""
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
        return Batch(to_tensor(ids), to_tensor(labels))

    def validation_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        return self.batch(rng, rows)

    def translate(self, part: Parity | Addition | Brackets, batch: Batch) -> Batch:
        """Rows of one of the three as rows of the mixture."""
        table = np.array([SYMBOLS.index(symbol) for symbol in part.tokenizer().symbols])
        labels = batch.labels.numpy()
        known = np.where(labels == IGNORE, IGNORE, table[labels.clip(0)])
        space = ((0, 0), (0, self.seq_len - batch.input_ids.shape[1]))
        ids = np.pad(table[batch.input_ids.numpy()], space, constant_values=PAD)
        return Batch(to_tensor(ids), to_tensor(np.pad(known, space, constant_values=IGNORE)))

    def tokenizer(self) -> SymbolTokenizer:
        return SymbolTokenizer(SYMBOLS, pad="<pad>", eos="$")
