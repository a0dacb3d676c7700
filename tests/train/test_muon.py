"""Our Muon against torch's and against one matrix at a time."""

import pytest
import torch
from torch import Tensor, nn

from open_mythos.train.muon import STRIP, Muon, _iterate, _iterate_alone, lr_factor, orthogonalize


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7), (1, 63), (64, 3)])
def test_equals_torch_in_float32(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], adjust_lr: str) -> None:
    # torch casts to bfloat16 before it iterates; without that cast its own code runs in float32.
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())
    ours, theirs = (nn.Parameter(noise(*shape)) for _ in range(2))
    optimizers = (
        Muon([ours], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr=adjust_lr),
        torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn=adjust_lr),
    )
    for step in range(5):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = noise(*shape, seed=step + 1)
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_close_to_unchanged_torch() -> None:
    ours, theirs = (nn.Parameter(noise(32, 16)) for _ in range(2))
    for p, optimizer in (
        (ours, Muon([ours], lr=1.0, adjust_lr="original")),
        (theirs, torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0)),
    ):
        p.grad = noise(32, 16, seed=1)
        optimizer.step()
    # Five bfloat16 iterations (8 bits) of an expanding map leave a few per cent.
    difference = (ours - theirs).norm() / (ours - noise(32, 16)).norm()
    assert difference < 0.05


def test_stack_equals_matrices() -> None:
    stack = nn.Parameter(noise(5, 6, 4))
    experts = [nn.Parameter(m.clone()) for m in noise(5, 6, 4)]
    a = Muon([stack], lr=0.1, weight_decay=0.1)
    b = [Muon([m], lr=0.1, weight_decay=0.1) for m in experts]
    for step in range(3):
        stack.grad = noise(5, 6, 4, seed=step + 1)
        stack.grad[2] = 0  # an expert that saw no token
        a.step()
        for m, grad, optimizer in zip(experts, stack.grad, b, strict=True):
            m.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(stack.data, torch.stack([m.data for m in experts]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stack.data[2], noise(5, 6, 4)[2] * (1 - 0.1 * 0.1) ** 3, rtol=1e-5, atol=1e-6)


def test_parameters_of_one_shape_do_not_mix() -> None:
    pair = [nn.Parameter(noise(4, 8, seed=i)) for i in range(2)]
    alone = nn.Parameter(noise(4, 8, seed=1))
    without_grad = nn.Parameter(noise(4, 8))
    for params in ([*pair, without_grad], [alone]):
        for p in params:
            p.grad = None if p is without_grad else noise(4, 8, seed=9) * (10 if p is pair[0] else 1)
        Muon(params, lr=0.1).step()
    torch.testing.assert_close(pair[1], alone)
    assert torch.equal(without_grad, noise(4, 8))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 5), (3, 5, 20)])
def test_singular_values_are_near_one(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonalize(noise(*shape)))
    assert values.min() > 0.3
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(5, 7), (STRIP, STRIP), (STRIP + 1, 200), (2 * STRIP + 63, 500)])
def test_large_matrices_equal_a_batch(shape: tuple[int, int]) -> None:
    """By squares of symmetric matrices, a strip at a time, as by the polynomial; small singular values too."""
    x = noise(*shape).double() * torch.logspace(-6, 0, shape[0], dtype=torch.float64)[:, None]
    x /= x.norm()
    expected = _iterate(x[None])[0]
    torch.testing.assert_close(_iterate_alone(x), expected, rtol=0, atol=1e-13)
    # Float32 gets as near as the batch does: within rounding that the map's slope of 3.4 made larger five times.
    torch.testing.assert_close(_iterate_alone(x.float()).double(), expected, rtol=0, atol=1e-5)


def test_scale_of_the_gradient_does_not_matter() -> None:
    x = noise(2, 6, 6)
    torch.testing.assert_close(orthogonalize(x), orthogonalize(1e4 * x))


def test_update_has_the_size_of_an_adamw_update() -> None:
    update = lr_factor(256, 64, "match_rms_adamw") * orthogonalize(noise(1, 256, 64))
    assert 0.15 < update.square().mean().sqrt() < 0.25


@pytest.mark.parametrize(
    ("kwargs", "shape", "named"),
    [
        ({"lr": -1.0}, (2, 2), "lr"),
        ({"lr": float("nan")}, (2, 2), "lr"),
        ({"lr": 0.1, "momentum": 2.0}, (2, 2), "momentum"),
        ({"lr": 0.1, "adjust_lr": "none"}, (2, 2), "adjust_lr"),
        ({"lr": 0.1}, (4,), "AdamW"),
    ],
)
def test_refuses(kwargs: dict, shape: tuple[int, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Muon([nn.Parameter(torch.zeros(shape))], **kwargs)
