"""Exits, their control and difficulty: the measures against plain calls, and what the two reports say."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.experiments import adaptive, exits
from open_mythos.experiments.difficulty import Task, carries, questions
from open_mythos.experiments.given_depths import GivenDepths, shuffled, with_exits
from open_mythos.experiments.study import Lab, Results, Run
from open_mythos.nn.halting import ACT
from open_mythos.recipes import load_recipe
from open_mythos.reports.stats import Estimate, rank_correlation, token_bits
from open_mythos.tasks import Addition, Brackets
from open_mythos.tasks.brackets import SYMBOLS
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE, Batch
from open_mythos.train.config import TrainConfig


def sharpened(cfg: TrainConfig, factor: float, **changes: int) -> OpenMythos:
    """The run's model, changed, with matrices so many times as large, so that predictions differ."""
    torch.manual_seed(0)
    model = OpenMythos(dataclasses.replace(cfg.model, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model


def built(cfg: TrainConfig) -> OpenMythos:
    return sharpened(cfg, 5, dim=32, n_heads=2, n_kv_heads=2, expert_dim=16)


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
    by = {"by_difficulty": {"1": loops - 0.1, "2": loops + 0.1}}
    by |= {"accuracy_by_difficulty": {"1": accuracy, "2": accuracy}}
    by |= {"loops": loops, "loops_of_all_tokens": loops, "rho": rho, "rho_of_any_place": rho, "shuffled_rho": 0.0}
    worse = accuracy - 0.2 * (0 if math.isnan(rho) else rho)
    return by | {"rule": rule, "threshold": threshold, "accuracy": accuracy, "shuffled": worse}


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


@pytest.fixture(scope="module")
def model() -> OpenMythos:
    small = {"dim": 32, "n_heads": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "n_experts": 4, "expert_dim": 16}
    return sharpened(load_recipe("adaptive-text"), 10, **small)


@pytest.fixture(scope="module")
def batch() -> Batch:
    data = dataclasses.replace(load_recipe("adaptive-text").data, seq_len=24)
    return data.validation_batch(stream(0, 1, Purpose.VALIDATION), 5)


def test_given_depths_are_the_ones_that_run(model: OpenMythos, batch: Batch) -> None:
    bits, loops = with_exits(model, batch, model.exit_rule("kl", 0.01), token_bits, rows=4)
    assert bits.shape == loops.shape == (5, 24) and len(loops.unique()) > 2
    # Given to the tokens that chose them, the depths give back the rule's own result.
    same_bits, same_loops = with_exits(model, batch, loops, token_bits, rows=4)
    assert torch.equal(same_loops, loops)
    torch.testing.assert_close(same_bits, bits)
    other = shuffled(loops, 0)
    assert torch.equal(with_exits(model, batch, other, token_bits, rows=4)[1], other)


def test_shuffling_moves_the_tokens_and_leaves_the_numbers() -> None:
    depths = torch.arange(60).view(4, 15) % 8 + 1
    other = shuffled(depths, 0)
    assert torch.equal(other.flatten().bincount(), depths.flatten().bincount())
    assert not torch.equal(other, depths)
    assert not torch.equal(other, shuffled(depths, 1))


def test_kinds_of_bytes() -> None:
    text = torch.tensor([list("A be, \xe9\n1x".encode())])
    kind = adaptive.kinds(Batch(text[:, :-1], text[:, 1:]))[0].tolist()
    # Predicted: blank b e , blank (two bytes of e with an accent) newline 1 x
    assert kind == [2, 0, 1, 3, 2, 0, 1, 2, 3, 0]


def test_what_is_measured_adds_up(model: OpenMythos, batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "run-0").mkdir()
    (tmp_path / "run-0" / "metrics.jsonl").write_text('{"step": 1, "train/ce": 5.5}\n')
    cfg = load_recipe("adaptive-text")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seq_len=24))
    settings = {"rows": 5, "rules": {"kl": (0.01,)}, "shuffles": 2}
    run = Run("run", cfg, 0, settings, Lab(tmp_path, True, (0,)))
    vars(run)["model"] = model  # instead of one that is trained
    results = adaptive.measure(run)
    assert results["train_ce"] == 5.5
    n, (found,) = batch.labels.numel(), results["exits"]
    assert results["tokens"] == sum(found["tokens_by_loops"]) == n
    assert found["loops"] == pytest.approx(sum(i * m for i, m in enumerate(found["tokens_by_loops"], 1)) / n)
    lengths = [len(x) for x in (results["fixed"], results["fixed"][0], found["bits"], *found["shuffled"])]
    assert lengths == [8, 5, 5, 5, 5]
    for groups in (results["by_exit"], results["by_kind"]):
        assert sum(g["tokens"] for g in groups) == n
        assert sum(g["tokens"] * g["bits"] for g in groups) / n == pytest.approx(np.mean(found["bits"]))
        deepest = sum(g["tokens"] * g["bits_by_depth"][-1] for g in groups) / n
        assert deepest == pytest.approx(np.mean(results["fixed"][-1]))
    assert [g["loops"] for g in results["by_exit"]] == [g["key"] for g in results["by_exit"]]


def made_up_text(gain: float, seeds: int) -> dict:
    """Make up numbers of two loops: 3 bits after one, 2 after both; exits at 1.5 are `gain` better than chance."""
    rng = np.random.default_rng(0)
    group = {"key": 2, "tokens": 5, "loops": 2.0, "bits": 2.0, "bits_by_depth": [3.0, 2.0]}
    runs = []
    for seed in range(seeds):
        text = rng.normal(0, 0.1, 40)
        chance, noise = text + 2.6, rng.normal(0, 0.001, 40)
        point = {"rule": "kl", "threshold": 0.01, "loops": 1.5, "tokens_by_loops": [20, 20]}
        point |= {"bits": list(chance - gain + noise), "shuffled": [list(chance), list(chance)]}
        cfg = {"seed": seed, "steps": 3, "batch_size": 2, "data": {"seq_len": 24}}
        run = {"asked": {"config": cfg}, "cpu_s": 1.0, "train_ce": 1.0, "tokens": 960}
        run |= {"fixed": [list(text + 3), list(text + 2)], "exits": [point]}
        runs.append(run | {"by_exit": [group], "by_kind": [group]})
    return json.loads(json.dumps({"parameters": {adaptive.ARM: 1000}, "runs": {adaptive.ARM: runs}}))


@pytest.mark.parametrize(
    ("gain", "verdict", "said"),
    [
        (0.2, "higher", ("1 predict text better", "(0 worse), 1 better than one depth for all (0 worse; +0.09")),
        (0.05, "higher", ("1 predict text better", "(0 worse), 0 better than one depth for all (1 worse; -0.05")),
        (0.0, "undecided", ("0 predict text better", "random tokens (0 worse)")),
        (-0.2, "lower", ("0 predict text better", "random tokens (1 worse)")),
    ],
)
def test_the_words_follow_from_the_numbers(gain: float, verdict: str, said: tuple[str, ...]) -> None:
    report = adaptive.STUDY.report(made_up_text(gain, 2))
    assert all(text in report.finding for text in said)
    table = next(part for part in report.parts if isinstance(part, str) and "| kl |" in part)
    row = table.splitlines()[-1].strip("| ").split(" | ")
    assert verdict in row and row[-1] == "40, 40"
    bits, same, control = map(float, row[3:6])
    assert (control - bits, control - same) == pytest.approx((gain, 0.1), abs=2e-3)
