"""Arithmetic that has to run in at least float32, whatever the model's dtype and whether or not autocast is on."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.linear import autocasts, linear


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in promote(x.dtype, float32): bf16 and fp16 become float32, float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in the dtype. Torch dispatches an operation for `x.to` of the same dtype too, a microsecond each."""
    return x if x.dtype is dtype else x.to(dtype)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which products run in their operands' dtype, on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `linear` in at least float32. Autocast would send it to bf16, so it is switched off here."""
    x, weight = at_least_float32(x), at_least_float32(weight)
    if x.dtype is not weight.dtype:
        x, weight = x.double(), weight.double()
    with no_autocast(x):
        return linear(x, weight) if bias is None else F.linear(x, weight, as_dtype(bias, x.dtype))
