"""The gated feed-forward: alone (prelude, coda, shared experts), and as one step of the routed experts.

Shapes: N tokens, D width, F hidden width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.nn.layer_costs import Execution, LayerCosts
from open_mythos.ops.linear import Linear, autocasts, captured, linear, outer


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
        gate_up, down = self.gate_up.weight, self.down.weight
        if not torch.is_grad_enabled() or captured() or autocasts(x):
            return linear(silu_product(linear(x, gate_up)), down)
        return _SwiGLU.apply(x.reshape(-1, x.shape[-1]), gate_up, down).view_as(x)


def silu_product(hidden: Tensor) -> Tensor:
    """silu(gate) * up of hidden = (gate, up) side by side: (..., 2 F) -> (..., F)."""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """`Expert` keeping only gate and up for the backward pass, not what silu and the product made of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        hidden = linear(x, gate_up)
        ctx.save_for_backward(x, gate_up, down, hidden)
        return linear(silu_product(hidden), down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # ty: ignore[incompatible-method-override]
        x, gate_up, down, hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            out = linear(silu_product(linear(x, gate_up)), down)
            return torch.autograd.grad(out, (x, gate_up, down), grad, create_graph=True)
        dhidden, mixed, _ = swiglu_backward(hidden, linear(grad, down.T))
        return linear(dhidden, gate_up.T), outer(dhidden, x), outer(grad, mixed)


def swiglu_backward(
    hidden: Tensor, dmixed: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient through silu(gate) * up, without autograd.

    Args:
        hidden: (N, 2 F), gate and up side by side.
        dmixed: (N, F), the gradient by scale * silu(gate) * up; overwritten.
        scale: (N, 1); None: 1.

    Returns:
        The gradient by `hidden` (N, 2 F), scale * silu(gate) * up (N, F), and the gradient by `scale` (N,).
    """
    gate, up = hidden.chunk(2, dim=-1)
    dhidden = torch.empty_like(hidden)
    dgate, dup = dhidden.chunk(2, dim=-1)
    act = F.silu(gate)
    mixed = act * up
    dscale = None
    if scale is not None:
        dscale = torch.linalg.vecdot(dmixed, mixed)
        mixed *= scale
        dmixed *= scale
    torch.mul(dmixed, act, out=dup)
    torch.ops.aten.silu_backward.grad_input(dmixed.mul_(up), gate, grad_input=dgate)
    return dhidden, mixed, dscale
