"""Medians of paired ratios, and when a ratio counts as a difference."""

import numpy as np
import pytest

from benchmarks.stats import Spread, differs, fit_line, noise, ratios


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_spread_is_numpys_percentiles(n: int) -> None:
    values = np.random.default_rng(n).lognormal(size=n)
    spread = Spread.of(values.tolist())
    expected = np.percentile(values, [50, 0, 25, 75, 100])
    assert np.allclose([spread.median, spread.min, spread.q1, spread.q3, spread.max], expected)
    assert spread.n == n


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="measure at least once"):
        Spread.of([])


def test_ratios_are_of_pairs() -> None:
    """A drift that both sides of a pair share does not reach the ratio."""
    drift = [1.0, 2.0, 4.0, 3.0]
    assert ratios([3 * x for x in drift], [2 * x for x in drift]) == Spread(1.5, 1.5, 1.5, 1.5, 1.5, 4)
    with pytest.raises(ValueError, match="argument 2"):
        ratios([1.0], [1.0, 2.0])


def test_a_difference_is_farther_than_the_same_command_from_itself() -> None:
    itself = Spread.of([0.8, 0.9, 1.0, 1.05, 1.1])
    assert noise(itself) == pytest.approx(1 / 0.9 - 1)
    assert not differs(1.11, itself) and not differs(0.91, itself)
    assert differs(1.12, itself) and differs(0.89, itself)


def test_fitted_line() -> None:
    work = [1.0, 2.0, 4.0, 64.0]
    assert fit_line(work, [3 + 5 * w for w in work]) == pytest.approx((3, 5))
    # Least relative squares, so a relative error counts the same at both ends; here against a numeric solution.
    times = [9.0, 12.0, 24.0, 330.0]
    design = np.array([[1 / t, w / t] for w, t in zip(work, times, strict=True)])
    assert fit_line(work, times) == pytest.approx(np.linalg.lstsq(design, np.ones(4), rcond=None)[0])
    # Never a negative cost of doing nothing.
    assert fit_line([1.0, 2.0], [1.0, 3.0])[0] == 0
