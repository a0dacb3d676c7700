"""Results of a token that do not depend, to the last bit, on the other tokens of a call.

A library chooses its kernel by the number of rows of a product, and each kernel adds up in an order of its own. Which
row counts share an order differs by processor, shape and dtype. In float32 with 512 inputs MKL has the classes {1},
{2 .. 15} and {16 ..} on an Intel Xeon with AMX, and {1}, {2, 3} and {4 ..} on an AMD EPYC. On the Xeon oneDNN's bf16
products are one class but for a few sizes.

Nothing of this is assumed here. Inside `batch_invariant` every product runs on one of `SIZES` rows: fewer rows are
padded, more are cut into blocks. Before a product of some shape first runs at a size, it is computed there on equal
rows and compared with `REFERENCE` rows, and a size that gives other bits is passed over.
"""

from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Row counts that a product may run at. From 4 rows on, at most three eighths of a block are padding."""
REFERENCE = 16
"""The row count whose bits every other size has to give. On an Intel Xeon with AMX it is in the class of large
products, so that those run uncut."""
PROBED_VALUES = 64
"""Results compared at each size, at least: two orders of addition may agree in a few values by chance."""


@dataclass
class Invariance:
    """The findings about the products inside one `batch_invariant`."""

    holds: bool = True
    """False once a product gave equal rows different bits at `REFERENCE` rows, so that no size is of use."""


_ON: ContextVar[Invariance | None] = ContextVar("batch_invariant", default=None)
_REFERENCES: dict[Hashable, Tensor | None] = {}
"""The result of a row at `REFERENCE` rows, by product; None if it depends on the row's place."""
_AGREES: dict[Hashable, bool] = {}
"""True if a product gives its reference at a size, by (product, size)."""
_BLOCKS: dict[Hashable, list[tuple[int, int]]] = {}
"""Results of `row_blocks`, by (product, n)."""


def invariant() -> bool:
    """Return whether results may not depend on the number of rows of a call."""
    # A compiler cannot read a context variable, and what it makes is for one number of rows.
    return not torch.compiler.is_compiling() and _ON.get() is not None


@contextmanager
def batch_invariant(state: Invariance | None) -> Generator[None]:
    """Make products independent of their number of rows inside; None: choose kernels by speed.

    For calls without gradients on a CPU.
    """
    before = _ON.set(state)
    try:
        yield
    finally:
        _ON.reset(before)


def size_of(n: int) -> int:
    """Return the least number of rows, at least n, that is a sum of the largest of `SIZES` and one more of them."""
    whole = (n - 1) // SIZES[-1] * SIZES[-1]
    return whole + next(size for size in SIZES if size >= n - whole)


def row_blocks(product: Hashable, n: int, probe: Callable[[int], Tensor]) -> list[tuple[int, int]]:
    """Divide the n rows of a product into blocks that give the bits of its reference.

    Args:
        product: names the kernel: its route, and the layout of every operand but for the number of rows.
        probe: computes the product on as many equal rows as it is given, (size, values).

    Returns:
        (rows, size) of each block, in order; `size - rows` rows of padding belong behind it.
    """
    product = (product, torch.get_num_threads())
    # The search runs once for each product and number of rows.
    blocks = _BLOCKS.get((product, n))
    if blocks is None:
        blocks, left = [], n
        while left > 0:
            # One block that fits all that is left, or else the largest that agrees.
            size = next((size for size in SIZES if size >= left and _agrees(product, size, probe)), 0)
            size = size or next(size for size in reversed(SIZES) if size < left and _agrees(product, size, probe))
            blocks.append((min(left, size), size))
            left -= size
        _BLOCKS[product, n] = blocks
    state = _ON.get()
    if state is not None and _REFERENCES.get(product, 0) is None:
        state.holds = False
    return blocks


def _agrees(product: Hashable, size: int, probe: Callable[[int], Tensor]) -> bool:
    """Return whether a product gives every row the same bits at `size` rows as at `REFERENCE` rows."""
    if product not in _REFERENCES:
        out = probe(REFERENCE)
        _REFERENCES[product] = out[0].clone() if torch.equal(out, out[:1].expand_as(out)) else None
    reference = _REFERENCES[product]
    if reference is None:
        return True
    if (product, size) not in _AGREES:
        out = probe(size)
        _AGREES[product, size] = torch.equal(out, reference.expand_as(out))
    return _AGREES[product, size]


def by_rows(
    compute: Callable[[Tensor, Tensor], Tensor], rows: Tensor, weight: Tensor, product: Hashable = None
) -> Tensor:
    """Compute a product in blocks of rows: rows (n, ..., K), weight (..., K) -> (n, ...); see `row_blocks`.

    Args:
        compute: takes some rows and the weight.
        product: tells routes apart that take equal weights.
    """

    def probe(size: int) -> Tensor:
        outs: list[Tensor] = []
        while not outs or len(outs) * outs[0].shape[1] < PROBED_VALUES:
            row, other = cancelling(rows[0], 1, len(outs)), cancelling(weight, -1, len(outs))
            outs.append(compute(row.expand(size, *row.shape).contiguous(), other).flatten(1))
        return torch.cat(outs, dim=1)

    layout = (*weight.shape, *weight.stride(), weight.data_ptr() % 64, weight.dtype)
    blocks = row_blocks((product, layout), len(rows), probe)
    if len(blocks) == 1:
        return _padded(compute, rows, weight, *blocks[0])
    parts = zip(rows.split([n for n, _ in blocks]), blocks, strict=True)
    return torch.cat([_padded(compute, part, weight, *block) for part, block in parts])


def cancelling(like: Tensor, sign: int, seed: int = 0) -> Tensor:
    """Draw random values in the layout of a tensor, every second one `sign` times another of the last dimension.

    A product of two such tensors, one of each sign, is zero but for rounding, and what is left shows the order of
    addition in every bit. Bits of an ordinary product in bf16 rarely do: it rounds most orders to the same value.
    """
    # Memory of the same strides and the same alignment: both may choose another kernel.
    span = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
    offset = like.data_ptr() % 64 // like.element_size()
    out = like.new_zeros(span + offset).as_strided(like.shape, like.stride(), offset)
    half = like.shape[-1] // 2
    places = torch.randperm(like.shape[-1], generator=torch.Generator().manual_seed(half))
    # With all the bits of float64, and of many magnitudes: sums of short or like numbers may be exact in any order.
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(257, half, generator=generator, dtype=torch.float64)
    values *= 2.0 ** torch.randint(-8, 9, values.shape, generator=generator)
    n = out[..., 0].numel()
    values = values.repeat(-(-n // 257), 1)[:n].view(*like.shape[:-1], half).to(like)
    out[..., places[:half]], out[..., places[half : 2 * half]] = values, sign * values
    return out


def _padded(compute: Callable[[Tensor, Tensor], Tensor], rows: Tensor, weight: Tensor, n: int, size: int) -> Tensor:
    if n < size:
        return compute(F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, size - n)), weight)[:n]
    # MKL's order may depend on where the first row lies in memory; torch allocates at multiples of 64 bytes.
    aligned = rows.is_contiguous() and rows.data_ptr() % 64 == 0
    return compute(rows if aligned else rows.clone(memory_format=torch.contiguous_format), weight)
