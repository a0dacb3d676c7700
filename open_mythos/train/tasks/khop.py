"""Pointer chasing: who is at the end of the chain?

The prompt writes a random forest of chains as pairs "s f(s)" in random order; a root points to itself. Then come
queries, each one symbol; the answer to a query is the root of its chain, and its distance is the number of hops.
A model that loops longer than the distance is never wrong for that: from the root every further hop is the root.
Shape letters: B rows, N symbols, Q queries.
"""

import string
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from open_mythos.tokenizer import SymbolTokenizer
from open_mythos.train.checks import check_int
from open_mythos.train.data import IGNORE, Batch, to_tensor

ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class KHop:
    """Chains over `n_symbols` symbols, and `n_queries` questions with distances of 1 to `max_distance`.

    One chain has `long_chain` symbols, so every distance below that occurs in every row; the others are random and
    have at most `short_chain`.
    """

    n_symbols: int = 32
    long_chain: int = 17
    short_chain: int = 6
    n_queries: int = 16
    """Questions per row. They share the forest and one row answers them all, which costs little more than one."""
    min_distance: int = 1
    max_distance: int = 4

    name: ClassVar[str] = "khop"
    bytes_per_token: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_int("data.n_symbols", self.n_symbols, 2, len(ALPHABET))
        check_int("data.long_chain", self.long_chain, 2, self.n_symbols)
        check_int("data.short_chain", self.short_chain, 1)
        check_int("data.n_queries", self.n_queries, 1)
        check_int("data.max_distance", self.max_distance, 0, self.long_chain - 1)
        check_int("data.min_distance", self.min_distance, 0, self.max_distance)

    @property
    def vocab_size(self) -> int:
        return self.n_symbols

    @property
    def seq_len(self) -> int:
        return 2 * self.n_symbols + self.n_queries

    def batch(self, rng: np.random.Generator, rows: int) -> Batch:
        symbol, distance = self._forest(rng, rows)
        slot = np.arange(self.n_symbols)
        successor = np.where(distance == 0, slot, slot - 1)
        order = rng.permuted(np.broadcast_to(slot, symbol.shape), axis=1)
        take = np.take_along_axis
        pairs = np.stack([take(symbol, order, 1), take(symbol, take(successor, order, 1), 1)], axis=2)

        limit = rng.integers(self.min_distance, self.max_distance + 1, size=(rows, 1))
        hops = rng.integers(self.min_distance, limit + 1, size=(rows, self.n_queries))
        # A symbol at the drawn distance, all of them equally likely: 1 for a fitting slot, below 1 for none.
        score = rng.random((rows, self.n_queries, self.n_symbols)) + (distance[:, None] == hops[:, :, None])
        query = score.argmax(axis=2)

        ids = np.concatenate([pairs.reshape(rows, -1), take(symbol, query, 1)], axis=1)
        labels = np.full(ids.shape, IGNORE)
        labels[:, 2 * self.n_symbols :] = take(symbol, query - hops, 1)
        return Batch(to_tensor(ids), to_tensor(labels), tuple(hops.max(axis=1, initial=1).tolist()))

    validation_batch = batch

    def _forest(self, rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(B, N) symbol in each slot, and (B, N) distance of each slot to its root.

        Slots of a chain are neighbours: slot j points to slot j - 1 unless its distance is 0.
        """
        n = self.n_symbols
        symbol = rng.permuted(np.broadcast_to(np.arange(n), (rows, n)), axis=1)
        distance = np.empty((rows, n), dtype=np.int64)
        distance[:, : self.long_chain] = np.arange(self.long_chain)
        starts = rng.random((rows, n)) < 1 / 3
        starts[:, self.long_chain : self.long_chain + 1] = True
        for j in range(self.long_chain, n):
            next_distance = distance[:, j - 1] + 1
            distance[:, j] = np.where(starts[:, j] | (next_distance >= self.short_chain), 0, next_distance)
        return symbol, distance

    def tokenizer(self) -> SymbolTokenizer:
        return SymbolTokenizer(list(ALPHABET[: self.n_symbols]))
