"""The laboratory: what was done is not repeated, what was cut off goes on, nothing is taken for something else."""

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from open_mythos.experiments import EXPERIMENTS
from open_mythos.experiments import study as laboratory
from open_mythos.experiments.study import Lab, Run, Study, commit, load
from open_mythos.model import OpenMythos
from open_mythos.tasks import Addition
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.optim import OptimConfig
from open_mythos.train.trainer import Trainer
from tests.models import tiny

STEPS = 6


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "runs", quick=False, seeds=(0, 1))


@pytest.fixture
def cfg() -> TrainConfig:
    return TrainConfig(
        tiny(halting="none"), Addition(1, 1), STEPS, 2, optim=OptimConfig(lr=1e-2), loops=LoopsConfig("poisson", 2)
    )


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The optimizer steps that are done from here on."""
    done: list[int] = []
    real = Trainer.train_step

    def counted(self: Trainer, step: int, log: bool = True) -> tuple[int, dict[str, float]]:
        done.append(step)
        return real(self, step, log)

    monkeypatch.setattr(Trainer, "train_step", counted)
    return done


def weights(model: OpenMythos) -> dict[str, list]:
    return {name: value.tolist() for name, value in model.state_dict().items()}


def cut_off(after: int) -> Callable[[Trainer, int], tuple[int, dict[str, float]]]:
    """A training step that fails, once, when so many steps are done."""
    real, left = Trainer.train_step, [1]

    def failing(self: Trainer, step: int, log: bool = True) -> tuple[int, dict[str, float]]:
        if step == after and left.pop():
            # What is being written has reached the disk; else a step more is lost, now and then.
            self.checkpoints.wait()
            raise OSError("the power is gone")
        return real(self, step, log)

    return failing


def test_a_finished_run_is_not_repeated_and_no_other_taken_for_it(lab: Lab, cfg: TrainConfig, steps: list[int]) -> None:
    first, config = lab.trained("a", cfg), lab.runs / "a" / "config.yaml"
    assert steps == [*range(STEPS)]
    again = lab.trained("a", cfg)
    assert weights(first) == weights(again) and not again.training
    assert not (lab.runs / "a" / "checkpoints").exists()
    # A run from before a field was added is the same run.
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "clip_norm" not in line))
    assert config.read_text() != cfg.to_yaml()
    lab.trained("a", cfg)
    assert steps == [*range(STEPS)]
    other = dataclasses.replace(cfg, optim=OptimConfig(lr=2e-2))
    assert weights(lab.trained("a", other)) != weights(first)
    assert steps == [*range(STEPS)] * 2
    assert TrainConfig.load(config) == other


def test_a_run_that_was_cut_off_goes_on(
    lab: Lab, cfg: TrainConfig, steps: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = Lab(tmp_path / "whole", False, (0,)).trained("a", cfg)
    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", cut_off(4))
        with pytest.raises(OSError, match="power"):
            lab.trained("a", cfg)
        assert steps == [0, 1, 2, 3]
    spent = float((lab.runs / "a" / "cpu_s").read_text())
    assert weights(lab.trained("a", cfg)) == weights(whole)
    assert steps == [*range(STEPS)]
    assert float((lab.runs / "a" / "cpu_s").read_text()) >= spent


def test_numbers_are_measured_once_for_what_was_asked(lab: Lab, cfg: TrainConfig, steps: list[int]) -> None:
    calls = []

    def measure(model: OpenMythos) -> dict:
        calls.append(model.training)
        return {"by_loops": {1: (0.5, float("nan"))}}

    first = lab.measured("a", cfg, measure, rows=10)
    # As JSON gives them back, at once and later.
    assert list(first["by_loops"]) == ["1"] and first["by_loops"]["1"][0] == 0.5
    assert first["asked"] == {"config": json.loads(json.dumps(cfg.to_dict())), "rows": 10}
    assert first["cpu_s"] > 0
    assert str(lab.measured("a", cfg, measure, rows=10)) == str(first)
    assert calls == [False]
    assert lab.measured("a", cfg, measure, rows=20)["cpu_s"] == first["cpu_s"]
    lab.measured("a", dataclasses.replace(cfg, seed=1), measure, rows=20)
    assert calls == [False] * 3
    assert steps == [*range(STEPS)] * 2


def test_a_failed_measurement_costs_no_training(lab: Lab, cfg: TrainConfig, steps: list[int]) -> None:
    def fail(model: OpenMythos) -> dict:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        lab.measured("a", cfg, fail)
    assert lab.measured("a", cfg, lambda model: {"x": 1})["x"] == 1
    assert steps == [*range(STEPS)]


def test_every_arm_runs_its_seeds_with_weights_of_their_own(lab: Lab, cfg: TrainConfig) -> None:
    def measure(run: Run) -> dict:
        return {"sum": sum(x.double().sum().item() for x in run.model.parameters()), "asked_of": run.config.seed}

    study = Study("", "", "", ("", ""), lambda quick: {"a": cfg, "b": cfg}, measure, lambda r: {}, n_seeds={"b": 1})
    runs = study.run(lab)["runs"]
    assert {arm: [run["seed"] for run in found] for arm, found in runs.items()} == {"a": [0, 1], "b": [0]}
    assert [run["asked_of"] for run in runs["a"]] == [0, 1] and runs["a"][0]["sum"] != runs["a"][1]["sum"]
    assert runs["a"][0]["sum"] == runs["b"][0]["sum"]
    assert study.n_parts(lab) == len(lab.begun) == 3


def test_the_commit_is_that_of_the_code(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours = subprocess.run(
        ["git", "-C", str(repo_root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    told = commit()
    assert told == "unknown" if not ours else ours.startswith(told.removesuffix("-dirty"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == "unknown"


def test_commits_of_all_numbers_are_told() -> None:
    raw = {"a": [{"commit": "x", "b": {"commit": "y"}}, {"commit": "x"}], "c": "z"}
    assert laboratory._commits(raw) == {"x", "y"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_says_what_it_asks(name: str) -> None:
    experiment = load(name)
    assert experiment.question.endswith("?")
    assert experiment.title and experiment.text("Protocol") and all(experiment.cost)
    assert len(set(experiment.seeds)) == len(experiment.seeds) >= 1


def test_parts_are_computed_once_and_counted_with_those_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    counts = iter(range(9))
    for labels, found in ((("a-0", "b-0"), [0, 1]), (("a-0", "b-0", "c-0"), [0, 1, 2])):
        lab = Lab(tmp_path, True, (0,), threads=3, n_parts=3)
        assert [lab.computed(label, lambda: {"x": next(counts)}, seed=0)["x"] for label in labels] == found
    assert capsys.readouterr().out == "Part 1 of 3: a-0\nPart 2 of 3: b-0\nPart 3 of 3: c-0\n"
    assert lab.computed("a-0", lambda: {"x": 5}, seed=1)["x"] == 5, "another seed is computed anew"
    assert set(asked) == {3}
