"""Packing of items into rows: the items of a row are a function of the row's number."""

from bisect import bisect_right

import numpy as np

from open_mythos.data.permutation import permute


class Packing:
    """Rows of as many items as fit, none of them cut. An epoch has every item once, in an order of its own, so an item
    stands at other places and beside others the next time.

    Args:
        lengths: (N,) of the items, each at most `room`.
        room: of a row.
        key: decides the orders.
    """

    def __init__(self, lengths: np.ndarray, room: int, key: tuple[int, ...]) -> None:
        self._lengths, self._room, self._key = lengths, room, key
        self._first = [0]
        """First row of each epoch so far. The number of rows in an epoch depends on its order."""
        self._latest = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def row(self, number: int) -> np.ndarray:
        """Return the items of a row, in order."""
        while number >= self._first[-1]:
            _, starts = self._pack(len(self._first) - 1)
            self._first.append(self._first[-1] + len(starts) - 1)
        epoch = bisect_right(self._first, number) - 1
        order, starts = self._pack(epoch)
        i = number - self._first[epoch]
        return order[starts[i] : starts[i + 1]]

    def _pack(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the items in an epoch, and where in it each row begins, with the end of the last."""
        if self._latest[0] != epoch:
            n = len(self._lengths)
            order = permute(np.arange(n), n, (*self._key, epoch))
            ends = self._lengths[order].cumsum()
            starts = [0]
            while starts[-1] < n:
                used = ends[starts[-1] - 1] if starts[-1] else 0
                starts.append(int(np.searchsorted(ends, used + self._room, side="right")))
            self._latest = (epoch, order, np.array(starts))
        return self._latest[1], self._latest[2]
