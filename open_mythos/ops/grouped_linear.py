"""Products of consecutive groups of rows, each with a matrix of its own.

Shapes: M rows, E groups, K inputs, N outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.linear import is_traced


def grouped_linear(x: Tensor, weight: Tensor, rows_per_group: Tensor) -> Tensor:
    """Compute x_g @ weight_g^T: x (M, K), weight (E, N, K), rows_per_group (E,) -> (M, N).

    One grouped product where torch has it: float32, bf16 and fp16 with rows of a multiple of 16 bytes, on CPU and CUDA.
    Anything else (float64, odd widths, MPS) takes a loop over the groups, which waits for the counts on a GPU.
    """
    # Traced, but not for bf16: see the operators below.
    if (is_traced() and x.dtype != torch.bfloat16) or x.is_meta:
        return _product(x, weight, rows_per_group)
    if _has_kernel(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=_ends(rows_per_group))
    # unbind, not weight[i]: indexing a stacked parameter makes a gradient of its full size for every group.
    groups = x.split(rows_per_group.tolist())
    return torch.cat([rows @ w.T for rows, w in zip(groups, weight.unbind(0), strict=True)])


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    return aligned and x.dtype != torch.float64 and x.device.type in ("cpu", "cuda")


def _ends(rows_per_group: Tensor) -> Tensor:
    return rows_per_group.cumsum(0).to(torch.int32)


# A compiler and fake tensors ask an operator for the shape of its result, and torch's answers for bf16 alone. These two
# are the same products as operators of our own, which answer for every dtype.


@torch.library.custom_op("open_mythos::grouped_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, rows_per_group: Tensor) -> Tensor:
    if x.is_cuda and _has_kernel(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=_ends(rows_per_group))
    return torch.cat([rows @ w.T for rows, w in zip(x.split(rows_per_group.tolist()), weight, strict=True)])


@torch.library.custom_op("open_mythos::grouped_outer", mutates_args=())
def _outer(grad: Tensor, x: Tensor, rows_per_group: Tensor) -> Tensor:
    """Compute grad_g^T @ x_g: (M, N), (M, K) -> (E, N, K)."""
    sizes = rows_per_group.tolist()
    return torch.stack([g.T @ rows for g, rows in zip(grad.split(sizes), x.split(sizes), strict=True)])


@_product.register_fake
def _(x: Tensor, weight: Tensor, rows_per_group: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _(grad: Tensor, x: Tensor, rows_per_group: Tensor) -> Tensor:
    return x.new_empty(rows_per_group.shape[0], grad.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rows_per_group = ctx.saved_tensors
    grad = grad.contiguous()
    dx = _product(grad, weight.transpose(1, 2), rows_per_group) if ctx.needs_input_grad[0] else None
    return dx, _outer(grad, x, rows_per_group) if ctx.needs_input_grad[1] else None, None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    g, x, rows_per_group = ctx.saved_tensors
    return _product(x, grad, rows_per_group), _product(g, grad.transpose(1, 2), rows_per_group), None


_product.register_autograd(_product_backward, setup_context=_save)
_outer.register_autograd(_outer_backward, setup_context=_save)
