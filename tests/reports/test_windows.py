"""What a difference over windows is worth, and bits against a slow reference."""

import math

import numpy as np
import pytest
import torch

from open_mythos.reports.windows import between, interval, point, token_bits, verdict


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


def test_a_verdict_needs_the_interval_and_every_seed() -> None:
    noise = np.random.default_rng(0).normal(size=(3, 400))
    assert verdict(noise + 1) == "higher"
    assert verdict(noise - 1) == "lower"
    assert verdict(noise - noise.mean()) == "undecided"
    assert verdict(noise + np.array([[3.0], [3.0], [-1.0]])) == "undecided"
    low, high = interval(noise[0])
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert low < noise[0].mean() < high
    assert between(noise[:1], ".2f") == f"{low:.2f} to {high:.2f}"
    assert point(3, noise[:1]) == (3, noise[0].mean(), low, high)
