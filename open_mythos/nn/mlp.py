"""The gated feed-forward: alone in prelude and coda, and as the shared experts."""

from torch import Tensor, nn

from open_mythos.ops.linear import Linear
from open_mythos.ops.swiglu import swiglu


class Expert(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), (..., dim) -> (..., dim). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, expert_dim, expert_dim)
        self.down = Linear(expert_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_up.weight, self.down.weight)
