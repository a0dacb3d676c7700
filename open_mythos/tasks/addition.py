"""Addition with the answer's digits reversed: "A+B=R$", loss on R and $ only.

Reversed digits let a left-to-right reader carry as it writes. Protocol: operands of the same number of digits d,
d uniform, each operand uniform in [10^(d-1), 10^d - 1].
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from open_mythos.checks import PositiveInt, Range, check_int
from open_mythos.tasks.task import END_SYMBOL, PAD_SYMBOL, Batch, Task

PLUS, EQUALS, PAD, END = 10, 11, 12, 13  # ids after the ten digits


@dataclass(frozen=True)
class Addition(Task):
    """Problems of `min_digits` to `max_digits` digits. A row is 3 * max_digits + 3 tokens, padded on the right."""

    min_digits: PositiveInt = 2
    max_digits: Annotated[int, Range(1, 17)] = 5
    """A sum below 2 * 10^17 fits in int64 with room."""

    name = "addition"
    symbols = (*"0123456789+=", PAD_SYMBOL, END_SYMBOL)
    vocab_size = 16
    """The published protocol has two tokens more than symbols."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.min_digits", self.min_digits, 1, self.max_digits)

    @property
    def seq_len(self) -> int:
        return 3 * self.max_digits + 3

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        digits = rng.integers(self.min_digits, self.max_digits + 1, size=rows)
        a, b = rng.integers(10 ** (digits - 1), 10**digits, size=(2, rows))
        return self.encode(a, b, digits)

    def encode(self, a: np.ndarray, b: np.ndarray, digits: np.ndarray) -> Batch:
        """Return rows of given operands; `digits[i]` is the number of digits of a[i] and of b[i]."""
        ids = np.full((len(a), self.seq_len + 1), PAD)
        is_label = np.zeros(ids.shape, dtype=bool)
        for d in np.unique(digits):
            rows = np.flatnonzero(digits == d)
            places = 10 ** np.arange(d + 1)
            total = a[rows] + b[rows]
            answer_len = d + (total >= 10**d)
            start = 2 * d + 2
            ids[rows, :d] = a[rows, None] // places[d - 1 :: -1] % 10
            ids[rows, d] = PLUS
            ids[rows, d + 1 : start - 1] = b[rows, None] // places[d - 1 :: -1] % 10
            ids[rows, start - 1] = EQUALS
            # The answer's last digit first; a sum without a carry at the end is one digit shorter.
            written = np.arange(d + 1) < answer_len[:, None]
            ids[rows, start : start + d + 1] = np.where(written, total[:, None] // places % 10, PAD)
            ids[rows, start + answer_len] = END
            is_label[rows, start:] = True
        return Batch.shifted(ids, is_label & (ids != PAD))
