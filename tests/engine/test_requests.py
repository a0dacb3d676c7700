"""Options of requests, and refusals before a request waits."""

from typing import Any

import pytest

from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.engine.sequence import Sequence
from open_mythos.generation.sampling_params import SamplingParams
from tests.engine.mixes import COSTS
from tests.models import scaled, tiny


def engine_of(**changes: Any) -> Engine:
    config = EngineConfig(max_rows=2, kv_tokens=100, batch_invariant=False)
    return Engine(scaled(tiny(**changes)), config=config, costs=COSTS)


def answered(engine: Engine, prompt: list[int], params: SamplingParams) -> Sequence:
    request = engine.add(prompt, params)
    while engine.busy:
        engine.step()
    return request


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"stop": None}, TypeError, r"stop=None must be a list; use stop=\['.'\], or leave it out"),
        ({"stop": 5}, TypeError, "stop=5 must be a list"),
        ({"stop": ["a", 5]}, TypeError, "stop=5 must be a string"),
        ({"stop": ""}, ValueError, "would end every answer at once"),
        ({"stop": ["a", ""]}, ValueError, "would end every answer at once"),
        ({"stop_token_ids": None}, TypeError, r"stop_token_ids=None must be a list; use stop_token_ids=\[0\]"),
        ({"stop_token_ids": 3}, TypeError, "stop_token_ids=3 must be a list"),
        ({"stop_token_ids": [-1]}, ValueError, "stop_token_ids=-1"),
        ({"ignore_eos": "no"}, TypeError, "ignore_eos='no' must be bool"),
        ({"seed": 2**63}, ValueError, "seed=9223372036854775808"),
        ({"logprobs": 21}, ValueError, "logprobs=21"),
        ({"n": 0}, ValueError, "n=0"),
        (
            {"temperature": 10**400},
            ValueError,
            r"temperature=\(an integer of about 401 digits\) must be a finite number",
        ),
        ({"repetition_penalty": 10**400}, ValueError, r"repetition_penalty=\(an integer of about 401 digits"),
        ({"max_tokens": -1}, ValueError, "max_tokens=-1"),
        ({"prompt_logprobs": 21}, ValueError, "prompt_logprobs=21"),
        ({"presence_penalty": 2.1}, ValueError, "presence_penalty=2.1"),
        ({"frequency_penalty": True}, TypeError, "frequency_penalty=True"),
        ({"logit_bias": {1: 101}}, ValueError, r"logit_bias\[1\]=101 must be .* at most 100"),
        ({"logit_bias": {"1": 1}}, TypeError, "logit_bias='1' must be int"),
        ({"logit_bias": [50]}, TypeError, r"logit_bias=\[50\] must map ids to numbers; use a mapping"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, ValueError, "logit_bias has 1025 entries, at most 1024"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        SamplingParams(**fields)


def test_params_stay_what_was_checked() -> None:
    words, ids = ["a"], [1]
    params = SamplingParams(stop=words, stop_token_ids=ids, seed=2**63 - 1)
    words.append("")
    ids.append(-1)
    assert (params.stop_strings, params.stop_token_ids) == (("a",), (1,))
    assert hash(params) == hash(SamplingParams(stop=("a",), stop_token_ids=(1,), seed=2**63 - 1))
    assert SamplingParams(stop_token_ids=(i for i in [1, 2])).stop_token_ids == (1, 2)  # ty: ignore[invalid-argument-type]
    assert SamplingParams(stop="END").stop_strings == ("END",)


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"exit": ""}, ValueError, "exit='' must be one of"),
        ({"exit": 0}, TypeError, "exit=0 must be one of"),
        ({"exit": ["kl"]}, TypeError, r"exit=\['kl'\] must be one of"),
        ({"exit": "kl", "exit_threshold": [1]}, TypeError, r"exit_threshold=\[1\] must be a finite number"),
        ({"exit_threshold": 0.1}, ValueError, "exit_threshold=0.1 needs a rule"),
        (
            {"exit": "latent_diff", "exit_threshold": 10**400},
            ValueError,
            r"exit_threshold=\(an integer of about 401 digits",
        ),
        ({"min_loops": 5}, ValueError, "min_loops=5 must be between 1 and 4"),
        ({"n_loops": 4097}, ValueError, "n_loops=4097"),
        ({"stop": "a"}, ValueError, "needs a tokenizer"),
        ({"stop_token_ids": [53]}, ValueError, "stop_token_ids=53"),
        ({"logit_bias": {53: 1}}, ValueError, "logit_bias=53 must be between 0 and 52"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(fields: dict[str, Any], error: type[Exception], told: str) -> None:
    engine = engine_of()
    with pytest.raises(error, match=told):
        engine.add([1], SamplingParams(**fields))
    assert not engine.busy


@pytest.mark.parametrize(
    ("prompt", "error", "told"),
    [
        ([53], ValueError, "prompt: the id=53 must be between 0 and 52"),
        ([1, -1], ValueError, "prompt: the id=-1"),
        ([2**70], ValueError, "prompt: the id=1180591620717411303424"),
        ([True], TypeError, "prompt="),
        ([], ValueError, "the prompt is empty"),
        ("a", ValueError, "needs a tokenizer"),
    ],
)
def test_prompts_that_are_none_are_refused(prompt: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        engine_of().add(prompt)


@pytest.mark.parametrize("fields", [{"exit": "kl"}, {"exit_threshold": 0.1}, {"min_loops": 1}, {"n_loops": 1}], ids=str)
def test_a_plain_transformer_has_no_depth_to_ask_for(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))}="):
        engine_of(recurrent_layers=0).add([1], SamplingParams(**fields))


