"""The parity experiment: its arms run, its grid is that of separate calls, its words follow from its numbers."""

import dataclasses
from typing import Any

import pytest
import torch

from open_mythos import LoopPlan, OpenMythos
from open_mythos.experiments.parity import FARTHEST, READINGS, TRAINED, accuracy, arms, reach, report
from open_mythos.tasks import Parity
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE


def made_up(solves: dict[str, int], seeds: int = 3) -> dict[str, Any]:
    """Arms that answer so many bits, given as many loops (plain: always); beyond, 0.5 give or take 0.01."""

    def grid(arm: str, seed: int) -> list[list[float]]:
        plain = arm in ("deep", "small")
        loops = [FARTHEST] if plain else range(1, FARTHEST + 1)
        guess = 0.5 + 0.01 * (seed % 3 - 1)
        return [[1.0 if n <= min(k, solves[arm]) else guess for k in loops] for n in range(1, FARTHEST + 1)]

    runs = {arm: [{"accuracy": grid(arm, seed), "seed": seed} for seed in range(seeds)] for arm in solves}
    return {"rows": 100, "parameters": dict.fromkeys(solves, 1000), "runs": runs}


FAILS = dict.fromkeys(("coupled", "base100", "fixed", "deep", "small"), TRAINED)


def test_words_follow_from_the_numbers() -> None:
    there = report(made_up(FAILS | {"coupled": FARTHEST}))
    assert f"without a gap up to {FARTHEST}.0" in there.finding
    assert "above chance" in there.finding
    assert any("(above nothing)" in part for part in there.parts if isinstance(part, str))
    not_there = report(made_up(FAILS))
    assert f"without a gap up to {TRAINED}.0" in not_there.finding
    assert "not told apart from chance" in not_there.finding
    assert any("(not told apart from nothing)" in part for part in not_there.parts if isinstance(part, str))
    assert "one seed" in report(made_up(FAILS, seeds=1)).finding
    # A twin is shown at every depth it is read at, the one it was trained at too.
    assert all(reading.title in not_there.finding for reading in READINGS if reading.arm != "coupled")


def test_reach_ends_at_the_first_gap() -> None:
    runs = made_up(FAILS | {"coupled": 30})["runs"]["coupled"]
    assert reach(runs, READINGS[0]) == [30, 30, 30]
    # At a fixed number of loops it is these that end it.
    assert reach(runs, READINGS[1]) == [TRAINED] * 3
    runs[1]["accuracy"][4][4] = 0.94
    assert reach(runs, READINGS[0]) == [30, 4, 30]
    runs[1]["accuracy"][0][0] = 0.94
    assert reach(runs, READINGS[0]) == [30, 0, 30]


def test_grid_is_that_of_separate_calls() -> None:
    torch.manual_seed(0)
    cfg = arms(quick=True)["coupled"]
    model = OpenMythos(dataclasses.replace(cfg.model, dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    grid = accuracy(model, 20, seed=3)
    batch = Parity(FARTHEST).batch(stream(3, 0, Purpose.VALIDATION), 20)
    for loops in (1, 7, FARTHEST):
        right = (model(batch.input_ids, n_loops=loops).argmax(-1) == batch.labels).double().mean(0)
        assert [row[loops - 1] for row in grid] == pytest.approx(right[1:].tolist(), abs=1e-4)


@pytest.mark.parametrize("name", arms(quick=True))
def test_arms_can_be_trained(name: str) -> None:
    cfg = arms(quick=True)[name]
    depths = cfg.loops.depths(0, cfg.steps, 4)
    batch = cfg.data.batch(stream(0, 0, Purpose.DATA), 4, depths)
    out = OpenMythos(cfg.model)(batch.input_ids, plan=LoopPlan(tuple(depths.tolist())))
    assert out.hidden.shape[:2] == batch.input_ids.shape
    # What is not bound to the row's loops is asked about every length.
    asked = (batch.labels != IGNORE).sum(1).tolist()
    assert asked == (depths.tolist() if name in ("coupled", "base100") else [TRAINED] * 4)
