"""Matrix products by the fastest route that torch has on this machine.

On CPUs with AVX-512, float32 products may go to oneDNN instead of torch's own choice, MKL; see ops/routes.py.

Shapes: K inputs, N outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from open_mythos.ops.batch_invariant import by_rows, invariant
from open_mythos.ops.int8 import Int8Weight, int8_linear
from open_mythos.ops.routes import HAS_ONEDNN, onednn, prefers_onednn

MANY_PRODUCTS = 2**21
"""Multiplications from which oneDNN may win over the ten microseconds that a gradient of its own costs in Python."""
FEW_ROWS = 8
"""Rows of x up to which a compiled sum over weight * x beats the product of a slow library: it reads weights once."""
FEWER_ROWS = 2
"""The same, in float32 where torch's own choice of library is fast for a few rows."""
INVARIANT_ROWS = 16
"""Rows for which batch-invariant calls choose the library, whatever their number of rows."""


Weight = Tensor | Int8Weight


class Linear(nn.Linear):
    """x @ weight^T without a bias, (..., K) -> (..., N). Several widths are so many maps of x in one product."""

    def __init__(self, in_features: int, *out_features: int) -> None:
        super().__init__(in_features, sum(out_features), bias=False)
        self.widths = out_features

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute each of the maps of x, as views of one tensor."""
        return linear(x, self.weight).split(self.widths, dim=-1)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """Compute x @ weight^T: (..., K), (N, K) -> (..., N), differentiable but for int8 weights."""
    if isinstance(weight, Int8Weight):
        return int8_linear(x, weight)
    if prefers_compiled_sum(x):
        # A few rows under a compiler: it fuses a sum over weight * x.
        rows = materialize(x.reshape(-1, x.shape[-1]))
        return (weight[:, None] * rows).sum(-1).T.reshape(*x.shape[:-1], -1)
    if invariant():
        # The weight alone decides the route, and `by_rows` the number of rows.
        product = _onednn if _takes_onednn(x, weight) else F.linear
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        out = by_rows(product, rows, weight, product is _onednn) if len(rows) else product(rows, weight)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], weight.shape[0])
    if not _takes_onednn(x, weight):
        return F.linear(x, weight)
    if torch.compiler.is_compiling():
        return torch.ops.open_mythos.product(x, weight)
    return _Product.apply(x, weight) if torch.is_grad_enabled() else _onednn(x, weight)


def linear_by_head(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x @ weight^T for each of H heads or experts: (N, H, K), (H, M, K) -> (N, H, M), differentiable."""
    return by_rows(_by_head, x, weight) if invariant() else _by_head(x, weight)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight.mT).transpose(0, 1)


def outer(grad: Tensor, x: Tensor) -> Tensor:
    """Compute grad^T @ x, the gradient of a weight: (M, N), (M, K) -> (N, K)."""
    (M, N), K = grad.shape, x.shape[1]
    # oneDNN copies what comes first if it is transposed: grad, or else x, and then the result to turn it round.
    return linear(grad.T, x.T) if M * N <= (M + N) * K else linear(x.T, grad.T).T


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        # For a weight with gaps, such as a slice, oneDNN has only its reference loop: a thousand times as slow.
        weight = weight.contiguous()
    return onednn(x, weight)


class _Product(torch.autograd.Function):
    """oneDNN's product has no gradient of its own; both gradients are products again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # ty: ignore[incompatible-method-override]
        x, weight = ctx.saved_tensors
        dx = linear(grad, weight.T) if ctx.needs_input_grad[0] else None
        dw = outer(grad.flatten(0, -2), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return dx, dw


# `_onednn` as an operator that a compiled graph calls; Inductor cannot lower oneDNN's own. Defined step by step: the
# decorator `custom_op` adds five microseconds to every call.
_PRODUCT = "open_mythos::product"
torch.library.define(_PRODUCT, "(Tensor x, Tensor weight) -> Tensor")
torch.library.impl(_PRODUCT, "cpu", _onednn)


@torch.library.register_fake(_PRODUCT)
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


torch.library.register_autograd(_PRODUCT, _Product.backward, setup_context=_save)


def prefers_compiled_sum(x: Tensor) -> bool:
    """Return whether a compiler's own sum is faster than a library's product with x.

    For few rows it reads the weight 1.5 times as fast, and fuses the operations before and behind.
    """
    if not torch.compiler.is_compiling() or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    # In compiled code a float32 product goes to torch's own choice, MKL, which is slow where oneDNN is chosen.
    is_fast = x.dtype is torch.float32 and not prefers_onednn(FEW_ROWS // 2, MANY_PRODUCTS // FEW_ROWS)
    return x.numel() <= (FEWER_ROWS if is_fast else FEW_ROWS) * x.shape[-1]


def materialize(x: Tensor) -> Tensor:
    """Return x, computed once: a compiler would otherwise compute it again inside every sum that uses it."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    # A decode step asks this for every product, so what is cheap and often says no comes first.
    if not HAS_ONEDNN or x.dtype is not torch.float32 or weight.dtype is not torch.float32 or not x.is_cpu:
        return False
    if invariant() and not weight.is_contiguous():
        return False  # an engine stores weights transposed where torch's own choice is then the faster one
    n_rows, size = x.numel() // max(1, x.shape[-1]), weight.numel()
    if torch.is_grad_enabled() and n_rows * size < MANY_PRODUCTS:
        return False
    if not prefers_onednn(INVARIANT_ROWS if invariant() else n_rows, size) or torch.is_autocast_enabled("cpu"):
        return False
    return not is_traced() or (torch.compiler.is_compiling() and not torch.compiler.is_exporting())


def uses_onednn(x: Tensor, n_rows: int, weight_values: int) -> bool:
    """Return whether products of x, each of so many rows with so many values, are faster in oneDNN one at a time."""
    if x.dtype is not torch.float32 or x.device.type != "cpu" or is_traced() or autocasts(x):
        return False
    return n_rows * weight_values >= MANY_PRODUCTS and prefers_onednn(n_rows, weight_values)


def is_traced() -> bool:
    """Return whether a tracer runs (torch.compile, torch.func, forward-mode AD) or tensors are fake.

    Only torch's own differentiable operators may be used then, and no value may be read.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    )


def autocasts(x: Tensor) -> bool:
    """Return whether products with x run in autocast's dtype. Autocast does not exist on meta."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


if HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _count_flops(x_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
        return 2 * x_shape.numel() * weight_shape[0]
