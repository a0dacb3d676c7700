"""The measurement of exits against plain calls, and its control."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.experiments import adaptive
from open_mythos.experiments.given_depths import shuffled, with_exits
from open_mythos.experiments.study import Lab, Run
from open_mythos.recipes import load_recipe
from open_mythos.reports.stats import token_bits
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


def test_what_is_measured_adds_up(model: OpenMythos, tmp_path: Path) -> None:
    (tmp_path / "run-0").mkdir()
    (tmp_path / "run-0" / "metrics.jsonl").write_text('{"step": 1, "train/ce": 5.5}\n')
    cfg = load_recipe("adaptive-text")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seq_len=24))
    batch = cfg.data.validation_batch(stream(0, 1, Purpose.VALIDATION), 5)
    settings = {"rows": 5, "rules": {"kl": (0.01,)}, "shuffles": 2}
    run = Run("run", cfg, 0, settings, Lab(tmp_path, True, (0,)))
    vars(run)["model"] = model  # instead of one that is trained
    results = adaptive.measure(run)
    assert results["train_ce"] == 5.5
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
    report = adaptive.STUDY.report(made_up(gain, 2))
    assert all(text in report.finding for text in said)
    table = next(part for part in report.parts if isinstance(part, str) and "| kl |" in part)
    row = table.splitlines()[-1].strip("| ").split(" | ")
    assert verdict in row and row[-1] == "40, 40"
    bits, same, control = map(float, row[3:6])
    assert (control - bits, control - same) == pytest.approx((gain, 0.1), abs=2e-3)
