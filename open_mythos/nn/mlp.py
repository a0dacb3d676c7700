"""The gated feed-forward of prelude and coda, of shared experts, and of one routed expert taken alone."""

import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), (..., dim) -> (..., dim). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, expert_dim, bias=False)
        self.up = nn.Linear(dim, expert_dim, bias=False)
        self.down = nn.Linear(expert_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
