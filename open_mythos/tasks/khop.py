"""Pointer chasing: who is at the end of the chain?

The prompt is a table by position and a question: token i is the symbol that symbol i points to, and the last token is
the symbol asked about. The pointers form a random forest of chains whose roots point to themselves; the answer is the
root of the question's chain, and its distance the number of hops. Looping longer than the distance is never wrong
for that: from the root every further hop is the root.
Shape letters: B rows, N symbols, T tokens, L loops.
"""

import string
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from open_mythos.checks import PositiveInt, Range, check_int
from open_mythos.tasks.task import IGNORE, Batch, Task

ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class KHop(Task):
    """Forests over `n_symbols` symbols and one question each, at a distance of `min_distance` to `max_distance`.

    One chain has `long_chain` symbols, so every distance below that occurs in every row; the others are random.
    """

    n_symbols: Annotated[int, Range(2, len(ALPHABET))] = 24
    long_chain: Annotated[int, Range(2)] = 17
    short_chain: PositiveInt = 6
    """Most symbols of each other chain."""
    min_distance: PositiveInt = 1
    max_distance: PositiveInt = 4
    target: Literal["hop", "root"] = "root"
    """Answers in training. hop: after each loop l the symbol min(l, distance) hops away, so that a loop is a hop; it
    needs losses.per_loop. root: the root after the last loop, with questions no farther than the row's loops (or
    min_distance, if that is more)."""

    name = "khop"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.long_chain", self.long_chain, 2, self.n_symbols)
        check_int("data.max_distance", self.max_distance, 1, self.long_chain - 1)
        check_int("data.min_distance", self.min_distance, 1, self.max_distance)

    @property
    def symbols(self) -> str:
        return ALPHABET[: self.n_symbols]

    @property
    def seq_len(self) -> int:
        return self.n_symbols + 1

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        """Draw rows whose answers fit their depths: labels (L, B, T) of every loop for `hop`, (B, T) for `root`.

        Without `depths` the answer is the root, whatever the distance.
        """
        # The table: each symbol, by its number, points to the symbol in the slot before its own.
        symbol, distance = self._forest(rng, rows)
        slot = np.arange(self.n_symbols)
        successor = np.take_along_axis(symbol, np.where(distance == 0, slot, slot - 1), axis=1)
        table = np.empty_like(symbol)
        np.put_along_axis(table, symbol, successor, axis=1)

        farthest = np.full(rows, self.max_distance)
        if depths is not None and self.target == "root":
            farthest = np.clip(depths, self.min_distance, self.max_distance)
        asked = rng.integers(self.min_distance, farthest + 1)
        # All slots at the asked distance are equally likely: they score 1 to 2, the others less than 1.
        question = (rng.random(symbol.shape) + (distance == asked[:, None])).argmax(axis=1)
        row = np.arange(rows)
        ids = np.concatenate([table, symbol[row, question][:, None]], axis=1)
        if depths is None or self.target == "root":
            labels = np.full(ids.shape, IGNORE)
            labels[:, -1] = symbol[row, question - asked]
        else:
            hops = np.minimum(asked, np.arange(1, depths.max() + 1)[:, None])
            labels = np.full((len(hops), *ids.shape), IGNORE)
            labels[:, :, -1] = symbol[row, question - hops]
        return Batch.of(ids, labels)

    def check_losses(self, per_loop: bool) -> None:
        if per_loop != (self.target == "hop"):
            raise ValueError(
                f"losses.per_loop={per_loop} does not fit data.target={self.target!r}: 'hop' has answers after every "
                "loop, 'root' one at the end; use losses.per_loop=true with 'hop', losses.per_loop=false with 'root'"
            )

    def _forest(self, rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw (B, N) the symbol in each slot, and (B, N) the distance of each slot to its root.

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

    def example(self, seed: int = 0) -> str:
        """Return one prompt as the model reads it, and what it means."""
        batch = self.batch(np.random.default_rng(seed), 1)
        *table, question = self.tokenizer().decode(batch.input_ids[0].tolist())
        points_to = dict(zip(ALPHABET, table, strict=False))
        path = [question]
        while points_to[path[-1]] != path[-1]:
            path.append(points_to[path[-1]])
        pointers = " ".join(f"{symbol}>{successor}" for symbol, successor in points_to.items())
        return (
            f"prompt: {''.join(table)}{question}\n"
            f"it says: {pointers}, and asks: {question}\n"
            f"answer: {path[-1]}, {len(path) - 1} hop{'s' * (len(path) > 2)} away: {'>'.join(path)}"
        )
