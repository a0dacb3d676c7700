"""Weights and outputs of open-mythos 0.5.0, recorded once: after conversion this model has to give the same numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from open_mythos import MythosConfig, OpenMythos, convert_open_mythos_0_5
from tests.models import ATTENTIONS, worst

TOLERANCE = 1e-5


class Golden:
    def __init__(self, folder: Path) -> None:
        self.meta = json.loads((folder / "meta.json").read_text())
        self.cfg = MythosConfig(**self.meta["config"])
        self.weights = load_file(folder / "weights.safetensors")
        self.expected = load_file(folder / "expected.safetensors")
        self.ids: Tensor = self.expected["input_ids"]

    def model(self) -> OpenMythos:
        model = OpenMythos(self.cfg).eval()
        model.load_state_dict(convert_open_mythos_0_5(self.weights, self.cfg))
        return model


@pytest.fixture(params=ATTENTIONS)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    return Golden(shared / "golden" / "open-mythos-0.5.0" / request.param)


@torch.no_grad()
def test_logits(golden: Golden) -> None:
    model = golden.model()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["parameters"]
    for n_loops in golden.meta["n_loops"]:
        error = worst(model(golden.ids, n_loops=n_loops), golden.expected[f"logits.n_loops_{n_loops}"])
        print(f"{golden.cfg.attn_type}, {n_loops} loops: logits within {error:.1e}")
        assert error < TOLERANCE


@torch.no_grad()
def test_states_and_halting_probabilities(golden: Golden) -> None:
    model = golden.model()
    states = golden.expected["hidden_trace"]
    trace = model(golden.ids, n_loops=len(states), trace=True)
    errors = [worst(ours, theirs) for ours, theirs in zip(trace.hidden, states, strict=True)]
    print(f"{golden.cfg.attn_type}: states within {max(errors):.1e}")
    assert max(errors) < TOLERANCE
    assert worst(model.recurrent.act(trace.hidden), golden.expected["halt_prob_trace"]) < TOLERANCE
    assert (trace.halt_weight.sum(0) - 1).abs().max() < 1e-6


@torch.no_grad()
def test_cached_decode(golden: Golden) -> None:
    model = golden.model()
    expected = golden.expected["logits.cached_decode"]
    errors = {}
    for n_loops in golden.meta["n_loops"]:
        cache = model.make_cache(*golden.ids.shape, n_loops)
        logits = torch.cat([model(token, cache=cache) for token in golden.ids.split(1, 1)], 1)
        errors[n_loops] = worst(logits, expected)
    print(f"{golden.cfg.attn_type}: cached decode within {max(errors.values()):.1e}")
    assert max(errors.values()) < TOLERANCE


def test_greedy_tokens(golden: Golden) -> None:
    model = golden.model()
    expected = golden.expected["greedy"]
    T = golden.ids.shape[1]
    assert torch.equal(expected[:, :T], golden.ids[:1])
    runs = [
        model.generate(golden.ids[:1], max_new_tokens=expected.shape[1] - T, n_loops=n, temperature=0)
        for n in golden.meta["n_loops"]
    ]
    assert all(torch.equal(run, expected) for run in runs)


@torch.no_grad()
def test_converted_weights_survive_a_folder(golden: Golden, tmp_path: Path) -> None:
    model = golden.model()
    model.save_pretrained(tmp_path)
    assert torch.equal(OpenMythos.from_pretrained(tmp_path)(golden.ids), model(golden.ids))


def test_conversion_keeps_every_value(golden: Golden) -> None:
    dropped = ("freqs_cis", "freqs_cis_mla", "head.weight")
    given = [x.flatten() for name, x in golden.weights.items() if name not in dropped]
    converted = convert_open_mythos_0_5(golden.weights, golden.cfg)
    assert converted.pop("head.weight") is converted["embed.weight"]
    kept = [x.flatten() for x in converted.values()]
    assert torch.equal(torch.cat(kept).sort().values, torch.cat(given).sort().values)


def test_conversion_refuses_what_does_not_fit(golden: Golden) -> None:
    cfg, weights = golden.cfg, golden.weights
    without = {name: x for name, x in weights.items() if name != "recurrent.block.ffn.routed_experts.3.up.weight"}
    more = MythosConfig(**{**cfg.to_dict(), "n_experts": cfg.n_experts + 1})
    fewer = MythosConfig(**{**cfg.to_dict(), "n_experts": cfg.n_experts - 1})
    unshared = MythosConfig(**{**cfg.to_dict(), "n_shared_experts": 0})
    for state, config, named in (
        (without, cfg, "routed_experts.3.up.weight"),
        (weights, more, f"routed_experts.{cfg.n_experts}.gate.weight"),
        (weights, fewer, f"routed_experts.{cfg.n_experts - 1}"),
        (weights, unshared, "shared_experts.0"),
        ({}, cfg, "is not in the state dict"),
    ):
        with pytest.raises(ValueError, match="pass the configuration") as error:
            convert_open_mythos_0_5(state, config)
        assert named in str(error.value)
