"""Addition with the answer's digits reversed: "A+B=R$", loss on R and $ only.

Reversed digits let a left-to-right reader carry as it writes. Protocol: operands of the same number of digits d,
d uniform, each operand uniform in [10^(d-1), 10^d - 1].
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from open_mythos.checks import check_int
from open_mythos.tasks.task import IGNORE, Batch, to_tensor
from open_mythos.tokenization.tokenizer import SymbolTokenizer

PLUS, EQUALS, PAD, END = 10, 11, 12, 13  # ids after the ten digits


@dataclass(frozen=True)
class Addition:
    """Problems of `min_digits` to `max_digits` digits. A row is 3 * max_digits + 3 tokens, padded on the right."""

    min_digits: int = 2
    max_digits: int = 5

    name: ClassVar[str] = "addition"
    on_disk: ClassVar[bool] = False
    vocab_size: ClassVar[int] = 16
    bytes_per_token: ClassVar[None] = None

    def __post_init__(self) -> None:
        # 17 digits: a sum below 2 * 10^17 fits in int64 with room.
        check_int("data.max_digits", self.max_digits, 1, 17)
        check_int("data.min_digits", self.min_digits, 1, self.max_digits)

    @property
    def seq_len(self) -> int:
        return 3 * self.max_digits + 3

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        digits = rng.integers(self.min_digits, self.max_digits + 1, size=rows)
        a, b = rng.integers(10 ** (digits - 1), 10**digits, size=(2, rows))
        return self.encode(a, b, digits)

    def validation_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        return self.batch(rng, rows)

    def encode(self, a: np.ndarray, b: np.ndarray, digits: np.ndarray) -> Batch:
        """Rows for given operands; `digits[i]` is the number of digits of a[i] and of b[i]."""
        ids = np.full((len(a), self.seq_len + 1), PAD)
        loss = np.zeros(ids.shape, dtype=bool)
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
            written = np.arange(d + 1) < answer_len[:, None]
            ids[rows, start : start + d + 1] = np.where(written, total[:, None] // places % 10, PAD)
            ids[rows, start + answer_len] = END
            loss[rows, start:] = True
        loss &= ids != PAD
        labels = np.where(loss, ids, IGNORE)
        return Batch(to_tensor(ids[:, :-1]), to_tensor(labels[:, 1:]))

    def tokenizer(self) -> SymbolTokenizer:
        return SymbolTokenizer([*"0123456789+=", "<pad>", "$"], pad="<pad>", eos="$")