def test_fewer_loops_than_the_models_fewest_are_what_is_asked_for() -> None:
    """As in `generate`; `min_loops` is refused only where a request itself contradicts it."""
    engine = engine_of(min_loops=3)
    request = answered(engine, [1, 2], SamplingParams(temperature=0, max_tokens=4, n_loops=2))
    expected, loops = engine.model.generate([1, 2], 4, 2, 0, return_loops=True)
    assert ([1, 2, *request.token_ids], request.loops) == (expected, loops)


def test_rules_are_shared_and_forgotten() -> None:
    """Requests of one rule stand together in the loop; one that nobody asks for any more takes no room."""
    engine = engine_of()
    params = [SamplingParams(exit="kl", exit_threshold=0.01 + i / 1000, max_tokens=2) for i in (0, 0, 1)]
    rules = [engine.add([1], each).rule for each in params]
    assert rules[0] is rules[1] is not rules[2]
    assert len(engine.rules) == 2
    del rules
    while engine.busy:
        engine.step()
    assert len(engine.rules) == 0


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"max_queue": 0}, ValueError, "max_queue=0 must be between 1"),
        ({"page_tokens": 16.0}, TypeError, "page_tokens=16.0 must be int"),
        ({"page_tokens": 24}, ValueError, "page_tokens=24 must be 8, 16, 32 or 64"),
        ({"page_tokens": 128}, ValueError, "page_tokens=128"),
        ({"max_rows": 0}, ValueError, "max_rows=0"),
        ({"kv_tokens": 0}, ValueError, "kv_tokens=0"),
        ({"max_prefill_tokens": 63}, ValueError, "max_prefill_tokens=63"),
        ({"prefix_reuse": 1}, TypeError, "prefix_reuse=1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        EngineConfig(**fields)


@pytest.mark.parametrize(("max_rows", "kv_tokens"), [(1, 1), (2, 1), (2, 24)])
def test_the_least_memory_serves(max_rows: int, kv_tokens: int) -> None:
    config = EngineConfig(max_rows=max_rows, kv_tokens=kv_tokens, page_tokens=8)
    engine = Engine(scaled(tiny()), config=config, costs=COSTS)
    assert engine.invariant
    request = answered(engine, [1, 2], SamplingParams(temperature=0, max_tokens=4))
    assert [1, 2, *request.token_ids] == engine.model.generate([1, 2], 4, temperature=0)
