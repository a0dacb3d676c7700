"""Where does a bracket string first break? "([)]=02$": the answer is a place in two digits, or "--" for none, and "$".

The reader's stack decides: a closing bracket that finds no or another opening one breaks the string at its own place,
an opening one that is never closed at the string's end.
Shape letters: B rows, N brackets.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from open_mythos.checks import PositiveInt, Range, check_int
from open_mythos.tasks.task import END_SYMBOL, PAD_SYMBOL, Batch, Task

KINDS = 3
"""Kinds of brackets: kind k opens with id k and closes with id k + 3."""
SYMBOLS = (*"([{)]}", *"0123456789", "=", "-", PAD_SYMBOL, END_SYMBOL)
EQUALS, NONE, PAD, END = 16, 17, 18, 19  # ids after six brackets and ten digits


@dataclass(frozen=True)
class Brackets(Task):
    """Strings of an even length, half of them balanced; the others had one bracket replaced, which breaks any.

    Nesting is drawn uniformly, and then the length from what holds it.
    A row is max_length + 3 tokens, padded on the right.
    """

    min_length: Annotated[int, Range(2)] = 2
    max_length: Annotated[int, Range(2, 98)] = 16
    """Below 100: places have two digits, and the end of a string is one."""
    min_nesting: PositiveInt = 1
    max_nesting: Annotated[int, Range(1, 49)] = 8

    name = "brackets"
    symbols = SYMBOLS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.min_nesting", self.min_nesting, 1, self.max_nesting)
        check_int("data.max_length", self.max_length, 2 * self.max_nesting, 98)
        check_int("data.min_length", self.min_length, 2, self.max_length)

    @property
    def seq_len(self) -> int:
        return self.max_length + 3

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        strings, lengths = self.draw(rng, rows)
        return self.encode(strings, lengths)

    def draw(self, rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw (B, N) brackets, with PAD behind the end, and (B,) lengths."""
        nesting = rng.integers(self.min_nesting, self.max_nesting + 1, size=rows)
        lengths = 2 * rng.integers(np.maximum(nesting, (self.min_length + 1) // 2), self.max_length // 2 + 1)
        row = np.arange(rows)
        strings = np.full((rows, self.max_length), PAD)
        stack = np.zeros((rows, self.max_nesting + 1), np.int64)
        height, reached = np.zeros(rows, np.int64), np.zeros(rows, bool)
        for place in range(self.max_length):
            left = lengths - place
            # A string that has not reached its nesting must open when going up and down again takes all that is left;
            # one that is as high as what is left must close.
            must_open = ~reached & (2 * nesting - height >= left)
            may_open = (height < nesting) & (height < left)
            opens = must_open | (height == 0) | (may_open & (rng.random(rows) < 0.5))
            kind = np.where(opens, rng.integers(0, KINDS, size=rows), stack[row, height - 1])
            stack[row, np.where(opens, height, -1)] = kind
            strings[:, place] = np.where(left > 0, kind + KINDS * ~opens, PAD)
            height += np.where(opens, 1, -1)
            reached |= height == nesting
            height[left <= 0] = 0
        # Any other bracket in place of one of a balanced string breaks it.
        broken = np.flatnonzero(rng.random(rows) < 0.5)
        place = rng.integers(0, lengths[broken])
        shift = rng.integers(1, 2 * KINDS, size=len(broken))
        strings[broken, place] = (strings[broken, place] + shift) % (2 * KINDS)
        return strings, lengths

    def encode(self, strings: np.ndarray, lengths: np.ndarray) -> Batch:
        """Return rows of given strings, (B, N) with PAD behind the end."""
        rows, place = np.arange(len(strings))[:, None], first_break(strings, lengths)
        ids = np.full((len(strings), self.seq_len + 1), PAD)
        ids[:, : self.max_length] = strings
        digits = [np.where(place < 0, NONE, 6 + digit) for digit in (place // 10, place % 10)]
        written = np.stack([np.full(len(strings), EQUALS), *digits, np.full(len(strings), END)], axis=1)
        ids[rows, lengths[:, None] + np.arange(4)] = written
        is_label = np.zeros(ids.shape, dtype=bool)
        is_label[rows, lengths[:, None] + np.arange(1, 4)] = True
        return Batch.shifted(ids, is_label)


def first_break(strings: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return (B,) the place of the leftmost break of each string, or -1."""
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
    """Return (B,) the most brackets that are open at once before the first break."""
    place = first_break(strings, lengths)
    end = np.where(place < 0, lengths, place)
    read = np.arange(strings.shape[1]) < end[:, None]
    steps = np.where(strings < KINDS, 1, -1) * read
    return steps.cumsum(axis=1).max(axis=1, initial=0)
