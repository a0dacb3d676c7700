"""`generate` of transformers against ours: the same tokens, with a cache, a static one and none."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from open_mythos.hf import MythosCache, MythosForCausalLM
from open_mythos.hf.modeling import CACHE
from open_mythos.model import OpenMythos
from tests.hf.conftest import N, greedy, padded
from tests.models import random_ids, worst

CACHES: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("n_loops", [1, None, 8])
def test_greedy_tokens_are_ours(model: MythosForCausalLM, net: OpenMythos, n_loops: int | None, cache: str) -> None:
    ids = random_ids(net.cfg, 3, 7)
    ours = net.generate(ids, N, n_loops, temperature=0)
    assert torch.equal(greedy(model, ids, n_loops=n_loops, **CACHES[cache]), ours)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_token(
    model: MythosForCausalLM, net: OpenMythos, side: str, cache: str
) -> None:
    ids, mask = padded(side, net)
    prompts = [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
    ours = [answer[-N:] for answer in net.generate(prompts, N, temperature=0)]
    assert greedy(model, ids, attention_mask=mask, **CACHES[cache])[:, -N:].tolist() == ours


def scores(model: MythosForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    out = greedy(model, ids, output_logits=True, return_dict_in_generate=True, **options)
    return torch.stack(out.logits)


def test_a_cache_changes_no_logit(model: MythosForCausalLM, net: OpenMythos) -> None:
    ids, mask = padded("left", net)
    cached, uncached, static = (scores(model, ids, attention_mask=mask, **options) for options in CACHES.values())
    assert worst(cached, uncached) < 1e-5 and worst(static, uncached) < 1e-5


def test_the_cache_is_used(model: MythosForCausalLM, net: OpenMythos, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class with the old argument's name decodes on 5.24 without a cache, and says nothing."""
    widths, run_loop = [], OpenMythos.run_loop

    def recorded(self: OpenMythos, ids: Tensor, *args: Any) -> Any:
        widths.append(ids.shape[1])
        return run_loop(self, ids, *args)

    monkeypatch.setattr(OpenMythos, "run_loop", recorded)
    out = greedy(model, random_ids(net.cfg, 2, 5), return_dict_in_generate=True)
    assert widths == [5] + [1] * (N - 1)
    assert getattr(out, CACHE).get_seq_length() == 5 + N - 1


def test_a_given_cache_continues(model: MythosForCausalLM, net: OpenMythos) -> None:
    ids = random_ids(net.cfg, 2, 9)
    whole, cache = greedy(model, ids), MythosCache()
    model(ids[:, :4], **{CACHE: cache}, use_cache=True)
    assert torch.equal(greedy(model, ids, **{CACHE: cache}), whole)


def test_calls_one_after_another_are_one_call(model: MythosForCausalLM, net: OpenMythos) -> None:
    ids = random_ids(net.cfg, 2, 9)
    with torch.no_grad():
        whole, first = model(ids).logits, model(ids[:, :4])
        rest = model(ids[:, 4:], **{CACHE: getattr(first, CACHE)})
    assert worst(torch.cat((first.logits, rest.logits), dim=1), whole) < 1e-5
