"""Root-mean-square normalisation, with a gradient for CPUs that saves less than autograd's and makes fewer passes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.linear import is_traced
from open_mythos.ops.precision import as_dtype, at_least_float32

IN_CACHE = 2**16
"""Number of values normalised at a time in bf16 and fp16, whose float32 copies then stay in the processor's cache."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute weight * x / sqrt(mean(x^2) + eps) over the last dimension, with statistics in at least float32."""
    # Under autocast x may be bf16 beside a float32 weight, which the fused kernel does not take.
    weight = as_dtype(weight, x.dtype)
    on_cpu = x.device.type == "cpu" and not is_traced()
    if on_cpu and torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    # Torch computes each row alone and rounds it once, so a row has the same bits in a call of any size.
    if not on_cpu or x.element_size() >= 4 or x.numel() <= IN_CACHE:
        return F.rms_norm(x, weight.shape, weight, eps)
    rows = x.reshape(-1, x.shape[-1]).split(max(1, IN_CACHE // x.shape[-1]))
    return torch.cat([F.rms_norm(part, weight.shape, weight, eps) for part in rows]).view(x.shape)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    # The norm is one pass over x; its square over D is the mean of squares.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """On a CPU torch composes the norm of six operators and saves x and its normalised copy; this saves x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        # In at least float32 until the end: a rounded inverse would double the error of bf16.
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override]
        x, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            out = F.rms_norm(x, weight.shape, weight, ctx.eps)
            return *torch.autograd.grad(out, (x, weight), grad, create_graph=True), None
        # The fused gradient of a layer norm about zero instead of the mean, one pass over x and grad. It subtracts what
        # the mean would have taken away, which is put back.
        D, grad, scale = x.shape[-1], at_least_float32(grad), at_least_float32(weight)
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward.default(
            grad, at_least_float32(x), [D], torch.zeros_like(inverse), inverse, scale, None, [True, True, False]
        )
        dx += (grad @ scale)[..., None].mul_(inverse).div_(D)
        return dx.to(x.dtype), dweight.to(weight.dtype), None
