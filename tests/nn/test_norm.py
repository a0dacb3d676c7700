"""RMSNorm against its formula, with statistics in at least float32."""

import pytest
import torch

from open_mythos import RMSNorm
from tests import reference
from tests.models import worst, worst_of


@pytest.mark.parametrize("shape", [(1,), (7, 33), (2, 63, 8)])
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(shape[-1]).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out, naive = norm(x), reference.rms_norm(x, norm.weight)
    assert worst(out, naive) < 1e-13
    weight = torch.randn_like(out)
    got, expected = (torch.autograd.grad((y * weight).sum(), (x, norm.weight)) for y in (out, naive))
    assert worst_of(got, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_wide(dtype: torch.dtype) -> None:
    """The mean square of numbers whose squares overflow fp16, and of many small ones that bf16 would stop adding."""
    norm = RMSNorm(4096).to(dtype)
    for size in (1e-2, 300.0):
        x = (torch.randn(3, 4096) * size).to(dtype)
        out = norm(x)
        assert out.dtype == dtype
        exact = reference.rms_norm(x.double(), norm.weight.double())
        assert worst(out, exact) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounds_once_and_alike_in_calls_of_any_size(dtype: torch.dtype, grad: bool) -> None:
    """One rounding at the end: half of eps relative, in every value. A row has the same bits in every call."""
    norm = RMSNorm(96).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3000, 96).to(dtype)
    with torch.set_grad_enabled(grad):
        whole = norm(x)
        for n in (1, 3, 40, 43, 700):
            assert torch.equal(norm(x[:n]), whole[:n]) and torch.equal(norm(x[-n:]), whole[-n:]), n
            assert torch.equal(norm(x[:n, None]), whole[:n, None]), n
    exact = reference.rms_norm(x.double(), norm.weight.double())
    roundings = 0.5 if dtype.itemsize == 2 else 4  # of float32 itself there are several
    smallest = torch.finfo(dtype).tiny
    relative = (whole.double() - exact).abs() / exact.abs().clamp(min=smallest)
    assert relative.max() <= 1.001 * roundings * torch.finfo(dtype).eps


def test_zero_stays_zero() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = RMSNorm(8)(x)
    out.sum().backward()
    assert not out.any() and torch.isfinite(x.grad).all()
