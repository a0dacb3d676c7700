"""Intervals and verdicts against numbers by hand, and bits against a slow reference."""

import math

import numpy as np
import pytest
import torch

from open_mythos.reports.stats import Estimate, TextEstimate, bootstrap, over_seeds, rank_correlation, token_bits


def test_bits_of_tokens() -> None:
    logits, labels = (
        torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[0, 4, 1], [2, 2, 3]]),
    )
    bits = token_bits(logits, labels)
    for b in range(2):
        for t in range(3):
            p = logits[b, t, labels[b, t]].exp() / logits[b, t].exp().sum()
            assert bits[b, t].item() == pytest.approx(-math.log2(p), rel=1e-5)


def test_interval_over_seeds_is_students_t() -> None:
    # 2.776 * sqrt(2.5 / 5), by hand.
    mean, low, high = Estimate([1, 2, 3, 4, 5]).interval
    assert (mean, high - mean) == (3, pytest.approx(1.963, abs=5e-4)) and mean - low == pytest.approx(high - mean)
    assert f"{Estimate([1, 2, 3, 4, 5]):.2f}" == "3.00 [1.04, 4.96]"
    # More than 10 values get the interval of 10, which is never narrower than theirs.
    mean, low, high = over_seeds([0, 1] * 8)
    assert high - mean == pytest.approx(2.262 * math.sqrt(4 / 15) / 4)
    assert over_seeds(np.ones((3, 2, 4))).low.shape == (2, 4)


def test_one_seed_has_no_interval() -> None:
    assert Estimate([0.5]).interval[0] == 0.5 and math.isnan(Estimate([0.5]).interval[1])
    assert str(Estimate([0.5])) == "0.500"


def test_a_side_is_named_only_where_the_interval_is_on_it() -> None:
    assert Estimate([0.6, 0.61, 0.62]).side(0.5) == "above"
    assert Estimate([0.4, 0.41, 0.42]).side(0.5) == "below"
    assert Estimate([0.3, 0.5, 0.9]).side(0.5) == "not told apart from"
    assert Estimate([0.9]).side(0.5) == "one seed, so not told apart from"
    assert (Estimate([0.6, 0.7]) - Estimate([0.1, 0.2])).by_seed.tolist() == pytest.approx([0.5, 0.5])


def test_the_bootstrap_leaves_out_what_is_not_there() -> None:
    x = np.random.default_rng(0).normal(size=(400, 3))
    mean, low, high = bootstrap(x)
    assert mean == pytest.approx(x.mean(0))
    assert high - low == pytest.approx(2 * 1.96 * x.std(0) / 20, rel=0.1)
    # Seeded draws of each column alone are the reference.
    draws = np.random.default_rng(0).integers(400, size=(2000, 400))
    assert low == pytest.approx(np.quantile(x[draws].mean(1), 0.025, axis=0))
    x[200:, 1] = np.nan
    assert bootstrap(x).mean[1] == pytest.approx(x[:200, 1].mean())
    assert np.isfinite(bootstrap(x).low).all() and np.isnan(bootstrap(x[:1]).low).all()


def test_a_verdict_needs_the_interval_and_every_seed() -> None:
    noise = np.random.default_rng(0).normal(size=(3, 400))
    assert TextEstimate(noise + 1).verdict == "higher"
    assert TextEstimate(noise - 1).verdict == "lower"
    assert TextEstimate(noise - noise.mean()).verdict == "undecided"
    assert TextEstimate(noise + np.array([[3.0], [3.0], [-1.0]])).verdict == "undecided"
    one = TextEstimate(noise[:1])
    mean, low, high = one.interval
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert low < mean < high and mean == pytest.approx(noise[0].mean())


def test_rank_correlation() -> None:
    # By hand: ranks (0.5, 0.5, 2, 3) and (0, 1, 2, 3) less their mean 1.5 give 4.5 / sqrt(4.5 * 5).
    assert rank_correlation([1, 1, 5, 9], [2, 3, 4, 8]) == pytest.approx(math.sqrt(0.9))
    assert rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert math.isnan(rank_correlation([1, 2, 3], [5, 5, 5]))


def test_rank_correlation_within_levels_leaves_nothing_of_them() -> None:
    rng = np.random.default_rng(0)
    level = rng.integers(0, 13, 4000)
    # Both follow the level, and not along a line.
    a, noise = np.abs(level - 6) + rng.integers(0, 4, 4000), rng.integers(0, 4, 4000)
    assert rank_correlation(a, np.abs(level - 6) + noise) > 0.5
    assert rank_correlation(a, np.abs(level - 6) + noise, level) == pytest.approx(0, abs=0.05)
    assert rank_correlation(a, a + noise, level) > 0.5
    # By hand: within the first level ranks -0.5, 0.5 and 1, -1, within the second -0.5, 0.5 and -1, 1.
    assert rank_correlation([1, 2, 3, 4], [3, 1, 2, 4], [0, 0, 1, 1]) == pytest.approx(0)
    assert math.isnan(rank_correlation([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]))
