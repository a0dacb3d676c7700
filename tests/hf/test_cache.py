"""The cache by itself: it grows, changes its rows, and forgets."""

import pytest
import torch

pytest.importorskip("transformers")

from open_mythos.hf import MythosCache, MythosForCausalLM
from open_mythos.model import OpenMythos
from tests.hf.conftest import padded
from tests.models import worst


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_rows_are_repeated_chosen_and_ordered(model: MythosForCausalLM, net: OpenMythos, static: bool) -> None:
    ids, mask = padded("left", net)
    cache = MythosCache(7, static)
    model(ids[:, :4], attention_mask=mask[:, :4], cache=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 2]))
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    rows = torch.tensor([0, 2, 1])
    assert (cache.batch_size, cache.get_seq_length()) == (3, 4)
    rest = model(ids[rows, 4:], attention_mask=mask[rows], cache=cache).logits
    whole = model(ids, attention_mask=mask).logits[rows, 4:]
    assert worst(rest[mask[rows, 4:].bool()], whole[mask[rows, 4:].bool()]) < 1e-5


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_what_is_cropped_is_forgotten(model: MythosForCausalLM, net: OpenMythos, static: bool) -> None:
    ids, mask = padded("left", net)
    cache = MythosCache(12, static)
    model(ids, attention_mask=mask, cache=cache)
    cache.crop(-3)
    again = model(ids[:, 4:], attention_mask=mask, cache=cache).logits
    whole = model(ids, attention_mask=mask).logits[:, 4:]
    assert worst(again[mask[:, 4:].bool()], whole[mask[:, 4:].bool()]) < 1e-5
    cache.reset()
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_a_short_cache_grows_and_a_static_one_does_not(model: MythosForCausalLM, net: OpenMythos) -> None:
    ids, mask = padded("right", net)
    grown, static = MythosCache(2), MythosCache(4, static=True)
    steps = [model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=grown).logits for i in range(7)]
    whole = model(ids, attention_mask=mask).logits
    assert worst(torch.cat(steps, dim=1)[mask.bool()], whole[mask.bool()]) < 1e-5
    with pytest.raises(ValueError, match="holds 4 of max_len=4 tokens"):
        [model(ids[:, i : i + 1], cache=static) for i in range(7)]
