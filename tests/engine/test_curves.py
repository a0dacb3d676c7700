"""Measured points, and what lies between and behind them."""

import math

import pytest

from open_mythos.engine.readout_policy import Curve


def test_lines_between_points() -> None:
    curve = Curve({8: 10.0, 1: 3.0, 4: 6.0})
    assert [curve(n) for n in (1, 4, 8)] == [3, 6, 10]
    assert curve(2) == pytest.approx(4) and curve(3) == pytest.approx(5)
    assert curve(5) == pytest.approx(7)


def test_behind_the_last_point() -> None:
    """The last slope goes on, also where no value is kept ready."""
    curve = Curve({1: 1.0, 8: 8.0, 16: 12.0})
    assert curve.slope == 0.5
    assert [curve(n) for n in (17, 1000, 4095, 4096, 100_000)] == pytest.approx([12.5, 504, 2051.5, 2052, 50_004])
    assert Curve({1: 1.0, 5000: 5000.0})(5001) == pytest.approx(5001)


def test_before_the_first_point() -> None:
    curve = Curve({4: 2.0, 8: 3.0})
    assert [curve(n) for n in (0, 1, 3, 4)] == [0, 2, 2, 2]


def test_what_falls_falls() -> None:
    """A step may get faster with more tokens, where a better kernel fits; behind the last point it does not."""
    curve = Curve({1: 5.0, 2: 7.0, 4: 3.0, 8: 2.0})
    assert curve(3) == pytest.approx(5)
    assert curve.slope == 0 and curve(100) == 2


def test_one_point() -> None:
    assert [Curve({2: 3.0})(n) for n in (1, 2, 50)] == [3, 3, 3]


@pytest.mark.parametrize("points", [{}, {0: 1.0}, {1: -1.0}, {1: math.nan}, {1: math.inf}])
def test_refuses(points: dict[int, float]) -> None:
    with pytest.raises(ValueError, match=r"points=.*; measure"):
        Curve(points)
