"""Rotary position embedding.

Shapes: B rows, T tokens, H heads, K head width.
"""

import torch
from torch import Tensor

from open_mythos.ops.linear import is_traced


def rotary_table(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position * theta^(-2i/dim), each (*positions.shape, dim // 2).

    The angles are made in float64: in float32 they are off by 0.03 rad at position one million. Nothing is stored in
    the model, so a long context costs nothing until it is used and no cast can damage a table.

    Source: Su et al. 2021, arXiv 2104.09864.
    """
    # MPS has no float64, so the angles are made on the host there.
    device = "cpu" if positions.device.type == "mps" else positions.device
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle = positions.to(device=device, dtype=torch.float64)[..., None] * frequency
    dtype = torch.promote_types(dtype, torch.float32)
    return (angle.cos().to(device=positions.device, dtype=dtype), angle.sin().to(device=positions.device, dtype=dtype))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (2i, 2i+1) of every head by the angles of its token.

    Args:
        x: (B, T, H, K) with K even.
        cos, sin: (B or 1, T, K // 2), at least float32, from `rotary_table`.

    Returns:
        (B, T, H, K) in x.dtype; the products run in the table's dtype.
    """
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2))
    cos, sin = cos[:, :, None], sin[:, :, None]
    if is_traced() or x.device.type not in ("cpu", "cuda"):
        even, odd = pairs.unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
    # One complex product: on a CPU ten times faster than the real ones, which read every second value. Compilers and
    # some devices do not know complex numbers.
    if pairs.storage_offset() % 2 or any(stride % 2 for stride in pairs.stride()[:-1]):
        pairs = pairs.contiguous()
    turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
