"""Bits of held-out text, window by window: what means and differences over them are worth."""

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.precision import at_least_float32


def token_bits(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, T) cross-entropy in bits of labels (B, T) under logits (B, T, V)."""
    return F.cross_entropy(at_least_float32(logits).mT, labels, reduction="none") / math.log(2)


def interval(windows: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of (windows,), from 2,000 draws of the windows."""
    picks = np.random.default_rng(0).integers(len(windows), size=(2000, len(windows)))
    low, high = np.quantile(windows[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


def point(x: float, values: np.ndarray) -> tuple[float, float, float, float]:
    """x, and the mean of (seeds, windows) with the ends of its interval over windows, for a figure."""
    return x, float(values.mean()), *interval(values.mean(0))


def between(values: np.ndarray, form: str) -> str:
    """The interval of (seeds, windows) over windows, with the mean over seeds in each."""
    low, high = interval(values.mean(0))
    return f"{low:{form}} to {high:{form}}"


def verdict(difference: np.ndarray) -> str:
    """Of (seeds, windows): the sign, where the interval and every seed agree on it."""
    low, high = interval(difference.mean(0))
    by_seed = difference.mean(1)
    if low > 0 and (by_seed > 0).all():
        return "higher"
    return "lower" if high < 0 and (by_seed < 0).all() else "undecided"
