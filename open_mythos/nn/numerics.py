"""Arithmetic that has to run in at least float32, whatever the model's dtype and whether or not autocast is on."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in promote(x.dtype, float32): bf16 and fp16 become float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in at least float32. Autocast would send a linear to bf16, so it is switched off here."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
