"""The addition experiment: its measures against slow ones, its arms, and its words."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from open_mythos.experiments.addition import arms, by_loops, change, click, cosines, published, seen
from open_mythos.recipes import load_recipe
from open_mythos.reports.stats import Estimate
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

    whole = arms(quick=False)
    recipe = load_recipe("tiny-addition")
    assert differing(whole["sampled"], recipe) == {"eval"}
    assert differing(whole["sampled"], whole["fixed"]) == {"loops"}
    assert differing(whole["sampled"], whole["deep"]) == {"loops", "model"}
    assert differing(whole["sampled"], whole["four"]) == {"data", "steps"}
    assert differing(published(30_000), load_recipe("addition-dgx")) == {"model", "data", "eval"}
    cfg = whole["published"]
    assert cfg.schedule.warmup_steps / cfg.steps == pytest.approx(2000 / 30_000, rel=1e-3)
    assert (cfg.model.dim, cfg.model.head_dim) == (128, 32)
    for name, quick in arms(quick=True).items():
        assert quick.model == whole[name].model and quick.steps < whole[name].steps / 4


def test_the_click_is_the_first_time_at_the_goal() -> None:
    assert click({"curve": [(100, 0.5), (200, 0.995), (300, 0.9)]}) == 200
    assert click({"curve": [[100, 0.5]]}) is None


def test_problems_met_in_training_are_counted() -> None:
    """100 steps of 128 problems, half of which have 2 digits, against a simulation."""
    drawn = np.random.default_rng(0).integers(0, 8100, 6400)
    assert seen({"steps": 100, "batch_size": 128}, 2) == pytest.approx(len(np.unique(drawn)) / 8100, abs=0.01)


@pytest.mark.parametrize(
    ("four", "most", "says"),
    [
        ([1.0, 1.0], [0.6, 0.61], "collapses"),
        ([1.0, 1.0], [0.998, 0.998], "falls"),
        ([0.9, 0.91], [0.99, 1.0], "rises"),
        ([0.9, 0.9], [0.901, 0.899], "stays"),
        ([0.9, 0.9], [0.7, 1.0], "falls by more than 0.1 in 1 of 2 seeds, too mixed"),
        ([0.4, 0.4], [0.1, 0.1], "has not learned the task"),
        ([1.0], [0.6], "changes by -0.400 in its one run"),
    ],
)
def test_only_a_change_that_is_surely_small_is_none(four: list[float], most: list[float], says: str) -> None:
    assert change(Estimate(four), Estimate(most)).startswith(says)
