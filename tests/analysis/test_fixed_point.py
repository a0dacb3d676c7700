"""Loops whose end is known: contraction, rotation, drift."""

import math

import pytest
import torch
from torch import Tensor

from open_mythos.analysis.fixed_point import follow, motion
from tests.models import random_ids, scaled, tiny


def linear(matrix: Tensor, shift: Tensor, n_loops: int = 32) -> Tensor:
    """(L + 1, 1, D), the states of h' = M h + b from h = (1, 1)."""
    states = [torch.ones(len(shift), dtype=torch.float64)]
    for _ in range(n_loops):
        states.append(matrix @ states[-1] + shift)
    return torch.stack(states)[:, None]


def rotation(angle: float, scale: float = 1.0) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return scale * torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


SHIFT = torch.tensor([0.3, -1.0], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("states", "kind", "period"),
    [
        (linear(0.5 * EYE, SHIFT), "fixed", 0),
        (linear(rotation(1.0, 0.5), SHIFT), "fixed", 0),
        (linear(0.85 * EYE, SHIFT), "shrinking", 0),
        (linear(rotation(math.pi), SHIFT), "orbit", 2),
        (linear(rotation(2 * math.pi / 3), SHIFT), "orbit", 3),
        (linear(rotation(2 * math.pi / 7), SHIFT), "orbit", 7),
        (linear(rotation(math.pi / 2, 0.99), SHIFT), "orbit", 4),
        (linear(EYE, SHIFT), "drift", 0),
        (linear(1.05 * EYE, SHIFT), "drift", 0),
        # Steps of 1/t: they shrink for ever and arrive nowhere.
        (torch.arange(1, 34, dtype=torch.float64).log()[:, None, None] * SHIFT + 1e-2, "drift", 0),
        # An angle that is no part of a turn: it never comes back.
        (linear(rotation(1.0), SHIFT), "wander", 0),
    ],
)
def test_ends_that_are_known(states: Tensor, kind: str, period: int) -> None:
    found = motion(states)
    assert (found.kind, found.period.tolist()) == ([kind], [period])
    assert found.shares[kind] == 1 and sum(found.shares.values()) == 1


def test_numbers_of_each_loop() -> None:
    states = torch.randn(9, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = motion(states)
    for i in range(3):
        for t in range(1, 9):
            a, b = states[t - 1, i], states[t, i]
            assert found.step[t - 1, i].item() == pytest.approx(((b - a).norm() / b.norm()).item())
            assert found.cosine[t - 1, i].item() == pytest.approx((a @ b / a.norm() / b.norm()).item())
            assert found.norm[t, i].item() == pytest.approx(b.square().mean().sqrt().item())
            if t > 1:
                before = a - states[t - 2, i]
                turn = (b - a) @ before / (b - a).norm() / before.norm()
                assert found.turn[t - 2, i].item() == pytest.approx(turn.item())


def test_a_model_is_run_beyond_training_and_only_chosen_places_count() -> None:
    cfg = tiny()
    model, ids = scaled(cfg), random_ids(cfg, 2, 5)
    where = torch.zeros(2, 5, dtype=torch.bool)
    where[0, 3] = where[1, 1] = True
    found = follow(model, ids, where=where)
    assert found.step.shape == (4 * cfg.max_loop_iters, 2)
    hidden = model(ids, 16, exit="fixed", trace=True).hidden
    step = (hidden[-1] - hidden[-2]).norm(dim=-1) / hidden[-1].norm(dim=-1)
    assert found.step[-1].tolist() == pytest.approx(step[where].tolist(), rel=1e-3)
    with pytest.raises(ValueError, match="n_loops=4 is too few"):
        follow(model, ids, 4)
