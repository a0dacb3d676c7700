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


def test_zero_stays_zero() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = RMSNorm(8)(x)
    out.sum().backward()
    assert not out.any() and torch.isfinite(x.grad).all()
