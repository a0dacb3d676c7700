"""Prompts whose tokens leave the loop with their last one: the same next token, and the same answers everywhere."""

import random

import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.nn.halting import HaltingRule, LastDecides
from tests.engine.mixes import COSTS
from tests.models import THRESHOLDS, random_ids, scaled, tiny

NAMES = ("act", "latent_diff", "kl")


def rule_of(model: OpenMythos, name: str) -> HaltingRule:
    rule = model.exit_rule(name, THRESHOLDS.get(name))
    assert rule is not None
    return rule


def deep(seed: int, **fields: int) -> OpenMythos:
    return scaled(tiny(max_loop_iters=8, max_seq_len=128, attn_type=("gqa", "mla")[seed % 2], **fields), seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_coda_the_next_token_is_the_same_after_fewer_loops(name: str) -> None:
    saved = 0
    for seed in range(6):
        model = deep(seed, coda_layers=0)
        rule, ids = rule_of(model, name), random_ids(model.cfg, 3, 9, seed=seed)
        with torch.no_grad():
            (x, own), (y, together) = (
                model.run(ids, model.make_view((3, 9)), 8, each) for each in (rule, LastDecides(rule))
            )
        torch.testing.assert_close(x[:, -1], y[:, -1])
        # Every token leaves at its own loop or with the last one, whichever comes first.
        assert torch.equal(together.loops, torch.minimum(own.loops, own.loops[:, -1:]))
        saved += int((own.loops - together.loops).sum())
    assert saved > 0


@pytest.mark.parametrize("by_config", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_engine_answers_as_generate_does(name: str, by_config: bool) -> None:
    rng = random.Random(name)
    for seed in range(2):
        model = deep(seed)
        rule = LastDecides(rule_of(model, name))
        config = EngineConfig(3, 99, 400, 8, max_prefill_tokens=64, prompts_leave_together=by_config)
        engine = Engine(model, config=config, costs=COSTS)
        shared = [rng.randrange(model.cfg.vocab_size) for _ in range(40)]
        prompts = [shared[: rng.randrange(1, 40)] for _ in range(6)]
        given = {"exit": rule.rule} if by_config else {"exit": rule}
        requests = [engine.add(ids, SamplingParams(max_tokens=7, temperature=0.0, **given)) for ids in prompts]
        while engine.busy:
            engine.step()
        for ids, request in zip(prompts, requests, strict=True):
            tokens, loops = model.generate(ids, 7, temperature=0.0, exit=rule, return_loops=True)
            assert (request.token_ids, request.loops, request.n_cached) == (tokens[len(ids) :], loops, 0)


def test_a_prompt_that_cannot_run_at_once_is_refused() -> None:
    model = deep(0)
    engine = Engine(model, config=EngineConfig(max_prefill_tokens=64), costs=COSTS)
    params = SamplingParams(exit=LastDecides(rule_of(model, "kl")))
    with pytest.raises(ValueError, match=r"the prompt has 65 tokens.*max_prefill_tokens=64"):
        engine.add([1] * 65, params)
    engine.add([1] * 64, params)
