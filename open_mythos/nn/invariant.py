"""Results of a token that do not depend on the other tokens of a call, to the last bit.

Libraries choose their kernel by the number of rows, and each adds up in an order of its own. Inside `batch_invariant`
the choices of this package go by the weights alone; and a caller that keeps the number of rows a multiple of `rows_of`
stays in one class of kernels of both MKL and oneDNN. Measured on AVX2 and AVX-512: 1 row, 2 to 3, and 4 or more differ
from each other, in bf16 also 4 from 8 or more; float64 and complex products take another path for rows left over behind
a multiple of 4. It does not hold in float64 for weights of an odd number of inputs, where MKL goes by the alignment of
each row.
"""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ON = ContextVar("batch_invariant", default=False)


def rows_of(dtype: torch.dtype) -> int:
    """What the number of rows of a product has to be a multiple of."""
    return 4 if dtype.itemsize >= 4 else 8


def invariant() -> bool:
    """Whether the way to compute may not depend on how many rows there are."""
    # A compiler cannot read a context variable, and what it makes is for one number of rows.
    return not torch.compiler.is_compiling() and _ON.get()


@contextmanager
def batch_invariant(on: bool = True) -> Generator[None]:
    """Choose kernels by weights alone inside. For calls without gradients on a CPU."""
    before = _ON.set(on)
    try:
        yield
    finally:
        _ON.reset(before)
