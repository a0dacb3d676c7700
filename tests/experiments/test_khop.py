"""The k-hop evaluation against one plain call per number of loops."""

import dataclasses

import numpy as np
import torch

from open_mythos import LoopPlan, OpenMythos
from open_mythos.experiments.khop import accuracy_by_loops, best_unreachable, plain_twin, worst_reachable
from open_mythos.recipes import load_recipe


def test_accuracy_by_loops_is_that_of_separate_calls() -> None:
    torch.manual_seed(0)
    recipe = load_recipe("tiny-khop")
    model = OpenMythos(dataclasses.replace(recipe.model, dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    batch = recipe.data.batch(np.random.default_rng(0), 400)
    answers = batch.labels[:, -1]
    expected = [
        (model(batch.input_ids, n_loops=n)[:, -1].argmax(-1) == answers).double().mean().item() for n in (1, 2, 5)
    ]
    assert accuracy_by_loops(model, batch, (1, 2, 5)) == expected


def test_reachable_cells_are_those_with_enough_loops() -> None:
    # 1, 2, 3, 4, 6, 8, 12, 16 hops by 1, 2, 4, 8, 12, 16, 24, 32 loops.
    hops, loops = np.array([1, 2, 3, 4, 6, 8, 12, 16]), np.array([1, 2, 4, 8, 12, 16, 24, 32])
    grid = np.where(loops[None] >= hops[:, None], 0.75, 0.25)
    assert worst_reachable(grid.tolist()) == 0.75
    assert best_unreachable(grid.tolist()) == 0.25


def test_the_plain_twin_is_a_runnable_configuration() -> None:
    twin = plain_twin(load_recipe("tiny-khop"))
    assert twin.model.recurrent_layers == 0
    batch = twin.data.batch(np.random.default_rng(0), 8)
    logits = OpenMythos(twin.model)(batch.input_ids, plan=LoopPlan((1,) * 8)).logits
    assert logits.shape == (8, batch.input_ids.shape[1], twin.model.vocab_size)
    assert batch.labels.shape == batch.input_ids.shape
