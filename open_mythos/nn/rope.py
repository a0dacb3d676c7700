"""Rotary position embedding.

Shapes: B rows, T tokens, H heads, K head width.
"""

import torch
from torch import Tensor

from open_mythos.ops.linear import is_traced
from open_mythos.ops.precision import as_dtype

Rotation = tuple[Tensor, Tensor, Tensor | None]
"""Cosine and sine of every token's angles, each (B or 1, T, K // 2), and both as complex numbers with an axis for the
heads, (B or 1, T, 1, K // 2); None under tracers and on devices that do not know complex numbers."""


def rotary_table(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Return the rotation by position * theta^(-2i/dim), whose tensors are (*positions.shape, [1,] dim // 2).

    The angles are made in float64: in float32 they are off by 0.03 rad at position one million. Nothing is stored in
    the model, so a long context costs nothing until it is used and no cast can damage a table.

    Source: Su et al. 2021, arXiv 2104.09864.
    """
    # MPS has no float64, so the angles are made on the host there.
    device = "cpu" if positions.device.type == "mps" else positions.device
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle = positions.to(device=device, dtype=torch.float64)[..., None] * frequency
    dtype = torch.promote_types(dtype, torch.float32)
    cos, sin = (x.to(device=positions.device, dtype=dtype) for x in (angle.cos(), angle.sin()))
    return cos, sin, _turn(cos, sin)


def _turn(cos: Tensor, sin: Tensor) -> Tensor | None:
    """Return the rotation as complex numbers, which make one product of it, where they are known."""
    return None if is_traced() or cos.device.type not in ("cpu", "cuda") else torch.complex(cos, sin)[..., None, :]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, turn: Tensor | None = None) -> Tensor:
    """Turn channel pairs (2i, 2i+1) of every head by the angles of its token.

    Args:
        x: (B, T, H, K) with K even.
        cos, sin, turn: from `rotary_table`; turn is made from the others if it is left out.

    Returns:
        (B, T, H, K) in x.dtype; the products run in the table's dtype.
    """
    pairs = as_dtype(x, cos.dtype).unflatten(-1, (-1, 2))
    turn = _turn(cos, sin) if turn is None else turn
    if turn is None or is_traced():
        cos, sin = cos[:, :, None], sin[:, :, None]
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        return as_dtype(turned, x.dtype)
    # One complex product: on a CPU ten times faster than the real ones, which read every second value.
    if pairs.storage_offset() % 2 or any(stride % 2 for stride in pairs.stride()[:-1]):
        pairs = pairs.contiguous()
    return as_dtype(torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2), x.dtype)
