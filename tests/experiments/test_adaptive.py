"""The measurement of exits against plain calls, and its control."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from open_mythos import OpenMythos
from open_mythos.experiments import adaptive
from open_mythos.recipes import load_recipe
from open_mythos.train.data import Batch
from open_mythos.train.rng import Purpose, stream


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


def bits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") / torch.log(torch.tensor(2.0))


def test_bits_by_depth_are_those_of_separate_calls(model: OpenMythos, batch: Batch) -> None:
    by_depth = adaptive.by_depth(model, batch)
    assert by_depth.shape == (8, 5, 24)
    with torch.no_grad():
        for n in (1, 3, 8):
            torch.testing.assert_close(by_depth[n - 1], bits(model(batch.input_ids, n), batch.labels))


def test_dealt_depths_are_the_ones_that_run(model: OpenMythos, batch: Batch) -> None:
    own = adaptive.with_exits(model, batch, "kl", 0.01)
    assert len(own.loops.unique()) > 2
    # Dealt to the tokens that chose them, the depths give back the rule's own result.
    same = adaptive.at_depths(model, batch, own.loops)
    assert torch.equal(same.loops, own.loops)
    torch.testing.assert_close(same.bits, own.bits)
    dealt = adaptive.shuffled(own.loops, 0)
    assert torch.equal(adaptive.at_depths(model, batch, dealt).loops, dealt)


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
    n = batch.labels.numel()
    (found,) = results["exits"]
    assert sum(found["tokens_by_loops"]) == n
    assert found["loops"] == pytest.approx(sum(i * m for i, m in enumerate(found["tokens_by_loops"], 1)) / n)
    for groups in (results["by_exit"], results["by_kind"]):
        assert sum(g["tokens"] for g in groups) == n
        assert sum(g["tokens"] * g["bits"] for g in groups) / n == pytest.approx(found["bpb"])
        deepest = sum(g["tokens"] * g["bits_by_depth"][-1] for g in groups) / n
        assert deepest == pytest.approx(results["fixed_bpb"][-1])
    assert [g["loops"] for g in results["by_exit"]] == [g["key"] for g in results["by_exit"]]
    assert found["gain"] == pytest.approx(
        sum(found["shuffled_bpb"]) / len(found["shuffled_bpb"]) - found["bpb"], abs=1e-6
    )
