"""The gated feed-forward, SwiGLU, with a gradient that saves less than autograd's.

Shapes: N tokens, D width, F hidden width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.linear import Weight, autocasts, is_traced, linear, outer


def swiglu(x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """Compute down(silu(gate(x)) * up(x)): (..., D), gate_up (2 F, D), down (D, F) -> (..., D)."""
    if torch.is_grad_enabled() and isinstance(gate_up, Tensor) and not is_traced() and not autocasts(x):
        return _SwiGLU.apply(x.reshape(-1, x.shape[-1]), gate_up, down).view_as(x)
    return linear(silu_product(linear(x, gate_up)), down)


def silu_product(hidden: Tensor) -> Tensor:
    """Compute silu(gate) * up of hidden = (gate, up) side by side: (..., 2 F) -> (..., F)."""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """SwiGLU that saves only gate and up for the backward pass, not silu(gate) and the product."""

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
    """Compute the gradient through silu(gate) * up, without autograd.

    Args:
        hidden: (N, 2 F), gate and up side by side.
        dmixed: (N, F), the gradient by scale * silu(gate) * up; overwritten.
        scale: (N, 1); None: 1.

    Returns:
        The gradient by `hidden` (N, 2 F), scale * silu(gate) * up (N, F), and the gradient by `scale` (N,).
    """
    # Recompute the activation, which was not saved.
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
    # Both halves of the gradient go straight into one tensor, for one product with gate_up.
    torch.mul(dmixed, act, out=dup)
    torch.ops.aten.silu_backward.grad_input(dmixed.mul_(up), gate, grad_input=dgate)
    return dhidden, mixed, dscale
