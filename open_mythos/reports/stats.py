"""Confidence intervals over the sequences that one model read, or over the seeds of one training.

Shapes: N sequences, K values of a sequence, R resamplings.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % for 2 to 10 values."""


class Band(NamedTuple):
    """Means with the 95 % interval around each, three tensors of one shape."""

    mean: Tensor
    low: Tensor
    high: Tensor


def mean_band(values: Sequence[Tensor]) -> Band:
    """The mean over sequences, then over models: by `bootstrap` for one, for several Student's t over their means.

    Seeds are the independent repetitions: resampling five of them makes intervals that hold the mean in 83 % of cases.

    Args:
        values: one (N, K) for each model; N may differ. NaN is left out.
    """
    if len(values) == 1:
        return bootstrap(values[0])
    means = torch.stack([x.double().nanmean(0) for x in values])
    n = len(means)
    mean, half = means.mean(0), T95[min(n, 10) - 2] * means.std(0) / math.sqrt(n)
    return Band(mean, mean - half, mean + half)


def bootstrap(x: Tensor, draws: int = 2000) -> Band:
    """The mean of (N, K) over sequences, with percentiles of its resampled values; NaN bounds for one sequence."""
    x, n = x.double(), len(x)
    mean = x.nanmean(0)
    if n == 1:
        nothing = torch.full_like(mean, torch.nan)
        return Band(mean, nothing, nothing)
    drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    resampled = (counts @ x.nan_to_num()) / (counts @ (~x.isnan()).double())
    low, high = torch.nanquantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return Band(mean, low, high)
