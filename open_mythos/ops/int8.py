"""Products with weights of one byte: 8-bit integers with a scale for each output.

A decode step waits for its weights to be read from memory, and these are half of bfloat16's bytes.

Shapes: K inputs, N outputs.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.batch_invariant import by_rows, invariant

LARGEST = 127
"""The largest value stored; -128 is left out, so that the range is symmetric."""
SMALLEST = 1e-30
"""Least of a row's largest values, so that a row of zeros stays one."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A matrix, or a stack of them: values * scales, one scale for each output."""

    values: Tensor
    """(..., N, K) int8"""
    scales: Tensor
    """(..., N), each exact in bfloat16, so that a cast of the model to another dtype changes none."""

    def __getitem__(self, index: int) -> "Int8Weight":
        return Int8Weight(self.values[index], self.scales[index])

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def dequantize(self) -> Tensor:
        """Return the matrix in the scales' dtype."""
        return self.values.to(self.scales.dtype) * self.scales[..., None]


def quantize_tensor(weight: Tensor) -> Int8Weight:
    """Round a matrix (..., N, K) of finite values to int8. Each output's largest value becomes 127 or a little less."""
    weight = weight.detach()
    largest = weight.float().abs().amax(-1)
    # The next bfloat16 above largest / 127, so that no value is cut off; an output of zeros takes any scale.
    scales = (largest / LARGEST).bfloat16()
    above = torch.nextafter(scales, torch.full_like(scales, torch.inf))
    scales = torch.where(scales.float() * LARGEST < largest, above, scales)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = (weight.float() / scales.float()[..., None]).round().to(torch.int8)
    return Int8Weight(values, scales.to(weight.dtype))


def int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    """Compute x @ weight^T, (..., K) -> (..., N). On a CPU each row of x is rounded to int8 too.

    Products of integers are exact, so there a row's result does not depend on the other rows of a call. A CPU whose
    products are not exact multiplies in x's dtype, in blocks of rows where calls have to be batch-invariant.

    Raises:
        RuntimeError: x needs a gradient.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("int8 weights are for inference and give no gradient; train the model they were made from")
    rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], weight.shape[0])
    if not x.is_cpu or not products_are_exact():
        values = weight.values.to(x.dtype)
        out = by_rows(F.linear, rows, values) if invariant() and len(rows) else F.linear(rows, values)
        return (out * weight.scales.to(x.dtype)).view(shape)
    # The largest value of a row becomes 127.
    largest = torch.linalg.vector_norm(rows, torch.inf, -1, keepdim=True, dtype=torch.float32).clamp_(min=SMALLEST)
    values = (rows * (LARGEST / largest)).round_().to(torch.int8)
    sums = torch._int_mm(values, weight.values.T)
    return (sums * (largest / LARGEST)).mul_(weight.scales).to(x.dtype).view(shape)


@functools.cache
def products_are_exact() -> bool:
    """Return whether this CPU's products of int8 are: without instructions for them, sums of pairs may be cut off."""
    x = torch.full((2, 64), LARGEST, dtype=torch.int8)
    return bool((torch._int_mm(x, x.T) == 64 * LARGEST**2).all())


# See `routes.prefers_onednn`.
products_are_exact._dynamo_marked_constant = True  # ty: ignore[missing-attribute]
