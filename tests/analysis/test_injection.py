"""A loop that does nothing but add its input, of which every answer is known."""

import math

import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.analysis.injection import attenuate, swap
from tests.models import tiny

L = 5


@pytest.fixture
def adder() -> OpenMythos:
    """h' = h + e from h = 0, and the read-out names the token that h points to."""
    cfg = tiny(
        vocab_size=32,
        prelude_layers=0,
        coda_layers=0,
        injection="add",
        initial_state="zero",
        loop_embedding=False,
        lora_rank=0,
        halting="none",
        n_experts=0,
    )
    model = OpenMythos(cfg).eval()
    with torch.no_grad():
        for parameter in model.recurrent.parameters():
            parameter.zero_()
        model.embed.weight.copy_(torch.eye(32))
        model.norm.weight.fill_(1)
    return model


def test_the_answer_follows_the_input_that_was_added_more_often(adder: OpenMythos) -> None:
    ids, others = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 2, 6, 7]])
    found = swap(adder, ids, others, L, n_more=8)
    # The second token is the same in both prompts.
    assert found.n_tokens == 3
    assert found.new_at.tolist() == [1, 1, 1, 0, 0, 0]
    assert found.old_at.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.nearer_at.tolist() == [1, 1, 1, 0, 0, 0]
    # At five more loops both weigh the same.
    assert [*found.new_after[:5].tolist(), *found.new_after[6:].tolist()] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert [*found.old_after[:5].tolist(), *found.old_after[6:].tolist()] == [1, 1, 1, 1, 1, 0, 0, 0]
    only = swap(adder, ids, others, L, where=torch.tensor([[False, True, True, False]]))
    assert only.n_tokens == 1


def test_only_the_direction_of_the_sum_counts(adder: OpenMythos) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    found = attenuate(adder, ids, L, factors=(0.0, 0.5, 1.0, 3.0, -6.0))
    # The last norm takes lengths away; a state of zero says nothing at all.
    p = torch.log_softmax(math.sqrt(32) * torch.eye(32)[0].double(), -1)
    silent = (p.exp() * (p + math.log(32))).sum().item()
    assert found.every_loop[:4].tolist() == pytest.approx([silent, 0, 0, 0], abs=1e-4)
    assert found.one_loop[:4].flatten().tolist() == pytest.approx([0] * 4 * L, abs=1e-4)
    # Against four loops of +1 one of -6 turns it round.
    against = torch.log_softmax(-math.sqrt(32) * torch.eye(32)[0].double(), -1)
    assert found.one_loop[4].tolist() == pytest.approx([(p.exp() * (p - against)).sum().item()] * L, rel=1e-3)
    assert found.same_choice[1:].tolist() == [1, 1, 1, 0]


def test_bad_input_is_refused(adder: OpenMythos) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="equally many tokens"):
        swap(adder, ids, ids[:, :2], L)
    with pytest.raises(ValueError, match="n_more=4095"):
        swap(adder, ids, ids, L, n_more=4095)
