"""When answers settle, against slow references."""

import dataclasses

import numpy as np
import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.analysis.per_loop import CHUNK, by_loop, right_by_loop, rows_right, settled
from open_mythos.recipes import load_recipe
from open_mythos.tasks.task import IGNORE


@pytest.mark.parametrize(
    ("by_loop", "loop"),
    [("1111", 1), ("0111", 2), ("1011", 3), ("0001", 4), ("1110", 0), ("0000", 0), ("1", 1), ("0", 0)],
)
def test_settled_is_the_first_loop_of_the_last_run_of_right(by_loop: str, loop: int) -> None:
    right = np.array([[x == "1", False] for x in by_loop])
    assert settled(right).tolist() == [loop, 0]


@pytest.mark.parametrize("halting", ["none", "act"])
def test_right_by_loop_is_that_of_separate_calls(halting: str) -> None:
    torch.manual_seed(0)
    recipe = load_recipe("tiny-addition")
    model = OpenMythos(dataclasses.replace(recipe.model, dim=16, halting=halting)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    batch = recipe.data.batch(np.random.default_rng(0), CHUNK + 7)
    with torch.no_grad():
        logits = by_loop(model, batch, (1, 3), lambda logits, _: logits)
        torch.testing.assert_close(logits, torch.stack([model(batch.input_ids, n) for n in (1, 3)]))
    right = right_by_loop(model, batch, 3)
    for loops in (1, 2, 3):
        said = model(batch.input_ids, n_loops=loops).argmax(-1)
        assert torch.equal(right[loops - 1], said == batch.labels)
        rows = rows_right(right, batch)[loops - 1]
        for row, ids, labels in zip(rows, said.tolist(), batch.labels.tolist(), strict=True):
            assert row == all(a == b for a, b in zip(ids, labels, strict=True) if b != IGNORE)


def test_under_act_the_sum_of_states_is_read() -> None:
    torch.manual_seed(0)
    recipe = load_recipe("tiny-addition")
    model = OpenMythos(dataclasses.replace(recipe.model, dim=16, halting="act")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    batch = recipe.data.batch(np.random.default_rng(0), 40)
    right = right_by_loop(model, batch, 3)
    for loops in (1, 3):
        assert torch.equal(right[loops - 1], model(batch.input_ids, n_loops=loops).argmax(-1) == batch.labels)


def test_a_plain_model_has_one_loop() -> None:
    recipe = load_recipe("tiny-addition")
    model = OpenMythos(dataclasses.replace(recipe.model, dim=16, recurrent_layers=0)).eval()
    assert right_by_loop(model, recipe.data.batch(np.random.default_rng(0), 3), 5).shape == (1, 3, recipe.data.seq_len)
