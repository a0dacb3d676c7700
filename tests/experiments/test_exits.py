"""Exits and difficulty: the oracle, the control, the measures of difficulty, and what the report says."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.experiments import exits
from open_mythos.experiments.difficulty import Task, carries, questions
from open_mythos.experiments.given_depths import GivenDepths
from open_mythos.experiments.study import Lab, Results, Run
from open_mythos.nn.halting import ACT
from open_mythos.reports.stats import Estimate, rank_correlation
from open_mythos.tasks import Addition, Brackets
from open_mythos.tasks.brackets import SYMBOLS
from open_mythos.tasks.task import IGNORE
from open_mythos.train.config import TrainConfig


def built(cfg: TrainConfig) -> OpenMythos:
    torch.manual_seed(0)
    model = OpenMythos(dataclasses.replace(cfg.model, dim=32, n_heads=2, n_kv_heads=2, expert_dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


@pytest.mark.parametrize("arm", ["khop, rules", "addition, rules", "brackets, rules", "khop, ACT, ponder 0.01"])
def test_measured_once_through(arm: str) -> None:
    cfg = exits.arms(True)[arm]
    assert isinstance(cfg.data, Task)
    model = built(cfg)
    run = Run(arm, cfg, 1 - 1_000_000, {"rows": 40, "loops": 5}, Lab(Path(), True, (1,)))
    vars(run)["model"] = model  # instead of one that is trained
    found = exits.measure(run)
    batch, difficulty, _ = questions(cfg.data, 40, 1)
    asked = batch.labels != IGNORE
    with torch.no_grad():
        right = model(batch.input_ids, 2).argmax(-1) == batch.labels
    assert found["fixed"][1] == pytest.approx(right[asked].double().mean().item())
    graded = asked & (difficulty >= 0)
    levels = difficulty[graded].bincount()
    if "brackets" not in arm:
        assert int(levels.sum()) == int(asked.sum()) - 40 * ("addition" in arm), "the end of a sum has no difficulty"
    for point in found["points"]:
        assert 1 <= point["loops"] <= 5
        if "khop" in arm:
            total = sum(levels[int(n)].item() * loops for n, loops in point["by_difficulty"].items())
            assert total == pytest.approx(point["loops"] * int(levels.sum()))
    if "rules" in arm:
        stays, first = found["points"][:2]
        assert stays["loops"] >= first["loops"]
    if arm == "khop, rules":
        # One question a row and no coda: an oracle is right wherever any depth is.
        assert found["points"][1]["accuracy"] >= max(found["fixed"])


def test_act_with_given_depths_at_its_own_depths_is_act() -> None:
    model = built(exits.arms(True)["addition, ACT, ponder 0"])
    assert model.recurrent is not None and model.recurrent.act is not None
    with torch.no_grad():
        model.recurrent.act.halt.weight.normal_()
        ids = questions(Addition(2, 3), 20, 0)[0].input_ids
        own = model(ids, 5, exit=ACT(model.recurrent.act, 0.7), trace=True)
        given = model(ids, 5, exit=GivenDepths(own.exit_loop + 1, ACT(model.recurrent.act, 1.0)), trace=True)
    assert len(own.exit_loop.unique()) > 2
    assert torch.equal(given.exit_loop, own.exit_loop)
    torch.testing.assert_close(given.logits, own.logits)


def test_carries() -> None:
    task = Addition(2, 3)

    batch = task.encode(np.array([95, 999, 12]), np.array([17, 1 + 100, 34]), np.array([2, 3, 2]))
    chains = carries(batch.input_ids)
    starts = (5, 7, 5)
    # 95 + 17: 5 + 7 carries into 9 + 1, which carries on. 999 + 101: three in a row. 12 + 34: none.
    want = ([0, 1, 2, -1], [0, 1, 2, 3, -1], [0, 0, -1])
    for row, start, expected in zip(chains, starts, want, strict=True):
        assert row[start : start + len(expected)].tolist() == expected
        assert (row[:start] == -1).all()


def read(ids: list[int]) -> tuple[int, int]:
    """Where a string breaks, -1 for nowhere, and its nesting up to there."""
    waiting: list[str] = []
    deepest = 0
    for place, symbol in enumerate(SYMBOLS[i] for i in ids):
        if symbol in "([{":
            waiting.append({"(": ")", "[": "]", "{": "}"}[symbol])
        elif not waiting or waiting.pop() != symbol:
            return place, deepest
        deepest = max(deepest, len(waiting))
    return (len(ids) if waiting else -1), deepest


def test_brackets_are_graded_where_they_break() -> None:
    task = Brackets(12, 12, 1, 6)
    batch, difficulty, where = questions(task, 200, 0)
    for ids, labels, hard, at in zip(
        *(x.tolist() for x in (batch.input_ids, batch.labels, difficulty, where)), strict=True
    ):
        place, deepest = read(ids[:12])
        graded = [i for i, level in enumerate(hard) if level >= 0 and labels[i] != IGNORE]
        assert graded == ([12, 13] if place >= 0 and 1 <= deepest <= 6 else [])
        assert {hard[i] for i in graded} <= {deepest}
        assert [at[i] for i in graded] == [100 * place + i for i in graded]


def test_a_rule_that_knows_the_place_alone_follows_nothing() -> None:
    batch, difficulty, place = questions(Addition(2, 3), 400, 0)
    graded = difficulty >= 0
    hard, where = difficulty[graded].tolist(), place[graded].tolist()
    loops = torch.arange(batch.labels.shape[1]).expand_as(place)[graded].tolist()
    assert rank_correlation(loops, hard) > 0.2
    assert math.isnan(rank_correlation(loops, hard, where))
    assert rank_correlation(hard, hard, where) == pytest.approx(1)


def point(rule: str, threshold: float | None, loops: float, accuracy: float, rho: float) -> dict[str, Any]:
    by = {"1": loops - 0.1, "2": loops + 0.1}
    return {
        "rule": rule,
        "threshold": threshold,
        "loops": loops,
        "loops_of_all_tokens": loops,
        "accuracy": accuracy,
        "shuffled": accuracy - 0.2 * (0 if math.isnan(rho) else rho),
        "rho": rho,
        "rho_of_any_place": rho,
        "shuffled_rho": 0.0,
        "by_difficulty": by,
        "accuracy_by_difficulty": {"1": accuracy, "2": accuracy},
    }


def made_up(sign: float, seeds: int = 5) -> Results:
    runs: dict[str, Any] = {}
    for name in exits.arms(True):
        runs[name] = []
        for seed in range(seeds):
            rho = sign * (0.5 + 0.01 * seed)
            if "rules" in name:
                points = [point("oracle, stays right", None, 2.0, 1.0, 0.9), point("kl", 0.1, 3.0, 0.995, rho)]
                points += [point("kl", 1.0, 2.0, 0.5, rho), point("latent_diff", 0.1, 5.0, 0.9, math.nan)]
            else:
                points = [point("act", 0.9, 3.0, 0.99, rho)]
            runs[name].append({"fixed": [0.5, 0.9, 1.0], "commonest": 0.1, "points": points})
    return Results(exits.STUDY, {"runs": runs})


def thresholds(r: Results, name: str = "kl") -> list[float]:
    """The thresholds that seeds choose for a rule of khop."""
    _, chosen = exits.rows(r, "khop")[name]
    return [result["threshold"] for result in chosen["results"]]


def test_report_says_what_the_numbers_say() -> None:
    report = exits.STUDY.report(made_up(1).raw)
    assert "depth follows difficulty for kl, kl, end only, ACT" in report.finding
    text = "\n".join(map(str, report.parts))
    assert "follows difficulty: kl at 2 of 2; latent_diff at 0 of 1; kl, end only at 2 of 2;" in text
    assert "better than the same depths at random answers: kl, kl, end only, ACT" in report.finding
    against = exits.STUDY.report(made_up(-1).raw)
    assert "follows difficulty: kl at 0 of 2, the reverse at 2; latent_diff" in "\n".join(map(str, against.parts))
    assert "for no rule" in against.finding and "at random answers: none" in against.finding
    assert "nothing is claimed" in exits.STUDY.report(made_up(1, seeds=1).raw).finding
    assert thresholds(made_up(1))[0] == 0.1  # the cheaper one costs too much


def test_the_threshold_of_a_seed_is_chosen_by_the_others() -> None:
    r = made_up(1)
    runs = r.runs["khop, rules"]
    runs[0]["points"][2]["accuracy"] = 1.0  # the cheaper threshold, by luck
    assert thresholds(r) == [0.1] * 5
    # The others are sure of it as well: the seed where it fails gets it all the same.
    for run in runs:
        run["points"][2]["accuracy"] = 1.0
    runs[3]["points"][2]["accuracy"] = 0.9
    assert thresholds(r) == [0.1, 0.1, 0.1, 1.0, 0.1]
    r.runs["khop, rules"] = runs[:1]
    assert thresholds(r) == [1.0]


def test_words_follow_from_intervals() -> None:
    assert exits.follows(Estimate([0.1, 0.2, 0.15])) == "yes"
    assert exits.follows(Estimate([-0.1, -0.2, -0.15])) == "the reverse"
    assert exits.follows(Estimate([-0.1, 0.2, 0.05])) == "not shown"
    assert "no interval" in exits.follows(Estimate([math.pi]))
