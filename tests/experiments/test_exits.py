"""Exits and difficulty: the oracle, the control, the measures of difficulty, and what the report says."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.experiments import exits
from open_mythos.experiments.exits_report import choices, exits_report, follows
from open_mythos.nn.halting import ACT
from open_mythos.train.config import TrainConfig
from open_mythos.train.data import IGNORE
from open_mythos.train.tasks import Addition


def built(cfg: TrainConfig) -> OpenMythos:
    torch.manual_seed(0)
    model = OpenMythos(dataclasses.replace(cfg.model, dim=32, n_heads=2, n_kv_heads=2, expert_dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


@pytest.mark.parametrize("arm", ["khop, rules", "addition, rules", "khop, ACT, ponder 0.01"])
def test_measured_once_through(arm: str) -> None:
    cfg = exits.arms(True)[arm]
    assert isinstance(cfg.data, exits.KHop | Addition)
    model = built(cfg)
    found = exits.measure(model, cfg.data, 5, 40, 1)
    batch, difficulty = exits.questions(cfg.data, 40, 1)
    asked = batch.labels != IGNORE
    with torch.no_grad():
        right = model(batch.input_ids, 2).argmax(-1) == batch.labels
    assert found["fixed"][1] == pytest.approx(right[asked].double().mean().item())
    levels = difficulty[asked].bincount()
    for point in found["points"]:
        assert 1 <= point["loops"] <= 5
        total = sum(levels[int(n)].item() * loops for n, loops in point["by_difficulty"].items())
        assert total == pytest.approx(point["loops"] * int(levels.sum()))
    if "rules" in arm:
        stays, first = found["points"][:2]
        assert stays["loops"] >= first["loops"]
    if arm == "khop, rules":
        # One question a row and no coda: an oracle is right wherever any depth is.
        assert found["points"][1]["accuracy"] >= max(found["fixed"])


def test_oracles() -> None:
    right = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [1, 1, 0, 1, 1]]).bool()
    assert exits.stays_right(right).tolist() == [2, 1, 1, 3, 3]
    assert exits.first_right(right).tolist() == [2, 1, 1, 1, 3]


def test_dealt_act_at_its_own_depths_is_act() -> None:
    model = built(exits.arms(True)["addition, ACT, ponder 0"])
    assert model.recurrent is not None and model.recurrent.act is not None
    with torch.no_grad():
        model.recurrent.act.halt.weight.normal_()
        ids = exits.questions(Addition(2, 3), 20, 0)[0].input_ids
        own = model(ids, 5, exit=ACT(model.recurrent.act, 0.7), trace=True)
        dealt = model(ids, 5, exit=exits.DealtACT(model.recurrent.act, own.exit_loop + 1), trace=True)
    assert len(own.exit_loop.unique()) > 2
    assert torch.equal(dealt.exit_loop, own.exit_loop)
    torch.testing.assert_close(dealt.logits, own.logits)


def test_carries() -> None:
    task = Addition(2, 3)

    batch = task.encode(np.array([95, 999, 12]), np.array([17, 1 + 100, 34]), np.array([2, 3, 2]))
    chains = exits.carries(batch.input_ids)
    starts, lengths = (5, 7, 5), (3, 4, 3)
    # 95 + 17: 5 + 7 carries into 9 + 1, which carries on. 999 + 101: three in a row. 12 + 34: none.
    want = ([0, 1, 2], [0, 1, 2, 3], [0, 0, 0])
    for row, start, n, expected in zip(chains, starts, lengths, want, strict=True):
        assert row[start : start + n].tolist() == expected
        assert row[:start].sum() == 0


def test_rank_correlation_against_ranks_by_hand() -> None:
    x, y = torch.tensor([1, 2, 2, 5]), torch.tensor([1, 3, 2, 9])
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4.
    a, b = torch.tensor([-1.5, 0, 0, 1.5]), torch.tensor([-1.5, 0.5, -0.5, 1.5])
    assert exits.spearman(x, y) == pytest.approx((a @ b / (a.norm() * b.norm())).item())
    assert exits.spearman(x, -x) == pytest.approx(-1)
    assert exits.spearman(x, torch.ones(4)) is None


def point(rule: str, threshold: float | None, loops: float, accuracy: float, rho: float | None) -> dict[str, Any]:
    by = {"1": loops - 0.1, "2": loops + 0.1}
    return {
        "rule": rule,
        "threshold": threshold,
        "loops": loops,
        "loops_of_all_tokens": loops,
        "accuracy": accuracy,
        "shuffled": accuracy - 0.2 * (rho or 0),
        "rho": rho,
        "shuffled_rho": 0.0,
        "by_difficulty": by,
        "accuracy_by_difficulty": {"1": accuracy, "2": accuracy},
    }


def made_up(sign: float) -> dict[str, Any]:
    results = {}
    for name in exits.arms(True):
        runs = []
        for seed in range(5):
            rho = sign * (0.5 + 0.01 * seed)
            if name.endswith("rules"):
                points = [point("oracle, stays right", None, 2.0, 1.0, 0.9), point("kl", 0.1, 3.0, 0.995, rho)]
                points += [point("kl", 1.0, 2.0, 0.5, rho), point("latent_diff", 0.1, 5.0, 0.9, None)]
            else:
                points = [point("act", 0.9, 3.0, 0.99, rho)]
            runs.append({"fixed": [0.5, 0.9, 1.0], "commonest": 0.1, "points": points})
        results[name] = runs
    return results


def test_report_says_what_the_numbers_say() -> None:
    report = exits_report(made_up(1))
    assert "Depth follows difficulty for kl, ACT" in report.finding
    assert "better than the same depths dealt at random: kl, ACT" in report.finding
    against = exits_report(made_up(-1)).finding
    assert "for no rule" in against and "at random: none" in against
    alone = {name: runs[:1] for name, runs in made_up(1).items()}
    assert "nothing is claimed" in exits_report(alone).finding
    arms = {"rules": made_up(1)["khop, rules"]}
    assert choices(arms)["kl"][0]["threshold"] == 0.1  # the cheaper one costs too much


def test_words_follow_from_intervals() -> None:
    assert follows([0.1, 0.2, 0.15]) == "yes"
    assert follows([-0.1, -0.2, -0.15]) == "the reverse"
    assert follows([-0.1, 0.2, 0.05]) == "not shown"
    assert "no interval" in follows([math.pi])
