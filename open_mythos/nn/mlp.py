"""The gated feed-forward: alone in prelude and coda, and as the shared experts."""

from torch import Tensor, nn

from open_mythos.nn.layer_costs import Execution, LayerCosts
from open_mythos.ops.linear import Linear
from open_mythos.ops.swiglu import swiglu


class Expert(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), (..., dim) -> (..., dim). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, expert_dim, expert_dim)
        self.down = Linear(expert_dim, dim)

    @staticmethod
    def costs(dim: int, expert_dim: int) -> LayerCosts:
        """Return the maps of gate, up and down, and the bytes saved for their gradients."""

        def saved(execution: Execution, T: int) -> float:
            # The input, gate and up; under autocast also silu(gate) and its product with up.
            return execution.value_bytes * (dim + (4 if execution.autocast else 2) * expert_dim)

        return LayerCosts(((dim, expert_dim, expert_dim), (expert_dim, dim)), saved)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_up.weight, self.down.weight)
