"""Where does a bracket string first break? "([)]=02$": the answer is a place in two digits, or "--" for none, and "$".

The reader's stack decides: a closing bracket that finds no or another opening one breaks the string at its own place,
an opening one that is never closed at the string's end.
Shape letters: B rows, N brackets.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from open_mythos.checks import check_int
from open_mythos.tasks.task import IGNORE, Batch, to_tensor
from open_mythos.tokenization.tokenizer import SymbolTokenizer

KINDS = 3
"""Of brackets: kind k opens with id k and closes with id k + 3."""
EQUALS, NONE, PAD, END = 16, 17, 18, 19  # ids after six brackets and ten digits
SYMBOLS = (*"([{)]}", *"0123456789", "=", "-", "<pad>", "$")


@dataclass(frozen=True)
class Brackets:
    """Strings of an even length, half of them balanced; the others had one bracket replaced, which breaks any.

    Nesting is drawn uniformly, and then the length from what holds it.
    A row is max_length + 3 tokens, padded on the right.
    """

    min_length: int = 2
    max_length: int = 16
    min_nesting: int = 1
    max_nesting: int = 8

    name: ClassVar[str] = "brackets"
    on_disk: ClassVar[bool] = False
    vocab_size: ClassVar[int] = len(SYMBOLS)
    bytes_per_token: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_int("data.max_nesting", self.max_nesting, 1, 49)
        check_int("data.min_nesting", self.min_nesting, 1, self.max_nesting)
        # Below 100: places have two digits, and the end of a string is one.
        check_int("data.max_length", self.max_length, 2 * self.max_nesting, 98)
        check_int("data.min_length", self.min_length, 2, self.max_length)

    @property
    def seq_len(self) -> int:
        return self.max_length + 3

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        strings, lengths = self.draw(rng, rows)
        return self.encode(strings, lengths)

    def validation_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        return self.batch(rng, rows)

    def draw(self, rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(B, N) brackets, PAD behind the end, and (B,) lengths."""
        nesting = rng.integers(self.min_nesting, self.max_nesting + 1, size=rows)
        lengths = 2 * rng.integers(np.maximum(nesting, (self.min_length + 1) // 2), self.max_length // 2 + 1)
        row = np.arange(rows)
        strings = np.full((rows, self.max_length), PAD)
        stack = np.zeros((rows, self.max_nesting + 1), np.int64)
        height, reached = np.zeros(rows, np.int64), np.zeros(rows, bool)
        for place in range(self.max_length):
            left = lengths - place
            # Up and down again takes all that is left; what is too high to come down closes.
            must_open = ~reached & (2 * nesting - height >= left)
            may_open = (height < nesting) & (height < left)
            opens = must_open | (height == 0) | (may_open & (rng.random(rows) < 0.5))
            kind = np.where(opens, rng.integers(0, KINDS, size=rows), stack[row, height - 1])
            stack[row, np.where(opens, height, -1)] = kind
            strings[:, place] = np.where(left > 0, kind + KINDS * ~opens, PAD)
            height += np.where(opens, 1, -1)
            reached |= height == nesting
            height[left <= 0] = 0
        broken = np.flatnonzero(rng.random(rows) < 0.5)
        place = rng.integers(0, lengths[broken])
        shift = rng.integers(1, 2 * KINDS, size=len(broken))
        strings[broken, place] = (strings[broken, place] + shift) % (2 * KINDS)
        return strings, lengths

    def encode(self, strings: np.ndarray, lengths: np.ndarray) -> Batch:
        """Rows of given strings, (B, N) with PAD behind the end."""
        rows = np.arange(len(strings))[:, None]
        ids = np.full((len(strings), self.seq_len + 1), PAD)
        ids[:, : self.max_length] = strings
        place = first_break(strings, lengths)
        tens, ones = np.where(place < 0, NONE, 6 + place // 10), np.where(place < 0, NONE, 6 + place % 10)
        written = np.stack([np.full(len(strings), EQUALS), tens, ones, np.full(len(strings), END)], axis=1)
        ids[rows, lengths[:, None] + np.arange(4)] = written
        labels = np.full(ids.shape, IGNORE)
        labels[rows, lengths[:, None] + np.arange(1, 4)] = written[:, 1:]
        return Batch(to_tensor(ids[:, :-1]), to_tensor(labels[:, 1:]))

    def tokenizer(self) -> SymbolTokenizer:
        return SymbolTokenizer(SYMBOLS, pad="<pad>", eos="$")


def first_break(strings: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B,) the place of the leftmost break of each string, or -1."""
    n_rows, n = strings.shape
    row = np.arange(n_rows)
    stack, height = np.zeros((n_rows, n + 1), np.int64), np.zeros(n_rows, np.int64)
    found = np.full(n_rows, -1)
    for place in range(n):
        bracket, going = strings[:, place], (found < 0) & (place < lengths)
        opens, closes = going & (bracket < KINDS), going & (bracket >= KINDS)
        stack[row[opens], height[opens]] = bracket[opens]
        breaks = closes & ((height == 0) | (stack[row, height - 1] != bracket - KINDS))
        found[breaks] = place
        height += opens * 1 - closes
        height[breaks] = 0
    return np.where((found < 0) & (height > 0), lengths, found)


def nesting(strings: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B,) most brackets open at once before the first break."""
    place = first_break(strings, lengths)
    end = np.where(place < 0, lengths, place)
    read = np.arange(strings.shape[1]) < end[:, None]
    steps = np.where(strings < KINDS, 1, -1) * read
    return steps.cumsum(axis=1).max(axis=1, initial=0)
