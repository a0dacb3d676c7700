"""The addition experiment: its measures against slow ones, its arms, and a report that says what the numbers say."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from open_mythos.experiments import addition_report
from open_mythos.experiments.addition import EXPERIMENT, arms, by_loops, cosines, published
from open_mythos.recipes import load_recipe
from open_mythos.reports.document import Table, write_record
from open_mythos.tasks import Addition
from open_mythos.tasks.addition import EQUALS
from open_mythos.tasks.task import IGNORE, Batch
from open_mythos.train.config import TrainConfig
from tests.models import scaled, tiny

SIZE = {"vocab_size": 16, "max_loop_iters": 3}


def problems(digits: int, rows: int) -> Batch:
    return Addition(digits, digits).batch(np.random.default_rng(0), rows)


@pytest.mark.parametrize("halting", ["none", "act"])
def test_exact_match_is_that_of_greedy_decoding(halting: str) -> None:
    """One digit, and labels that a model of random weights often gets right: those that it writes itself."""
    model = scaled(tiny(**SIZE, halting=halting))
    batch = problems(1, 60)
    start = (batch.input_ids[0] == EQUALS).nonzero().item() + 1
    written = model.generate(batch.input_ids[:, :start], max_new_tokens=2, n_loops=2, temperature=0.0)
    # Two tokens of the answer; every third row asks for another token than the model writes.
    answer = written[:, start:].clone()
    answer[::3, 1] = (answer[::3, 1] + 1) % 16
    ids = torch.cat([batch.input_ids[:, :start], answer[:, :1]], dim=1)
    labels = torch.full_like(ids, IGNORE)
    labels[:, -2:] = answer
    right, used = by_loops(model, Batch(ids, labels), (1, 2, 5))
    assert right[1] == pytest.approx(40 / 60)
    for n, share, loops in zip((1, 2, 5), right, used, strict=True):
        again = model.generate(batch.input_ids[:, :start], max_new_tokens=2, n_loops=n, temperature=0.0)
        assert share == pytest.approx((again[:, start:] == answer).all(-1).double().mean().item())
        assert loops == n if halting == "none" else 1 <= loops <= n


@pytest.mark.parametrize("state", ["e", "zero"])
def test_cosines_are_those_of_separate_calls(state: str) -> None:
    model = scaled(tiny(**SIZE, initial_state=state))
    batch = problems(2, 5)
    where = batch.labels != IGNORE
    with torch.no_grad():
        view = model.make_view((5, batch.input_ids.shape[1]))
        first = model.encode(batch.input_ids, view)
        states = [first] + [model(batch.input_ids, n, exit="fixed", trace=True).hidden[-1] for n in range(1, 6)]
    expected = [F.cosine_similarity(b[where], a[where], dim=-1).mean().item() for a, b in pairwise(states)]
    got = cosines(model, batch, 5)
    assert len(got) == 5
    if state == "zero":
        assert got.pop(0) is None
        expected.pop(0)
    assert got == pytest.approx(expected, abs=1e-6)


def test_arms_differ_in_what_they_are_to_differ_in() -> None:
    def differing(a: TrainConfig, b: TrainConfig) -> set[str]:
        one, other = a.to_dict(), b.to_dict()
        return {key for key in one if one[key] != other[key]}

    whole = {name: arm.cfg for name, arm in arms(quick=False).items()}
    recipe = load_recipe("tiny-addition")
    assert differing(whole["sampled"], recipe) == {"eval"}
    assert differing(whole["sampled"], whole["fixed"]) == {"loops"}
    assert differing(whole["sampled"], whole["deep"]) == {"loops", "model"}
    assert differing(whole["sampled"], whole["four"]) == {"data", "steps"}
    assert differing(published(30_000), load_recipe("addition-dgx")) == {"model", "data", "eval"}
    cfg = whole["published"]
    assert cfg.schedule.warmup_steps / cfg.steps == pytest.approx(2000 / 30_000, rel=1e-3)
    assert (cfg.model.dim, cfg.model.head_dim) == (128, 32)
    for name, arm in arms(quick=True).items():
        assert arm.cfg.model == whole[name].model and arm.cfg.steps < whole[name].steps / 4


def made_up(sampled: Any, fixed: Any, seeds: int = 5) -> dict[str, Any]:
    """Results whose seeds differ by a thousandth; `sampled` and `fixed` by loops."""

    def runs(accuracy: Any, arm: str, n: int, digits: tuple[int, ...] = (2, 3)) -> list[dict[str, Any]]:
        return [
            {
                "seed": seed,
                "cpu_s": 100.0,
                "commit": "abc",
                "asked": {"config": arms(quick=True)[arm].cfg.to_dict()},
                "accuracy": {d: [x - 0.001 * seed for x in accuracy] for d in digits},
                "used": {d: [1, 2, 3, 4, 5, 6] for d in digits},
                "cosine": {d: [None, *[0.9] * 31] for d in digits},
                "curve": [(100, 0.5), (200, 0.995 - 0.01 * (seed == 1)), (300, accuracy[2])],
            }
            for seed in range(n)
        ]

    results = {
        "loops": [1, 2, 4, 8, 16, 32],
        "rows": 1000,
        "cosine_rows": 200,
        "arms": {name: {"title": arm.title, "parameters": 1000} for name, arm in arms(quick=True).items()},
        "runs": {
            "sampled": runs(sampled, "sampled", seeds),
            "fixed": runs(fixed, "fixed", seeds),
            "published": runs([0.1] * 6, "published", seeds),
            "four": runs(sampled, "four", 1, (2, 3, 4)),
        },
    }
    return json.loads(json.dumps(results))


FLAT, FALLING = [0.9, 0.95, 1.0, 1.0, 0.999, 0.998], [0.1, 0.2, 1.0, 0.9, 0.8, 0.6]


def test_verdicts_follow_the_numbers() -> None:
    results = made_up(FLAT, FALLING)
    assert "hold 0.99 (lowest 0.996 in the mean of 5 seeds, 0.994" in addition_report.holds(results, "sampled")
    assert "do not hold" in addition_report.holds(results, "fixed")
    assert addition_report.fall(results, "fixed")[0] == "collapses"
    assert addition_report.fall(results, "sampled")[0] == "falls"  # by 0.002 in every seed
    assert addition_report.fall(results, "published")[0] == "has not learned the task"
    swapped = made_up(FALLING, [0.9, 0.95, 0.99, 0.99, 0.99, 0.999])
    assert "do not hold" in addition_report.holds(swapped, "sampled")
    assert addition_report.fall(swapped, "fixed")[0] == "rises"
    for told in (results, swapped):
        assert addition_report.holds(told, "sampled") in addition_report.report(told).finding


def test_only_a_change_that_is_surely_small_is_none() -> None:
    results = made_up(FLAT, FALLING, seeds=2)
    for run, value in zip(results["runs"]["fixed"], (0.7, 1.0), strict=True):
        run["accuracy"] = {"2": [0, 0, 0.9, 0, 0, value], "3": [0, 0, 0.9, 0, 0, value]}
    assert addition_report.fall(results, "fixed")[0].startswith("falls by more than 0.1 in 1 of 2 seeds, too mixed")
    for run, value in zip(results["runs"]["fixed"], (0.901, 0.899), strict=True):
        run["accuracy"] = {"2": [0, 0, 0.9, 0, 0, value], "3": [0, 0, 0.9, 0, 0, value]}
    assert addition_report.fall(results, "fixed")[0] == "stays"
    assert addition_report.fall(made_up(FLAT, FALLING, seeds=1), "fixed")[0] == "changes by -0.400 in its one run"


def test_the_click_is_the_first_time_at_the_goal() -> None:
    results = made_up(FLAT, FALLING)
    assert [addition_report.click(run) for run in results["runs"]["sampled"]] == [200, 300, 200, 200, 200]
    assert addition_report.click({"curve": [[100, 0.5]]}) is None


def test_the_report_has_both_tables_and_draws(tmp_path: Path) -> None:
    results = made_up(FLAT, FALLING)
    report = EXPERIMENT.report(results)
    tables = [part for part in report.parts if isinstance(part, Table)]
    assert all(len(row) == len(table.head) for table in tables for row in table.rows)
    three = next(t for t in tables if t.head[0] == "loops" and t.rows[-1][1] == "0.65")
    assert three.head[1:] == ["published", *(arm["title"] for name, arm in results["arms"].items() if name != "deep")]
    assert three.rows[-1][2].startswith("0.996 [")
    told = {"name": "addition", "command": "", "quick": False, "seeds": [0], "commits": [], "machine": ""}
    texts = {"title": EXPERIMENT.title, "question": EXPERIMENT.question, "protocol": EXPERIMENT.protocol}
    write_record(told | texts | {"results": results}, report, tmp_path)
    assert (tmp_path / "report.html").read_text().count("data:image/svg+xml") == 2
    assert (tmp_path / "loops.png").stat().st_size > 10_000


def test_problems_met_in_training_are_counted() -> None:
    """100 draws of 2 digits against a simulation."""
    results = made_up(FLAT, FALLING)
    cfg = results["runs"]["sampled"][0]["asked"]["config"]
    cfg.update(steps=100, batch_size=128)
    rng = np.random.default_rng(0)
    share = len(np.unique(rng.integers(0, 8100, 6400))) / 8100
    assert f"show {share:.0%}" in addition_report._seen(results)
