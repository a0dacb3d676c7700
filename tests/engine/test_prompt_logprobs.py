"""Log-probabilities of prompts: those of one call of the model, however the engine cuts, swaps or mixes its work."""

import random
from typing import Any

import pytest
import torch

from open_mythos import LLM, OpenMythos, SamplingParams
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.engine.sequence import Sequence
from open_mythos.tokenization.tokenizer import ByteTokenizer
from tests.engine.mixes import COSTS
from tests.models import CASES, PARTS, scaled, tiny

DEPTHS: list[dict[str, Any]] = [{}, {"n_loops": 2}, {"exit": "latent_diff", "exit_threshold": 0.3}]


def model_of(case: int, dtype: torch.dtype = torch.float32) -> OpenMythos:
    attn_type, part = CASES[case % len(CASES)]
    return scaled(tiny(max_seq_len=256, attn_type=attn_type, **PARTS[part]), seed=case, dtype=dtype)


def answered(engine: Engine, asked: list[tuple[list[int], SamplingParams]]) -> list[Sequence]:
    requests = [engine.add(*each) for each in asked]
    while engine.busy:
        engine.step()
    return requests


@torch.no_grad()
def check(model: OpenMythos, request: Sequence, depth: dict[str, Any]) -> None:
    ids = request.prompt_ids
    expected = model(torch.tensor([ids]), **depth)[0].double().log_softmax(-1)
    assert len(request.prompt_logprobs) == len(request.prompt_top_logprobs) == len(ids) - 1
    for i, (own, best) in enumerate(zip(request.prompt_logprobs, request.prompt_top_logprobs, strict=True)):
        assert own == pytest.approx(expected[i, ids[i + 1]].item(), abs=1e-4)
        assert list(best.values()) == pytest.approx(expected[i].topk(len(best)).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("case", range(0, len(CASES), 5))
def test_scores_are_those_of_the_model(case: int) -> None:
    """In chunks, beside others, with too few pages for all, behind beginnings that could be reused."""
    model, rng = model_of(case), random.Random(case)
    shared = [rng.randrange(53) for _ in range(150)]
    config = EngineConfig(max_rows=3, kv_tokens=190, page_tokens=8, max_prefill_tokens=64)
    engine = Engine(model, config=config, costs=COSTS)
    asked, depths = [], []
    for i, n in enumerate([150, 1, 64, 2, 120, 65]):
        depth = DEPTHS[i % len(DEPTHS)]
        depths.append(depth)
        params = SamplingParams(max_tokens=i % 3 * 5, temperature=0, prompt_logprobs=i % 4, **depth)
        asked.append(([*shared[: n - 1], rng.randrange(53)], params))
    for request, depth in zip(answered(engine, asked), depths, strict=True):
        check(model, request, depth)
        assert (request.finish_reason, request.n_cached) == ("length", 0)
        assert len(request.token_ids) == request.params.max_tokens


def test_bits_are_those_of_the_request_alone() -> None:
    model = model_of(0, torch.float64)
    asked = []
    for i, n in enumerate([90, 7, 33, 64]):
        ids = torch.randint(53, (n,), generator=torch.Generator().manual_seed(i)).tolist()
        penalties = {"frequency_penalty": 0.4, "presence_penalty": -0.3, "logit_bias": {i: 2.0}}
        asked.append((ids, SamplingParams(max_tokens=6, seed=i, logprobs=2, prompt_logprobs=2, **penalties)))
    together = answered(Engine(model, config=EngineConfig(max_rows=4, kv_tokens=500), costs=COSTS), asked)
    for each, request in zip(asked, together, strict=True):
        config = EngineConfig(max_rows=1, kv_tokens=200, max_prefill_tokens=64)
        (alone,) = answered(Engine(model, config=config, costs=COSTS), [each])
        for name in ("prompt_logprobs", "prompt_top_logprobs", "token_ids", "logprobs", "top_logprobs"):
            assert getattr(alone, name) == getattr(request, name), name


def test_a_list_of_prompts_has_them_too() -> None:
    llm = LLM(scaled(tiny(vocab_size=259)), ByteTokenizer())
    params = SamplingParams(max_tokens=2, prompt_logprobs=2, n=2, seed=0)
    scored, single = llm.generate(["so it is", "x"], params, progress=False)
    told = scored.prompt_logprobs
    assert told is not None and told[0] is None and len(told) == 8 and single.prompt_logprobs == [None]
    for token, best in zip(scored.prompt_token_ids[1:], told[1:], strict=True):
        assert best is not None and best[token].decoded_token == chr(token) and len(best) in (2, 3)
    assert llm.generate("so", SamplingParams(max_tokens=1), progress=False)[0].prompt_logprobs is None


def test_a_prompt_alone_may_fill_the_context() -> None:
    model = model_of(0)
    engine = Engine(model, config=EngineConfig(max_rows=1, batch_invariant=False), costs=COSTS)
    (request,) = answered(engine, [([1] * 256, SamplingParams(max_tokens=0, prompt_logprobs=0))])
    assert len(request.prompt_logprobs) == 255 and request.token_ids == []
    with pytest.raises(ValueError, match="the prompt's 257 tokens fill max_seq_len=256"):
        engine.add([1] * 257, SamplingParams(max_tokens=0))
    with pytest.raises(ValueError, match="the prompt's 256 tokens fill max_seq_len=256"):
        engine.add([1] * 256)
