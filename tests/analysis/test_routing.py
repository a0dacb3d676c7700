"""Experts by loop against counts by hand and those of training."""

import pytest
import torch

from open_mythos import LoopPlan
from open_mythos.analysis.routing import routing, tally
from tests.models import random_ids, scaled, tiny


@pytest.mark.parametrize("layers", [1, 2])
def test_load_is_that_of_training(layers: int) -> None:
    cfg = tiny(recurrent_layers=layers, halting="none")
    model, ids = scaled(cfg), random_ids(cfg, 3, 7)
    found = routing(model, ids, 4)
    assert found is not None and found.experts.shape == (4, layers, 21, 2)
    with torch.no_grad():
        counts = model.train()(ids, plan=LoopPlan((4,) * 3)).tokens_per_expert
    assert (found.load.mean(0) * 4 * 21 * 2).round().tolist() == counts.tolist()
    assert not any(block.ffn._forward_pre_hooks for block in model.recurrent.blocks)


def test_only_chosen_places_count() -> None:
    cfg = tiny()
    model, ids = scaled(cfg), random_ids(cfg, 2, 5)
    where = torch.zeros(2, 5, dtype=torch.bool)
    where[1, 2] = True
    every, one = routing(model, ids, 3), routing(model, ids, 3, where)
    assert every is not None and one is not None
    assert one.experts[:, 0, 0].tolist() == every.experts[:, 0, 7].tolist()


def test_counts_by_hand() -> None:
    # Three loops of four tokens that choose two of four experts; the order in which they are chosen means nothing.
    loops = [
        [[0, 1], [0, 1], [2, 3], [2, 3]],
        [[1, 0], [0, 2], [2, 3], [0, 1]],
        [[0, 1], [0, 2], [2, 3], [0, 1]],
    ]
    found = tally(torch.tensor(loops)[:, None], 4)
    assert found.changed[:, 0].tolist() == [0.5, 0]
    assert found.kept[:, 0].tolist() == [(1 + 0.5 + 1 + 0) / 4, 1]
    assert found.load[:, 0].tolist() == [[0.25] * 4, [0.375, 0.25, 0.25, 0.125], [0.375, 0.25, 0.25, 0.125]]
    assert found.load_entropy[0, 0].item() == pytest.approx(1) and found.load_entropy[1, 0].item() < 1


def test_by_chance_is_what_unrelated_sets_keep() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.rand(2, 1, 4000, 8, generator=generator).topk(2, dim=-1).indices
    found = tally(experts, 8)
    assert found.kept.item() == pytest.approx(0.25, abs=0.02)
    assert found.kept_by_chance.item() == pytest.approx(0.25, abs=0.02)
    same = tally(experts[:1].expand(2, -1, -1, -1), 8)
    assert same.kept.item() == 1 and same.kept_by_chance.item() == pytest.approx(0.25, abs=0.02)


def test_by_chance_is_the_mean_over_other_tokens() -> None:
    experts = torch.rand(2, 1, 7, 5, generator=torch.Generator().manual_seed(0)).topk(2, dim=-1).indices
    sets = [[set(chosen) for chosen in loop] for loop in experts[:, 0].tolist()]
    pairs = [len(sets[0][i] & sets[1][j]) / 2 for i in range(7) for j in range(7) if i != j]
    assert tally(experts, 5).kept_by_chance.item() == pytest.approx(sum(pairs) / len(pairs))
    # Tokens that each keep an expert of their own would by chance keep none.
    own = torch.arange(7).view(1, 1, 7, 1).expand(2, -1, -1, -1)
    assert tally(own, 7).kept_by_chance.item() == 0
    assert tally(own[:, :, :1], 7).kept_by_chance.isnan().all()


def test_dense_models_have_no_experts() -> None:
    cfg = tiny(n_experts=0)
    assert routing(scaled(cfg), random_ids(cfg, 1, 3)) is None
