"""The parity experiment: its grid is that of separate calls, and what each arm is asked."""

import dataclasses
from pathlib import Path

import pytest

from open_mythos.experiments.parity import FARTHEST, TRAINED, arms, measure
from open_mythos.experiments.study import Lab, Run
from open_mythos.tasks import Parity
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE
from tests.models import scaled


def test_grid_is_that_of_separate_calls() -> None:
    cfg = arms(quick=True)["coupled"]
    model = scaled(dataclasses.replace(cfg.model, dim=16))
    grid = measure(Run("coupled", cfg, 3, {"rows": 20}, Lab(Path(), True, (3,)), model))["accuracy"]
    batch = Parity(FARTHEST).batch(stream(3, 0, Purpose.VALIDATION), 20)
    for loops in (1, 7, FARTHEST):
        right = (model(batch.input_ids, n_loops=loops).argmax(-1) == batch.labels).double().mean(0)
        assert [row[loops - 1] for row in grid] == pytest.approx(right[1:].tolist(), abs=1e-4)


@pytest.mark.parametrize("name", arms(quick=True))
def test_only_coupled_arms_are_asked_no_more_bits_than_loops(name: str) -> None:
    cfg = arms(quick=True)[name]
    depths = cfg.loops.depths(0, cfg.steps, 4)
    batch = cfg.data.batch(stream(0, 0, Purpose.DATA), 4, depths)
    asked = (batch.labels != IGNORE).sum(1).tolist()
    assert asked == (depths.tolist() if name in ("coupled", "base100") else [TRAINED] * 4)
