"""What tells loops apart: the loop embedding, the depth LoRA, and the plan that says how many a row runs."""

import math

import pytest
import torch
from torch import nn

from open_mythos import LoopPlan, LoRAAdapter, loop_index_embedding
from tests.models import worst


@pytest.mark.parametrize("width", [1, 2, 5, 16])
@pytest.mark.parametrize("T", [1, 7])
def test_loop_embedding(width: int, T: int) -> None:
    h = torch.randn(3, T, 17, dtype=torch.float64)
    loops = [0, 3, 4095]
    out = loop_index_embedding(h, torch.tensor(loops), width)
    for row, loop in enumerate(loops):
        frequency = [10000 ** (-2 * i / width) for i in range((width + 1) // 2)]
        waves = [math.sin(loop * f) for f in frequency] + [math.cos(loop * f) for f in frequency]
        expected = h[row].clone()
        expected[:, :width] += torch.tensor(waves[:width], dtype=torch.float64)
        assert worst(out[row], expected) < 1e-12
    assert torch.equal(loop_index_embedding(h, 3, width)[1], out[1])


def test_loops_stay_distinct_in_every_dtype() -> None:
    """The angles are made in float32 or wider, so that bf16 states do not confuse loop 256 with 257."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        zero = torch.zeros(4096, 1, 256, dtype=dtype)
        out = loop_index_embedding(zero, torch.arange(4096), 32)
        assert out.dtype == dtype
        assert len(torch.unique(out[:, 0], dim=0)) == 4096
        exact = loop_index_embedding(zero.double(), torch.arange(4096), 32)
        assert (out.double() - exact).abs().max() < max(1e-3, torch.finfo(dtype).eps)


@pytest.mark.parametrize("T", [1, 7, 63])
def test_lora_values_and_gradients(T: int) -> None:
    lora = LoRAAdapter(9, 4, 5).double()
    for p in lora.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, T, 9, dtype=torch.float64, requires_grad=True)
    loops = [0, 4, 77]
    leaves = [x, *lora.parameters()]
    out = lora(x, torch.tensor(loops))
    # Loops beyond the last row stay there.
    scale = torch.stack([torch.diag(lora.scale.weight[min(loop, 4)]) for loop in loops])
    expected = torch.einsum("btd,rd,brs,sk->btk", x, lora.down.weight, scale, lora.B)
    assert worst(out, expected) < 1e-13
    weight = torch.randn_like(out)
    got, want = (torch.autograd.grad((y * weight).sum(), leaves) for y in (out, expected))
    assert all(worst(a, b) < 1e-12 for a, b in zip(got, want, strict=True))
    assert torch.equal(lora(x[:1], 3), lora(x[:1], torch.tensor([3])))


def test_fresh_lora_is_silent_and_can_learn() -> None:
    lora = LoRAAdapter(9, 4, 5)
    x = torch.randn(2, 3, 9)
    out = lora(x, 2)
    assert not out.any()
    out.backward(torch.randn_like(out))
    assert lora.B.grad.any()


def test_plans_are_checked() -> None:
    assert LoopPlan((1, 4096, 3), 7).depths == (1, 4096, 3)
    for depths, n_grad, error in (
        ((), None, ValueError),
        ((0,), None, ValueError),
        ((2, -1), None, ValueError),
        ((4097,), None, ValueError),
        ((2.0,), None, TypeError),
        ((True,), None, TypeError),
        (("2",), None, TypeError),
        ((2,), 0, ValueError),
        ((2,), 4097, ValueError),
        ((2,), 1.5, TypeError),
        ((2,), True, TypeError),
    ):
        with pytest.raises(error, match=r"use (depths|n_grad)=") as caught:
            LoopPlan(depths, n_grad)
        assert ("n_grad" if n_grad is not None else "depths") in str(caught.value)
