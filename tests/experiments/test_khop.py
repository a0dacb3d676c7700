"""The k-hop experiment: its measures against one plain call per number of loops, and its arms."""

import dataclasses

import numpy as np
import pytest
import torch

from open_mythos import LoopPlan, OpenMythos
from open_mythos.accounting import count_parameters
from open_mythos.experiments.khop import (
    DISTANCES,
    LOOPS,
    accuracy_by_loops,
    accuracy_grid,
    arms,
    cycle_accuracy,
    cycles,
    enough,
    khop_task,
    largest_fall,
    plain_baseline,
    reach,
)
from open_mythos.recipes import load_recipe
from open_mythos.tasks.rng import Purpose, stream
from tests.models import scaled


def test_accuracy_by_loops_is_that_of_separate_calls() -> None:
    base = load_recipe("tiny-khop")
    model = scaled(dataclasses.replace(base.model, dim=16))
    batch = base.data.batch(np.random.default_rng(0), 400)  # no multiple of the rows at once
    named = [model(batch.input_ids, n_loops=n)[:, -1].argmax(-1) for n in (1, 2, 5)]
    batch.labels[:, -1] = named[1]
    expected = [(names == named[1]).double().mean().item() for names in named]
    assert expected[1] == 1 > max(expected[0], expected[2]) > 0
    assert accuracy_by_loops(model, batch, (1, 2, 5)) == pytest.approx(expected, abs=1e-6)


def test_a_plain_model_has_one_answer() -> None:
    twin = plain_baseline(load_recipe("tiny-khop"))
    model = scaled(dataclasses.replace(twin.model, dim=16))
    grid = accuracy_grid(model, khop_task(twin), 130, 0, (1, 8), (1,))
    assert [len(row) for row in grid] == [1, 1]


def test_largest_fall_is_that_of_loops_that_suffice() -> None:
    suffices = enough((1, 4), (1, 2, 4, 8))
    assert suffices.tolist() == [[True] * 4, [False, False, True, True]]
    grids = [
        [[0.8, 0.9, 0.9, 1.0], [0.9, 0.1, 0.9, 0.95]],  # 2 loops are too few for 4 hops
        [[0.8, 0.9, 0.7, 0.8], [0.0, 0.0, 0.9, 0.8]],
        [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.9, 0.2]],
    ]
    assert largest_fall(np.array(grids), suffices) == pytest.approx([0, 0.2, 0.7])


def test_reach_ends_where_any_seed_fails() -> None:
    by_hops = np.full((2, 3), 0.95)
    assert reach(by_hops) == 3
    by_hops[1, 1] = 0.5
    assert reach(by_hops) == 1
    by_hops[0, 0] = 0.5
    assert reach(by_hops) == 0


def test_cycles_go_through_all_symbols() -> None:
    ids, successor = cycles(7, 20, np.random.default_rng(0))
    for row, (*table, question) in enumerate(ids.tolist()):
        path = [question]
        while table[path[-1]] != question:
            path.append(table[path[-1]])
        assert sorted(path) == list(range(7))
        assert path == successor[:, row].tolist()


def test_cycle_accuracy_is_that_of_separate_calls() -> None:
    base = load_recipe("tiny-khop")
    model = scaled(dataclasses.replace(base.model, dim=16))
    measured = cycle_accuracy(model, 24, 150, 3, 30)
    ids, _ = cycles(24, 150, stream(3, 0, Purpose.VALIDATION))
    for loops in (1, 5, 30):
        named = model(ids, n_loops=loops)[:, -1].argmax(-1).tolist()
        for name, hops in (("one_before", loops - 1), ("right", loops), ("one_after", loops + 1)):
            hits = 0
            for (*table, symbol), answer in zip(ids.tolist(), named, strict=True):
                for _ in range(hops):
                    symbol = table[symbol]
                hits += symbol == answer
            assert measured[name][loops - 1] == pytest.approx(hits / 150, abs=1e-4)
    assert sum(map(sum, measured.values())) > 0


def test_every_arm_can_be_trained_and_asked() -> None:
    configs = arms(quick=False)
    assert configs["diagonal"] == load_recipe("tiny-khop")
    looped = count_parameters(configs["diagonal"].model).total
    assert abs(count_parameters(configs["plain-parameters"].model).total / looped - 1) < 0.1
    assert count_parameters(configs["plain-depth"].model).total > 2 * looped
    assert len({(cfg.steps, cfg.batch_size, khop_task(cfg).max_distance) for cfg in configs.values()}) == 1
    for name, cfg in configs.items():
        task = khop_task(cfg)
        assert task.long_chain > DISTANCES[-1] and LOOPS[-1] >= DISTANCES[-1]
        # The farthest that training asks, whatever the arm.
        depths = cfg.loops.depths(0, cfg.steps, 8)
        labels = task.batch(np.random.default_rng(0), 8, depths).labels
        assert labels.ndim == (3 if cfg.losses.per_loop else 2)
        if name.startswith("plain"):
            assert depths.tolist() == [task.max_distance] * 8
            logits = OpenMythos(cfg.model)(torch.zeros(2, task.seq_len, dtype=torch.int64), plan=LoopPlan((1,) * 2))
            assert logits.logits.shape == (2, task.seq_len, task.vocab_size)


def test_the_quick_form_comes_to_the_end_of_its_ramp() -> None:
    quick, whole = arms(quick=True)["diagonal"], arms(quick=False)["diagonal"]
    assert quick.steps < whole.steps
    assert quick.loops.ramp_steps < quick.steps
