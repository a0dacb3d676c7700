"""The bracket experiment: its numbers against slow ones, and words that follow from them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from open_mythos import LoopPlan, OpenMythos
from open_mythos.experiments.brackets import LENGTH, LOOPS, arms, by_row, by_task
from open_mythos.experiments.brackets_report import correlations, direction, report, settling_loop
from open_mythos.tasks import Brackets, Mixed
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE


def made_up(slope: float, task_loops: tuple[int, int, int], seeds: int = 3) -> dict[str, Any]:
    """Rows that settle `slope` loops later for each level of nesting, give or take one."""

    def rows(seed: int, slope: float) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        nested, place, kind = rng.integers(1, 7, 600), rng.integers(-1, LENGTH + 1, 600), rng.integers(0, 3, 600)
        settles = 4 + np.round(slope * nested).astype(int) + rng.integers(-1, 2, 600)
        columns = {"nesting": nested, "place": place, "settled": settles, "kind": kind}
        shares = {str(d): [0.5] * LOOPS for d in range(7)}
        return {"right": {"broken": shares, "balanced": shares}, "rows": {k: v.tolist() for k, v in columns.items()}}

    def tasks(seed: int) -> dict[str, Any]:
        found = {}
        for name, loop in zip(("parity", "addition", "brackets"), task_loops, strict=True):
            counts = [10] + [0] * LOOPS
            counts[loop], counts[loop + 1] = 90 - seed, seed
            found[name] = {"right": [0.9] * LOOPS, "settled": counts}
        return found

    plain = {"right": {"broken": {str(d): [0.4] for d in range(7)}, "balanced": {"1": [1.0]}}}
    runs = {
        "sampled": [rows(seed, slope) for seed in range(seeds)],
        "fixed": [rows(seed, 0) for seed in range(seeds)],
        "deep": [plain] * seeds,
        "small": [plain] * seeds,
        "mixed": [{"tasks": tasks(seed)} for seed in range(seeds)],
    }
    return {"length": LENGTH, "loops": LOOPS, "parameters": dict.fromkeys(runs, 1000), "runs": runs}


@pytest.mark.parametrize(
    ("slope", "said"), [(1, "deeper settles later"), (-0.5, "deeper settles earlier"), (0, "no order")]
)
def test_words_follow_from_the_numbers(slope: float, said: str) -> None:
    assert said in report(made_up(slope, (3, 3, 3), seeds=5)).finding


def test_plain_twins_are_held_against_the_looped() -> None:
    results = made_up(0, (3, 3, 3))
    for seed in range(3):
        results["runs"]["deep"][seed] = {"right": {"broken": {str(d): [0.6 + 0.01 * seed] for d in range(7)}}}
    text = "\n".join(part for part in report(results).parts if isinstance(part, str))
    assert "fixed depth 4 +0.000 [+0.000, +0.000], not told apart from 0" in text
    assert "plain, 5 blocks +0.110 [+0.085, +0.135], above 0; plain, 2 blocks -0.100 [-0.100, -0.100], below 0" in text


def test_tasks_differ_or_do_not() -> None:
    assert "3 of 3 pairs of tasks differ" in report(made_up(0, (2, 5, 8))).finding
    assert "2 of 3 pairs of tasks differ" in report(made_up(0, (2, 2, 8))).finding
    assert "0 of 3 pairs of tasks differ" in report(made_up(0, (4, 4, 4))).finding
    assert "one seed, so no interval" in report(made_up(1, (2, 5, 8), seeds=1)).finding


def test_a_task_that_was_not_learned_is_not_compared() -> None:
    results = made_up(0, (2, 5, 8))
    for run in results["runs"]["mixed"]:
        run["tasks"]["addition"]["right"][-1] = 0.4
    found = report(results).finding
    assert "1 of 1 pairs of tasks differ; addition was not learned" in found
    for run in results["runs"]["mixed"]:
        run["tasks"]["parity"]["right"][-1] = 0.4
    assert "cannot be compared" in report(results).finding


def test_what_never_settles_and_what_is_balanced_are_left_out() -> None:
    run = made_up(1, (3, 3, 3), seeds=1)["runs"]["sampled"][0]
    before = correlations([run])
    for name, values in {"nesting": [6, 6], "place": [-1, 3], "settled": [1, 0], "kind": [0, 0]}.items():
        run["rows"][name] += values
    assert correlations([run]) == before
    run["rows"]["settled"][-1] = 1
    assert correlations([run]) != before


def test_direction_of_nothing() -> None:
    assert "all settle at one loop, as in 1 of 3 seeds" in direction([0.2, float("nan"), 0.3])
    results = made_up(1, (3, 3, 3))
    rows = results["runs"]["sampled"][1]["rows"]
    rows["settled"] = [1] * len(rows["settled"])
    text = "".join(part for part in report(results).parts if isinstance(part, str))
    assert "not to be had in each seed" in text and "one seed" not in text
    assert settling_loop([5, 1, 0, 3]) == 2.5
    assert np.isnan(settling_loop([5, 0, 0]))


def scaled(model: OpenMythos) -> OpenMythos:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model.eval()


def test_rows_are_of_one_length_and_shares_those_of_separate_calls() -> None:
    torch.manual_seed(0)
    cfg = arms(quick=True)["sampled"]
    model = scaled(OpenMythos(dataclasses.replace(cfg.model, dim=16)))
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
    torch.manual_seed(0)
    cfg = arms(quick=True)["mixed"]
    assert isinstance(cfg.data, Mixed)
    found = by_task(scaled(OpenMythos(dataclasses.replace(cfg.model, dim=16))), cfg.data, 60, seed=0)["tasks"]
    assert set(found) == {"parity", "addition", "brackets"}
    assert sum(found["parity"]["settled"]) == sum(found["addition"]["settled"]) == 60
    assert 10 < sum(found["brackets"]["settled"]) < 50
    for task in found.values():
        # What is right after the last loop has settled, and nothing else has.
        assert task["right"][-1] == pytest.approx(1 - task["settled"][0] / sum(task["settled"]), abs=1e-4)


@pytest.mark.parametrize("name", arms(quick=True))
def test_arms_can_be_trained(name: str) -> None:
    cfg = arms(quick=True)[name]
    depths = cfg.loops.depths(0, 0, 4)
    batch = cfg.data.batch(stream(0, 0, Purpose.DATA), 4, depths)
    out = OpenMythos(cfg.model)(batch.input_ids, plan=LoopPlan(tuple(depths.tolist())))
    assert out.hidden.shape[:2] == batch.input_ids.shape
