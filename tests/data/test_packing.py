"""Packing: every item once an epoch, no row too full, and rows that their number alone decides."""

import numpy as np
import pytest

from open_mythos.data.packing import Packing


@pytest.mark.parametrize(("n", "room"), [(1, 9), (7, 9), (63, 9), (200, 50)])
def test_an_epoch_has_every_item_once(n: int, room: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 10, n)
    packing, number, orders = Packing(lengths, room, (3,)), 0, []
    for _ in range(3):
        seen: list[int] = []
        while len(seen) < n:
            row = packing.row(number)
            assert 0 < lengths[row].sum() <= room
            # As many as fit: the next row's first item, in the same epoch, does not.
            if len(seen) + len(row) < n:
                assert lengths[row].sum() + lengths[packing.row(number + 1)[0]] > room
            seen += row.tolist()
            number += 1
        assert sorted(seen) == list(range(n))
        orders.append(seen)
    assert n == 1 or orders[0] != orders[1]


def test_a_row_depends_on_its_number_alone() -> None:
    lengths = np.random.default_rng(1).integers(1, 10, 63)
    packing = Packing(lengths, 20, (0,))
    rows = [packing.row(i).tolist() for i in range(60)]
    for i in (59, 3, 40, 0, 25):
        assert Packing(lengths, 20, (0,)).row(i).tolist() == packing.row(i).tolist() == rows[i]
    assert [Packing(lengths, 20, (1,)).row(i).tolist() for i in range(60)] != rows
