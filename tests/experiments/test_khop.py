"""The k-hop experiment: its evaluation against one plain call per number of loops, and what its report says of numbers
made up to go either way."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from open_mythos import LoopPlan, MythosConfig, OpenMythos
from open_mythos.accounting import count_parameters
from open_mythos.experiments import khop
from open_mythos.experiments.khop import (
    DISTANCES,
    INJECTIONS,
    LOOPS,
    accuracy_by_loops,
    accuracy_grid,
    arms,
    cycle_accuracy,
    cycles,
    khop_task,
    plain_twin,
    recipe,
)
from open_mythos.experiments.khop_report import (
    against,
    best_unreachable,
    largest_fall,
    reach,
    report,
    worst_reachable,
)
from open_mythos.experiments.study import Lab
from open_mythos.recipes import load_recipe
from open_mythos.reports.document import Report, write_record
from open_mythos.tasks.rng import Purpose, stream


def random_model(cfg: MythosConfig) -> OpenMythos:
    """One whose answers differ from loop to loop."""
    torch.manual_seed(0)
    model = OpenMythos(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if name.startswith("recurrent.block") else 1)
    return model


def test_accuracy_by_loops_is_that_of_separate_calls() -> None:
    base = load_recipe("tiny-khop")
    model = random_model(dataclasses.replace(base.model, dim=16))
    batch = base.data.batch(np.random.default_rng(0), 400)  # no multiple of the rows at once
    named = [model(batch.input_ids, n_loops=n)[:, -1].argmax(-1) for n in (1, 2, 5)]
    batch.labels[:, -1] = named[1]
    expected = [(names == named[1]).double().mean().item() for names in named]
    assert expected[1] == 1 > max(expected[0], expected[2]) > 0
    assert accuracy_by_loops(model, batch, (1, 2, 5)) == pytest.approx(expected, abs=1e-6)


def test_a_plain_model_has_one_answer() -> None:
    twin = plain_twin(load_recipe("tiny-khop"))
    model = random_model(dataclasses.replace(twin.model, dim=16))
    grid = accuracy_grid(model, khop_task(twin), 130, 0, (1, 8), (1,))
    assert [len(row) for row in grid] == [1, 1]


def test_reachable_cells_are_those_with_enough_loops() -> None:
    hops, loops = np.array([1, 2, 3, 6, 16]), np.array([1, 2, 4, 8, 32])
    grid = np.where(loops[None] >= hops[:, None], 0.75, 0.25)
    assert worst_reachable(grid.tolist(), hops.tolist(), loops.tolist()) == 0.75
    assert best_unreachable(grid.tolist(), hops.tolist(), loops.tolist()) == 0.25


def test_largest_fall_is_that_of_loops_that_suffice() -> None:
    hops, loops = (1, 4), (1, 2, 4, 8)
    assert largest_fall([[0.8, 0.9, 0.9, 1.0], [0.9, 0.1, 0.9, 0.95]], hops, loops) == 0  # 2 loops are too few for 4
    assert largest_fall([[0.8, 0.9, 0.7, 0.8], [0.0, 0.0, 0.9, 0.8]], hops, loops) == pytest.approx(0.2)
    assert largest_fall([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.9, 0.2]], hops, loops) == pytest.approx(0.7)


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
    model = random_model(dataclasses.replace(base.model, dim=16))
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
    configs = arms(recipe(quick=False))
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
    quick, whole = recipe(quick=True), recipe(quick=False)
    assert quick.steps < whole.steps
    assert quick.loops.ramp_steps < quick.steps


def test_run_measures_every_arm_of_every_seed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = recipe(quick=True)
    tiny = dataclasses.replace(
        tiny,
        steps=2,
        batch_size=2,
        model=dataclasses.replace(tiny.model, dim=16, expert_dim=16),
        loops=dataclasses.replace(tiny.loops, ramp_steps=0),
    )
    chosen = ("diagonal", "plain-depth")
    monkeypatch.setattr(khop, "recipe", lambda quick: tiny)
    monkeypatch.setattr(khop, "arms", lambda base: {name: arms(base)[name] for name in chosen})
    monkeypatch.setattr(khop, "DISTANCES", (1, 16))
    monkeypatch.setattr(khop, "LOOPS", (1, 3))
    results = khop.run(Lab(tmp_path, True, (3, 5)))
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}-{seed}" for name in chosen for seed in (3, 5)}
    for name, columns in (("diagonal", 2), ("plain-depth", 1)):
        runs = results["arms"][name]["runs"]
        assert [run["asked"]["config"]["seed"] for run in runs] == [3, 5]
        assert np.shape([run["forest"] for run in runs]) == (2, 2, columns)
        assert [len(run["cycle"]["right"]) for run in runs if "cycle" in run] == ([3, 3] if columns == 2 else [])
    assert 0 < results["guessing"] < 0.5


def made_up(
    far: dict[str, float],
    control: float = 0.0,
    seeds: int = 5,
    fall: float = 0.0,
    cycle: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Results in which every arm answers 4 hops, and `far` or `cycle` is what it answers of more, if loops suffice.

    The last loops of the forest cost `fall`.
    """
    noise = np.random.default_rng(0).normal(0, 0.002, seeds)
    names = (*INJECTIONS, "plain-depth", "plain-parameters", "root", "prelude")
    looped = (*INJECTIONS, "root", "prelude")

    def accuracy(name: str, hops: int, loops: int, seed: int) -> float:
        if name in looped and loops < hops:
            return control + noise[seed]
        return (1.0 if hops <= 4 else far.get(name, 0.1)) + noise[seed] - fall * (loops == LOOPS[-1])

    def measured(name: str, seed: int) -> dict[str, Any]:
        loops = LOOPS if name in looped else LOOPS[:1]
        forest = [[accuracy(name, d, n, seed) for n in loops] for d in DISTANCES]
        right = [1.0 if n <= 4 else (cycle or far).get(name, 0.1) + noise[seed] for n in range(1, LOOPS[-1] + 1)]
        off = [0.0] * LOOPS[-1]
        made = {"right": right, "one_before": off, "one_after": off}
        return {"forest": forest, "cpu_s": 1.0} | ({"cycle": made} if name in looped else {})

    results = {
        "distances": DISTANCES,
        "loops": LOOPS,
        "trained": (1, 4),
        "trained_loops": 6,
        "n_symbols": 24,
        "guessing": 0.26,
        "injections": INJECTIONS,
        "arms": {
            name: {
                "parameters": 50_000,
                "dim": 64,
                "blocks": 1,
                "labels": "the root, at the end",
                "runs": [measured(name, seed) for seed in range(seeds)],
            }
            for name in names
        },
    }
    return json.loads(json.dumps(results))


