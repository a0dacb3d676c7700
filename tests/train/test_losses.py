"""The loss against a position-by-position sum, and how its parts are weighed."""

import math

import pytest
import torch
from torch import Tensor

from open_mythos.model import TrainOutput
from open_mythos.tasks.task import IGNORE
from open_mythos.train.losses import LossConfig, total_loss


def sample(rows: int = 3, tokens: int = 7, vocab: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, tokens, vocab, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (rows, tokens), generator=generator)
    labels[torch.rand(rows, tokens, generator=generator) < 0.5] = IGNORE
    return hidden, labels


def output(ponder: float | None = 3.0, router_z: float | None = 2.0) -> tuple[TrainOutput, Tensor]:
    hidden, labels = sample()
    scalars = [None if x is None else torch.tensor(x, dtype=torch.float64) for x in (ponder, router_z)]
    # The head is the identity, so that the hidden states are the logits.
    head = torch.eye(5, dtype=torch.float64)
    return TrainOutput(hidden, None, head, torch.ones(3, 7), scalars[0], scalars[1], None, None), labels


def test_cross_entropy_is_the_mean_over_labelled_tokens() -> None:
    out, labels = output()
    terms = [
        math.log(sum(math.exp(x) for x in out.logits[b, t].tolist())) - out.logits[b, t, labels[b, t]].item()
        for b in range(3)
        for t in range(7)
        if labels[b, t] != IGNORE
    ]
    ce = total_loss(out, labels, LossConfig())[1]["ce"]
    assert ce.item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_total_is_the_weighted_sum() -> None:
    out, labels = output()
    total, parts = total_loss(out, labels, LossConfig(ponder=0.5, router_z=0.25))
    assert set(parts) == {"ce", "ponder", "router_z"}
    assert parts["ponder"] == 3
    assert parts["router_z"] == 2
    assert total.item() == pytest.approx(parts["ce"].item() + 0.5 * 3 + 0.25 * 2)


def test_parts_without_weight_are_reported_only() -> None:
    out, labels = output()
    total, parts = total_loss(out, labels, LossConfig())
    assert parts["ponder"] == 3
    assert total == parts["ce"]


def test_absent_parts_stay_absent() -> None:
    out, labels = output(ponder=None, router_z=None)
    assert set(total_loss(out, labels, LossConfig())[1]) == {"ce"}


@pytest.mark.parametrize("field", ["ponder", "router_z"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True])
def test_refuses(field: str, value: float) -> None:
    with pytest.raises(TypeError if value is True else ValueError, match=f"losses.{field}="):
        LossConfig(**{field: value})
