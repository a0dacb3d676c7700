"""The bracket experiment: its numbers against slow ones."""

import dataclasses

import numpy as np
import pytest

from open_mythos.experiments.brackets import LENGTH, LOOPS, arms, by_row, by_task, correlations, settling, side
from open_mythos.reports.stats import Estimate
from open_mythos.tasks import Brackets, Mixed
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE
from tests.models import scaled


def test_rows_that_never_settle_and_balanced_ones_are_left_out() -> None:
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 7, 600) for name in ("nesting", "place", "settled", "kind")}
    added = {"nesting": [6, 6], "place": [-1, 3], "settled": [1, 0], "kind": [0, 0]}
    more = {name: np.append(values, added[name]) for name, values in rows.items()}
    before = correlations([rows])["raw"].mean
    assert correlations([more])["raw"].mean == before
    more["settled"][-1] = 1
    assert correlations([more])["raw"].mean != before


def test_without_variation_there_is_no_correlation() -> None:
    said = side(Estimate([0.2, float("nan"), 0.3]), "later", "earlier", "no order")
    assert "all rows settle at one loop, as in 1 of 3 seeds" in said
    found = settling([[5, 1, 0, 3], [5, 0, 0, 0]])
    assert found["settles"].by_seed.tolist() == pytest.approx([2.5, np.nan], nan_ok=True)
    assert found["never"].by_seed.tolist() == [5 / 9, 1]


def test_rows_are_of_one_length_and_shares_those_of_separate_calls() -> None:
    model = scaled(dataclasses.replace(arms(quick=True)["sampled"].model, dim=16))
    found = by_row(model, 150, seed=2)
    task = Brackets(LENGTH, LENGTH, 1, LENGTH // 2)
    batch = task.encode(*task.draw(stream(2, 0, Purpose.VALIDATION), 150))
    deep, place = np.array(found["rows"]["nesting"]), np.array(found["rows"]["place"])
    assert set(deep[place < 0].tolist()) == set(range(1, LENGTH // 2 + 1))
    for loops in (1, LOOPS):
        said = model(batch.input_ids, n_loops=loops).argmax(-1)
        right = ((said == batch.labels) | (batch.labels == IGNORE)).all(-1).numpy()
        for name, which in (("broken", place >= 0), ("balanced", place < 0)):
            for depth, shares in found["right"][name].items():
                assert shares[loops - 1] == pytest.approx(right[which & (deep == depth)].mean(), abs=1e-4)


def test_tasks_of_the_mixture_are_measured_at_their_longest() -> None:
    cfg = arms(quick=True)["mixed"]
    assert isinstance(cfg.data, Mixed)
    found = by_task(scaled(dataclasses.replace(cfg.model, dim=16)), cfg.data, 60, seed=0)["tasks"]
    assert set(found) == {"parity", "addition", "brackets"}
    assert sum(found["parity"]["settled"]) == sum(found["addition"]["settled"]) == 60
    assert 10 < sum(found["brackets"]["settled"]) < 50
    for task in found.values():
        # What is right after the last loop has settled, and nothing else has.
        assert task["right"][-1] == pytest.approx(1 - task["settled"][0] / sum(task["settled"]), abs=1e-4)
