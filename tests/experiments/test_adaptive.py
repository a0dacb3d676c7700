"""The measurement of exits against plain calls, and its control."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.experiments import adaptive
from open_mythos.experiments.study import Lab, perform
from open_mythos.recipes import load_recipe
from open_mythos.reports.document import Table
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import Batch


@pytest.fixture(scope="module")
def model() -> OpenMythos:
    torch.manual_seed(0)
    small = {"dim": 32, "n_heads": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "n_experts": 4, "expert_dim": 16}
    model = OpenMythos(dataclasses.replace(load_recipe("adaptive-text").model, **small)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return model


@pytest.fixture(scope="module")
def batch() -> Batch:
    data = dataclasses.replace(load_recipe("adaptive-text").data, seq_len=24)
    return data.validation_batch(stream(0, 1, Purpose.VALIDATION), 5)


def test_dealt_depths_are_the_ones_that_run(model: OpenMythos, batch: Batch) -> None:
    bits, loops = adaptive.with_exits(model, batch, "kl", 0.01)
    assert bits.shape == loops.shape == (5, 24) and len(loops.unique()) > 2
    # Dealt to the tokens that chose them, the depths give back the rule's own result.
    same_bits, same_loops = adaptive.at_depths(model, batch, loops)
    assert torch.equal(same_loops, loops)
    torch.testing.assert_close(same_bits, bits)
    dealt = adaptive.shuffled(loops, 0)
    assert torch.equal(adaptive.at_depths(model, batch, dealt)[1], dealt)


def test_shuffling_keeps_the_numbers_and_moves_the_tokens() -> None:
    depths = torch.arange(60).view(4, 15) % 8 + 1
    dealt = adaptive.shuffled(depths, 0)
    assert torch.equal(dealt.flatten().bincount(), depths.flatten().bincount())
    assert not torch.equal(dealt, depths)
    assert not torch.equal(dealt, adaptive.shuffled(depths, 1))


def test_kinds_of_bytes() -> None:
    text = torch.tensor([list("A be, \xe9\n1x".encode())])
    kind = adaptive.kinds(Batch(text[:, :-1], text[:, 1:]))[0].tolist()
    # Predicted: blank b e , blank (two bytes of e with an accent) newline 1 x
    assert kind == [2, 0, 1, 3, 2, 0, 1, 2, 3, 0]


def test_what_is_measured_adds_up(model: OpenMythos, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "RULES", {"kl": (0.01,)})
    results = adaptive.measure(model, batch)
    n, (found,) = batch.labels.numel(), results["exits"]
    assert results["tokens"] == sum(found["tokens_by_loops"]) == n
    assert found["loops"] == pytest.approx(sum(i * m for i, m in enumerate(found["tokens_by_loops"], 1)) / n)
    assert [len(x) for x in (results["fixed"], results["fixed"][0], found["bits"], *found["shuffled"])] == [
        8,
        5,
        5,
        5,
        5,
    ]
    for groups in (results["by_exit"], results["by_kind"]):
        assert sum(g["tokens"] for g in groups) == n
        assert sum(g["tokens"] * g["bits"] for g in groups) / n == pytest.approx(np.mean(found["bits"]))
        deepest = sum(g["tokens"] * g["bits_by_depth"][-1] for g in groups) / n
        assert deepest == pytest.approx(np.mean(results["fixed"][-1]))
    assert [g["loops"] for g in results["by_exit"]] == [g["key"] for g in results["by_exit"]]


def made_up(gain: float, seeds: int) -> dict:
    """Numbers of two loops: 3 bits after one, 2 after both; exits at 1.5 by `gain` better than dealt depths."""
    rng = np.random.default_rng(0)
    group = {"key": 2, "tokens": 5, "loops": 2.0, "bits": 2.0, "bits_by_depth": [3.0, 2.0]}
    runs = []
    for seed in range(seeds):
        text = rng.normal(0, 0.1, 40)
        dealt, noise = text + 2.6, rng.normal(0, 0.001, 40)
        point = {"rule": "kl", "threshold": 0.01, "loops": 1.5, "tokens_by_loops": [20, 20]}
        point |= {"bits": list(dealt - gain + noise), "shuffled": [list(dealt), list(dealt)]}
        cfg = {"seed": seed, "steps": 3, "batch_size": 2, "data": {"seq_len": 24}}
        run = {"asked": {"config": cfg}, "train_ce": 1.0, "parameters": 1000, "tokens": 960}
        run |= {"fixed": [list(text + 3), list(text + 2)], "exits": [point]}
        runs.append(run | {"by_exit": [group], "by_kind": [group]})
    return json.loads(json.dumps({"runs": runs}))


@pytest.mark.parametrize(
    ("gain", "verdict", "said"),
    [
        (0.2, "higher", ("1 read text better", "(0 worse), 1 better than one depth for all (0 worse; +0.09")),
        (0.05, "higher", ("1 read text better", "(0 worse), 0 better than one depth for all (1 worse; -0.05")),
        (0.0, "undecided", ("0 read text better", "random (0 worse)")),
        (-0.2, "lower", ("0 read text better", "random (1 worse)")),
    ],
)
def test_the_words_follow_from_the_numbers(gain: float, verdict: str, said: tuple[str, ...]) -> None:
    report = adaptive.EXPERIMENT.report(made_up(gain, 2))
    assert all(text in report.finding for text in said)
    (row,) = next(part.rows for part in report.parts if isinstance(part, Table) and "gain" in part.head)
    assert verdict in row and row[-1] == "40, 40"
    bits, same, dealt = map(float, row[3:6])
    assert (dealt - bits, dealt - same) == pytest.approx((gain, 0.1), abs=2e-3)


def test_the_whole_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(adaptive, "RULES", {"kl": (0.003, 0.01)})
    small = adaptive.recipe(quick=True)
    data = dataclasses.replace(small.data, seq_len=24)
    monkeypatch.setattr(adaptive, "recipe", lambda quick: dataclasses.replace(small, data=data, steps=2))
    report = perform("adaptive", Lab(tmp_path / "runs", True, (0,)), tmp_path / "out", "command")
    assert "at 0.01)" in report.finding or "at 0.003)" in report.finding
    written = json.loads((tmp_path / "out" / "report.json").read_text())["results"]["runs"]
    assert written[0]["tokens"] == 8 * 24 and 4 < written[0]["train_ce"] < 7
    for name in ("exits", "gain"):
        assert (tmp_path / "out" / f"{name}.svg").read_text().startswith("<?xml")
