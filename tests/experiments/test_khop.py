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
    khop_task,
    plain_twin,
    recipe,
)
from open_mythos.experiments.khop_report import against, best_unreachable, reach, report, worst_reachable
from open_mythos.experiments.lab import Lab
from open_mythos.experiments.record import write_record
from open_mythos.recipes import load_recipe


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


def test_every_arm_can_be_trained_and_asked() -> None:
    configs = arms(recipe(quick=False))
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
    monkeypatch.setattr(khop, "DISTANCES", (1, 64))
    monkeypatch.setattr(khop, "LOOPS", (1, 3))
    results = khop.run(Lab(tmp_path, True, (3, 5)))
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}-{seed}" for name in chosen for seed in (3, 5)}
    for name, columns in (("diagonal", 2), ("plain-depth", 1)):
        runs = results["arms"][name]["runs"]
        assert [run["asked"]["config"]["seed"] for run in runs] == [3, 5]
        assert np.shape([run["accuracy"] for run in runs]) == (2, 2, columns)
    assert 0 < results["guessing"] < 0.5


def made_up(far: dict[str, float], control: float = 0.0, seeds: int = 5) -> dict[str, Any]:
    """Results in which every arm answers 4 hops and `far` is what it answers of farther ones, if loops suffice."""
    noise = np.random.default_rng(0).normal(0, 0.005, seeds)

    def grid(name: str, seed: int) -> list[list[float]]:
        loops = LOOPS if name in (*INJECTIONS, "root", "prelude") else (LOOPS[-1],)
        return [
            [(1.0 if d <= 4 else far.get(name, 0.1)) + noise[seed] if n >= d else control + noise[seed] for n in loops]
            for d in DISTANCES
        ]

    names = (*INJECTIONS, "plain-depth", "plain-parameters", "root", "prelude")
    results = {
        "distances": DISTANCES,
        "loops": LOOPS,
        "trained": (1, 4),
        "guessing": 0.26,
        "injections": INJECTIONS,
        "arms": {
            name: {
                "parameters": 50_000,
                "dim": 64,
                "blocks": 1,
                "labels": "the root, at the end",
                "runs": [{"accuracy": grid(name, seed), "cpu_s": 1.0} for seed in range(seeds)],
            }
            for name in names
        },
    }
    return json.loads(json.dumps(results))


def test_report_says_that_loops_help_when_they_do(tmp_path: Path) -> None:
    made = report(made_up({"lti": 0.97, "diagonal": 0.5, "root": 0.9, "prelude": 0.1}))
    assert "the best injection, lti, answers 0.97" in made.finding
    assert "above naming a root at random (0.260)" in made.finding
    assert "right up to 64 hops" in made.finding
    results = {"title": "t", "question": "q", "protocol": "p", "command": "c", "quick": False, "seeds": [0]}
    write_record(results | {"commits": ["x"], "machine": "m"}, made, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "the loops are worth more" in text
    assert ": better; " in text and ": worse; " in text
    assert "below 0.260" in text
    for name in ("heatmap.png", "hops.svg", "report.html"):
        assert (tmp_path / name).stat().st_size > 1000


def test_report_says_that_loops_do_not_help_when_they_do_not() -> None:
    far = dict.fromkeys((*INJECTIONS, "root"), 0.1) | {"plain-depth": 0.8, "plain-parameters": 0.1}
    made = report(made_up(far, control=0.6))
    text = "\n".join(str(part) for part in made.parts)
    assert "below naming a root at random" in made.finding
    assert "right up to 4 hops" in made.finding
    assert "below 0; plain, equal parameters" in made.finding
    assert made.finding.endswith("not told apart from 0.")
    assert "the loops are worth less" in text
    assert "above 0.260" in text


def test_one_seed_claims_nothing() -> None:
    made = report(made_up({"diagonal": 1.0}, seeds=1))
    assert "not told apart from naming a root" in made.finding
    assert "nan" not in made.finding


def test_verdicts_follow_from_intervals() -> None:
    assert against(np.array([0.5, 0.6, 0.7]), 0.1) == "above"
    assert against(np.array([0.5, 0.6, 0.7]), 0.9) == "below"
    assert against(np.array([0.5, 0.6, 0.7]), 0.65) == "not told apart from"
    grids = np.full((2, 3, 4), 0.95)
    assert reach(grids, (1, 8, 64)) == 64
    grids[1, 1, -1] = 0.5  # one seed fails in the middle
    assert reach(grids, (1, 8, 64)) == 1
    grids[0, 0, -1] = 0.5
    assert reach(grids, (1, 8, 64)) == 0
