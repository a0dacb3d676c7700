"""The grouped product as an operator that can be traced, against the plain loop over groups."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from open_mythos.ops import grouped_linear as grouped
from tests.models import worst

COUNTS = [[5], [0, 3, 7, 0, 1], [4, 4, 4]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_traced_product_equals_the_loop(counts: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), 12, 8, generator=generator).to(dtype).requires_grad_()
    rows = torch.tensor(counts)
    parts = [part @ w.T for part, w in zip(x.split(counts), weight, strict=True)]
    expected = torch.cat(parts)
    got = grouped._product(x, weight, rows)
    assert worst(got, expected) < 1e-6
    inputs, by = (x, weight), torch.randn(expected.shape, generator=generator).to(dtype)
    for a, b in zip(
        torch.autograd.grad((got.sin() * by).sum(), inputs),
        torch.autograd.grad((expected.sin() * by).sum(), inputs),
        strict=True,
    ):
        assert worst(a, b) < 1e-5
    torch.library.opcheck(grouped._product, (x, weight, rows))
    torch.library.opcheck(grouped._outer, (by, x, rows))


def test_second_derivative() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(grouped._product, (x, weight, torch.tensor([1, 3])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_without_numbers(dtype: torch.dtype) -> None:
    """On meta and with fake tensors, where torch's own product takes bf16 alone."""
    for mode, device in ((FakeTensorMode(), "cpu"), (torch.device("meta"), "meta")):
        with mode:
            x, weight = torch.empty(6, 8, dtype=dtype), torch.empty(3, 16, 8, dtype=dtype)
            y = grouped.grouped_linear(x, weight, torch.empty(3, dtype=torch.int64))
        assert y.shape == (6, 16) and y.dtype == dtype and y.device.type == device
