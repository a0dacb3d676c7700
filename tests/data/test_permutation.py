"""The order of rows: every window once an epoch, exact mixtures, and nothing but the row's number needed."""

import numpy as np
import pytest

from open_mythos.data.permutation import BLOCK, in_epochs, mix, mixture_counts, permute


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4097, 100_003])
def test_a_permutation_takes_every_place_once(n: int) -> None:
    taken = permute(np.arange(n), n, (3, 1))
    assert taken.dtype == np.int64 and np.array_equal(np.sort(taken), np.arange(n))


def test_a_permutation_is_computed_for_any_number_alone() -> None:
    n, index = 12_345, np.array([0, 12_344, 77, 77, 5000])
    whole = permute(np.arange(n), n, (7,))
    assert np.array_equal(permute(index, n, (7,)), whole[index])
    assert (permute(np.arange(n), n, (8,)) != whole).mean() > 0.99
    # Neighbours are scattered: the mean distance of two random places is a third of the whole.
    assert abs(np.abs(np.diff(whole)).mean() / n - 1 / 3) < 0.01
    assert abs(np.corrcoef(np.arange(n), whole)[0, 1]) < 0.03


def test_large_numbers() -> None:
    n = 2**40 + 1
    places = permute(np.arange(n - 500, n), n, (0,))
    assert len(set(places.tolist())) == 500 and 0 <= places.min() and places.max() < n


def test_epochs_follow_each_other() -> None:
    n = 37
    rows = in_epochs(np.arange(4 * n), n, (5,)).reshape(4, n)
    assert all(np.array_equal(np.sort(epoch), np.arange(n)) for epoch in rows)
    assert len({tuple(epoch) for epoch in rows}) == 4
    assert np.array_equal(in_epochs(np.arange(30, 90), n, (5,)), rows.ravel()[30:90])


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ((1.0,), [1000]),
        ((1.0, 1.0, 1.0), [334, 333, 333]),
        ((0.7, 0.2, 0.1), [700, 200, 100]),
        ((1e6, 1.0), [999, 1]),
        ((3.0, 1.0, 1e-9), [749, 250, 1]),
    ],
)
def test_a_mixture_is_exact_over_a_block(weights: tuple[float, ...], counts: list[int]) -> None:
    assert mixture_counts(weights).tolist() == counts
    sources, numbers = mix(np.arange(3 * BLOCK), weights, (1, 2))
    for block in np.split(sources, 3):
        assert np.bincount(block, minlength=len(weights)).tolist() == counts
    for source, count in enumerate(counts):
        # Each source's rows are counted as they come.
        assert numbers[sources == source].tolist() == list(range(3 * count))
    part = slice(990, 2017)
    again = mix(np.arange(3 * BLOCK)[part], weights, (1, 2))
    assert np.array_equal(again[0], sources[part]) and np.array_equal(again[1], numbers[part])
