"""The engine's answers are those of `generate` on one request alone, whatever else it does at the same time."""

import random
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import OpenMythos
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.nn.halting import KL, Decision, HaltingRule, LatentDiff, SecondDifference, State
from tests.engine.mixes import COSTS, Load, alone, carry_out, random_load
from tests.models import CASES, PARTS, scaled, tiny, worst

FAST, ALL = 70, 1000


@cache
def model_of(case: int, dtype: torch.dtype) -> OpenMythos:
    attn_type, part = CASES[case % len(CASES)]
    return scaled(tiny(max_seq_len=256, attn_type=attn_type, **PARTS[part]), seed=case, dtype=dtype)


def check(seeds: range, dtype: torch.dtype, n_requests: int = 7) -> dict[str, int]:
    """Carry out random loads; counts of what happened in them."""
    seen = dict.fromkeys(("requests", "tokens", "cancelled", "preempted", "reused", "early", "largest"), 0)
    for seed in seeds:
        model = model_of(seed, dtype)
        compare(model, random_load(random.Random(seed), model, n_requests), seen, seed)
    print(seen)
    return seen


def compare(model: OpenMythos, load: Load, seen: dict[str, int], seed: int) -> None:
    outcome = carry_out(model, load)
    for (_, prompt, params), request in zip(load.requests, outcome.requests, strict=True):
        tokens, loops = alone(model, prompt, params)
        n = len(request.token_ids)
        if request.finish_reason == "abort":
            seen["cancelled"] += 1
        else:
            assert n == len(tokens), (seed, request.id)
        assert request.token_ids == tokens[:n], (seed, request.id)
        assert request.loops == loops[:n], (seed, request.id)
        seen["requests"] += 1
        seen["tokens"] += n
        seen["reused"] += request.n_cached
        seen["early"] += sum(k < (params.n_loops or model.cfg.max_loop_iters) for k in loops[:n])
    seen["preempted"] += outcome.n_preempted
    seen["largest"] = max(seen["largest"], outcome.n_most)


def test_random_mixes() -> None:
    # In float64, where no decision is as near to a tie as rounding.
    seen = check(range(FAST), torch.float64, n_requests=4)
    assert min(seen.values()) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_random_mixes(dtype: torch.dtype) -> None:
    seen = check(range(FAST, FAST + ALL), dtype)
    assert min(seen.values()) >= 7


RARE: list[dict[str, Any]] = [
    {"initial_state": "normal", "recurrent_layers": 2},
    {"recurrent_layers": 0},
    {"prelude_layers": 0, "coda_layers": 0, "attn_type": "mla"},
]


@pytest.mark.parametrize("part", RARE, ids=str)
def test_rare_parts_and_rules_given_as_objects(part: dict[str, Any]) -> None:
    """Several requests share a rule object, by which beginnings are found again too."""
    model, seen = scaled(tiny(max_seq_len=256, **part), dtype=torch.float64), Counter[str]()
    rules = [LatentDiff(0.3), LatentDiff(0.3, min_loops=3), SecondDifference(0.5), KL(0.03, 2, model.cfg.vocab_size)]
    for seed, rule in enumerate(rules):
        rng = random.Random(seed)
        load = random_load(rng, model, 5)
        load.config = replace(load.config, prefix_reuse=True, kv_tokens=300)
        exit = None if model.recurrent is None else rule
        for i, (step, prompt, params) in enumerate(load.requests):
            changed = replace(params, exit=exit, exit_threshold=None, n_loops=None, min_p=rng.choice([0.0, 0.1]))
            load.requests[i] = step, prompt, changed
        compare(model, load, seen, seed)
    assert seen["reused"] and (seen["early"] or model.recurrent is None)


class Certainty(HaltingRule):
    """Weighs each state by how sure its prediction is."""

    needs_probe = weighted = True

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        return {"sure": torch.zeros(h.shape[:2], dtype=h.dtype)}

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        assert probe is not None
        sure = probe.softmax(-1).amax(-1)
        return {"sure": sure}, sure > self.threshold

    def weigh(self, before: State, after: State, exit_mask: Tensor) -> Tensor:
        return after["sure"]


def test_a_rule_of_ones_own_sees_its_own_token_only() -> None:
    """At the last loop too, where a neighbour under the same rule may be at another."""
    model, rule = model_of(0, torch.float64), Certainty(0.9)
    engine = Engine(model, config=EngineConfig(max_rows=4, kv_tokens=400, batch_invariant=False), costs=COSTS)
    requests = {}
    for n_loops in (2, 3, 4, 7):
        params = SamplingParams(temperature=0, max_tokens=12, n_loops=n_loops, exit=rule)
        requests[n_loops] = engine.add([5, n_loops, 3], params)
        engine.step()
    while engine.busy:
        engine.step()
    for n_loops, request in requests.items():
        expected, loops = model.generate([5, n_loops, 3], 12, n_loops, 0, exit=rule, return_loops=True)
        assert ([5, n_loops, 3, *request.token_ids], request.loops) == (expected, loops)


@pytest.mark.parametrize("case", range(0, len(CASES), 3))
def test_logits_are_those_of_the_model(case: int) -> None:
    model, rng = model_of(case, torch.float32), random.Random(case)
    load = random_load(rng, model)
    outcome = carry_out(model, load)
    for (_, prompt, params), request in zip(load.requests, outcome.requests, strict=True):
        for i, logits in enumerate(outcome.logits.get(request.id, [])):
            ids = torch.tensor([prompt + request.token_ids[:i]])
            with torch.no_grad():
                expected = model(ids, params.n_loops, exit=params.exit, exit_threshold=params.exit_threshold)
            assert worst(logits, expected[0, -1]) < 1e-5
