"""Inside `batch_invariant` a row of a product has the same bits whatever rows are beside it."""

import os
import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from open_mythos.ops.batch_invariant import (
    REFERENCE,
    SIZES,
    Invariance,
    batch_invariant,
    by_rows,
    cancelling,
    row_blocks,
    size_of,
)
from open_mythos.ops.linear import linear

OTHER_KERNELS = [
    {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
]
"""Environments in which Intel processors take the kernels of older ones; MKL ignores its own two on AMD."""


def kernel(order_of: Callable[[int, int], float]) -> Callable[[Tensor, Tensor], Tensor]:
    """A product whose "order of addition" depends on the number of rows and on the place of a row among them."""

    def compute(rows: Tensor, weight: Tensor) -> Tensor:
        orders = torch.tensor([order_of(len(rows), place) for place in range(len(rows))])
        return rows.sum(1, keepdim=True) + orders[:, None] * torch.ones(1, 3)

    return compute


# What was found on real processors, and what was not: see ops/batch_invariant.py.
CLASSES: dict[str, Callable[[int, int], float]] = {
    "Intel Xeon, 512 inputs": lambda n, place: n >= 16,
    "Intel with AVX2": lambda n, place: 2 * (place % 8 < 4) if n in (8, 32) else n >= 64,
    "AMD": lambda n, place: n >= 4,
    "the reference alone": lambda n, place: n != REFERENCE,
    "all but the reference": lambda n, place: n == REFERENCE,
}


@pytest.mark.parametrize("name", CLASSES)
def test_only_sizes_that_agree_are_used(name: str) -> None:
    weight = torch.ones(3, 5)
    compute, rows, state = kernel(CLASSES[name]), torch.randint(100, (700, 5)).float(), Invariance()
    expected = compute(rows[:1].expand(REFERENCE, 5), weight)[:1] - rows[:1].sum(1, keepdim=True)
    with batch_invariant(state):
        for n in [*range(1, 70), 96, 255, 256, 257, 300, 513, 700]:
            blocks = row_blocks((name, torch.get_num_threads()), n, lambda size: compute(torch.ones(size, 5), weight))
            assert sum(used for used, _ in blocks) == n and {size for _, size in blocks} <= set(SIZES)
            out = by_rows(compute, rows[:n], weight, name)
            assert torch.equal(out, rows[:n].sum(1, keepdim=True) + expected), n
    assert state.holds


def test_a_product_that_goes_by_the_place_of_a_row_is_reported() -> None:
    compute, first, second = kernel(lambda n, place: place), Invariance(), Invariance()
    for state in (first, second):  # found once, and said to everyone who asks later
        with batch_invariant(state):
            assert by_rows(compute, torch.randn(5, 4), torch.ones(3, 4), "by place").shape == (5, 3)
        assert not state.holds


def test_padding_is_bounded() -> None:
    for n in range(4, 2000):
        assert n <= size_of(n) <= max(1.5 * n + 3, 8)


def check_products() -> None:
    rng = random.Random(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for N, K in [(3, 33), (128, 128), (64, 256), (259, 130), (520, 512), (40, 1000), (300, 300)]:
            if dtype is torch.float64 and K % 2:
                continue  # MKL goes by where a row lies in memory: an honest no, as tests/engine/test_bits.py says
            weight, x, state = torch.randn(N, K).to(dtype), torch.randn(300, K).to(dtype), Invariance()
            with torch.no_grad(), batch_invariant(state):
                whole = linear(x, weight)
                for n in [1, 2, 3, 5, 15, 17, 31, 33, 64, 100, 299]:
                    chosen = torch.tensor(rng.sample(range(300), n))
                    assert torch.equal(linear(x[chosen], weight), whole[chosen]), (dtype, N, K, n)
                    assert torch.equal(linear(x[n:], weight), whole[n:])
            assert state.holds
            error = (whole.double() - x.double() @ weight.double().T).abs().max()
            assert error < (0.5 if dtype.itemsize == 2 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_cancels_shows_the_order_of_addition(dtype: torch.dtype) -> None:
    """Other orders give other bits in nearly every value, where ordinary operands may give the same."""
    for K in (16, 64, 512):
        row, weight = cancelling(torch.empty(K, dtype=dtype), 1), cancelling(torch.empty(64, K, dtype=dtype), -1)
        wide = torch.promote_types(dtype, torch.float32)  # what products in bf16 are added up in
        terms = row.to(wide) * weight.to(wide)
        orders = [torch.arange(K), torch.arange(K).flip(0), torch.arange(K).view(2, -1).T.flatten()]
        sums = [sum(terms[:, order].unbind(1)).to(dtype) for order in orders]
        for other in sums[1:]:
            assert (other != sums[0]).float().mean() > 0.5, (dtype, K)
        assert sums[0].abs().max() < 1e-3 * terms.abs().sum(1).max()


def test_rows_of_products_have_the_same_bits_beside_any_others() -> None:
    check_products()


@pytest.mark.parametrize("environment", OTHER_KERNELS, ids=["avx2", "compatible"])
def test_with_kernels_of_other_processors(environment: dict[str, str]) -> None:
    code = "from tests.ops.test_batch_invariant import check_products; check_products()"
    env = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
