"""An engine stores weights as products of a few rows are fastest, and a model's values, shapes and folder stay."""

from pathlib import Path

import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.engine import calibration
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.generation.sampling_params import SamplingParams
from tests.engine.mixes import COSTS
from tests.engine.test_bits import WIDE, check
from tests.models import random_ids, scaled, tiny
from tests.nn.test_lean_steps import Operations

WITH_EXPERTS = {"dim": 256, "n_heads": 4, "n_kv_heads": 2, "expert_dim": 256, "n_experts": 16}


@pytest.fixture(params=[0.9, 2.0], ids=["as they are", "transposed"])
def transposed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A machine on which transposed weights are slower, or faster."""
    monkeypatch.setattr(calibration, "transposed_gain", lambda n_threads: request.param)
    return request.param > 1


def test_only_the_place_in_memory_changes(transposed: bool, tmp_path: Path) -> None:
    model = scaled(tiny(**WITH_EXPERTS), dtype=torch.float32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    Engine(model, config=EngineConfig(max_rows=2, kv_tokens=64), costs=COSTS)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())
    experts = model.recurrent.block.ffn.experts
    for weight in (model.recurrent.block.attn.wo.weight, experts.gate_up, experts.down):
        assert weight.is_contiguous() != transposed and weight.mT.is_contiguous() == transposed
    assert model.embed.weight.is_contiguous() and model.head.weight is model.embed.weight
    model.save_pretrained(tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in OpenMythos.from_pretrained(tmp_path).state_dict().items())


def test_weights_go_on_learning(transposed: bool) -> None:
    model = scaled(tiny(**WITH_EXPERTS), dtype=torch.float32)
    Engine(model, config=EngineConfig(max_rows=2, kv_tokens=64), costs=COSTS)
    model.train()(random_ids(model.cfg, 2, 5)).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_experts_that_are_one_matrix_stay(transposed: bool) -> None:
    model = scaled(tiny(), dtype=torch.float32)
    Engine(model, config=EngineConfig(max_rows=2, kv_tokens=64), costs=COSTS)
    assert model.recurrent.block.ffn.experts.gate_up.is_contiguous()


def test_bits(transposed: bool) -> None:
    assert check(range(5, 20, 7), torch.float32, n_requests=9, **WIDE)["tokens"] > 0


def test_a_loop_dispatches_few_operations() -> None:
    model = scaled(tiny(**WITH_EXPERTS), dtype=torch.float32)
    engine = Engine(model, config=EngineConfig(max_rows=1, kv_tokens=64), costs=COSTS)
    engine.add([1, 2, 3], SamplingParams(max_tokens=3, exit="fixed"))
    while engine.runner.n_looping.sum() != 1 or engine.scheduler.looping[0].loop != 1:
        engine.step()
    with torch.inference_mode(), Operations() as loop:
        engine.step()
    assert loop.counts.total() <= 140, loop.counts.most_common()