def said(made: Report) -> str:
    return "\n".join([made.finding, *map(str, made.parts)])


def test_report_says_that_loops_help_when_they_do(tmp_path: Path) -> None:
    made = report(made_up({"diagonal": 0.97, "lti": 0.5, "root": 0.99, "prelude": 0.1}))
    assert "at 64 that is above chance (0.042)" in made.finding
    assert "lti 0.50" in made.finding
    assert "above 0; plain, equal parameters" in made.finding
    assert made.finding.endswith("they do not hurt.")
    results = {"title": "t", "question": "q", "protocol": "p", "command": "c", "quick": False, "seeds": [0]}
    write_record(results | {"commits": ["x"], "machine": "m"}, made, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "the loops are worth more" in text
    assert ": better." in text and ": worse." in text
    assert "| above chance | 96 |" in text and "| above chance | 4 |" in text
    for name in ("heatmap.png", "hops.svg", "report.html"):
        assert (tmp_path / name).stat().st_size > 1000


def test_report_says_that_loops_do_not_help_when_they_do_not() -> None:
    far = dict.fromkeys((*INJECTIONS, "root"), 0.1) | {"plain-depth": 0.8, "plain-parameters": 0.1}
    made = report(made_up(far, fall=0.1, cycle={"diagonal": 0.01}))
    assert "at 64 that is below chance" in made.finding
    assert "below 0; plain, equal parameters" in made.finding
    assert made.finding.endswith("they hurt.")
    assert "the loops are worth less" in said(made)


def test_report_shows_an_answer_that_leaks() -> None:
    assert "0.600 [0.59" in said(report(made_up({"diagonal": 0.97}, control=0.6)))
    assert "0.600 [0.59" not in said(report(made_up({"diagonal": 0.97})))


def test_one_seed_claims_nothing() -> None:
    made = report(made_up({"diagonal": 1.0}, seeds=1))
    assert "not told apart from chance" in made.finding
    assert made.finding.endswith("not told.")
    assert "nan" not in made.finding


def test_verdicts_follow_from_intervals() -> None:
    assert against(np.array([0.5, 0.6, 0.7]), 0.1) == "above"
    assert against(np.array([0.5, 0.6, 0.7]), 0.9) == "below"
    assert against(np.array([0.5, 0.6, 0.7]), 0.65) == "not told apart from"
    by_hops = np.full((2, 3), 0.95)
    assert reach(by_hops, (1, 8, 64)) == 64
    by_hops[1, 1] = 0.5  # one seed fails in the middle
    assert reach(by_hops, (1, 8, 64)) == 1
    by_hops[0, 0] = 0.5
    assert reach(by_hops, (1, 8, 64)) == 0
