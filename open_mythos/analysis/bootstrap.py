"""Confidence intervals by resampling.

Shapes: M models, N sequences, K values of a sequence, R resamplings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """Means with the 95 % interval around each, three tensors of one shape."""

    mean: Tensor
    low: Tensor
    high: Tensor


def bootstrap(values: Sequence[Tensor], draws: int = 2000) -> Band:
    """The mean over sequences, then over models, with percentile intervals of its resampled values.

    Sequences are drawn anew within each model, and with several models (seeds of one training) these are drawn anew
    too. Few models make intervals too narrow, by sqrt((M - 1) / M). Bounds are NaN for one model and one sequence.

    Args:
        values: one (N, K) for each model; N may differ. NaN is left out.
    """
    generator = torch.Generator().manual_seed(0)
    exact, resampled = [], []
    for x in values:
        x = x.double()
        n = len(x)
        drawn = torch.randint(n, (draws, n), generator=generator)
        counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
        here = (~x.isnan()).double()
        known = x.nan_to_num()
        exact.append(known.sum(0) / here.sum(0))
        resampled.append((counts @ known) / (counts @ here))
    means = torch.stack(exact)
    chosen = torch.randint(len(values), (draws, len(values)), generator=generator)
    if len(values) == 1 and len(values[0]) == 1:
        nothing = torch.full_like(means[0], torch.nan)
        return Band(means[0], nothing, nothing)
    rows = torch.stack(resampled)[chosen, torch.arange(draws)[:, None]].mean(1)
    bounds = torch.nanquantile(rows, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return Band(means.mean(0), bounds[0], bounds[1])
