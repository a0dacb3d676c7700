"""Rotary embedding against complex multiplication, and its one property: products depend on the distance only."""

import pytest
import torch

from open_mythos.nn.rope import apply_rope, rotary_table
from tests import reference
from tests.models import ATTENTIONS, random_ids, scaled, tiny, worst


@pytest.mark.parametrize("K", [2, 8, 14])
@pytest.mark.parametrize("T", [1, 7, 63])
def test_values_and_gradients(T: int, K: int) -> None:
    x = torch.randn(2, T, 3, K, dtype=torch.float64, requires_grad=True)
    positions = torch.stack((torch.arange(T), torch.arange(T) * 3 + 100_000))
    out = apply_rope(x, *rotary_table(positions, K, 500.0, torch.float64))
    naive = torch.stack(
        [torch.stack([reference.rope(x[b, t], int(positions[b, t]), 500.0) for t in range(T)]) for b in range(2)]
    )
    assert worst(out, naive) < 1e-12
    weight = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), x) for y in (out, naive)), strict=True):
        assert worst(a, b) < 1e-12
    assert worst(out.norm(dim=-1), x.norm(dim=-1)) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_products_depend_on_the_distance_only(dtype: torch.dtype, tolerance: float) -> None:
    """Also a million tokens into the context, where angles made in float32 would be off by 0.03 rad."""
    K = 64
    q, k = torch.randn(2, 1, 1, 1, K).to(dtype)
    for distance in (0, 1, 17, 1000):
        products = []
        for start in (0, 5, 4095, 1_000_000):
            table = rotary_table(torch.tensor([[start, start + distance]]), K, 500_000.0, dtype)
            turned_q = apply_rope(q, *(x[:, 1:] for x in table))
            turned_k = apply_rope(k, *(x[:, :1] for x in table))
            assert turned_q.dtype == dtype
            products.append(float((turned_q.double() * turned_k.double()).sum()))
        scale = float(q.double().norm() * k.double().norm())
        assert max(products) - min(products) < tolerance * scale


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_a_whole_model_sees_distances_only(attn_type: str) -> None:
    """Moving a prompt along changes nothing, in every dtype: no table is stored that a cast could damage."""
    cfg = tiny(attn_type=attn_type, max_seq_len=64)
    ids = random_ids(cfg, 1, 7)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model = scaled(cfg).to(torch.bfloat16).to(dtype)
        view = model.make_view((1, 7))
        moved = model.make_view((1, 7))
        rope = rotary_table(view.positions + 40, 2 * view.rope[0].shape[-1], cfg.rope_theta, dtype)
        moved = type(moved)(**{**moved.__dict__, "positions": view.positions + 40, "rope": rope})
        assert worst(model.encode(ids, moved), model.encode(ids, view)) < tolerance
    assert not [name for name in model.state_dict() if "rope" in name or "freq" in name or "cos" in name]


def test_table_is_at_least_float32() -> None:
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        cos, sin, _ = rotary_table(torch.arange(5), 8, 10000.0, dtype)
        assert cos.dtype == sin.dtype == expected and cos.shape == (5, 4)
