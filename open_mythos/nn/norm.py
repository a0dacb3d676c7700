"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn

from open_mythos.nn.numerics import wide


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension; the statistics are taken in at least float32.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x_wide = wide(x)
        scale = x_wide.pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt()
        return (x_wide * scale).to(x.dtype) * self.weight
