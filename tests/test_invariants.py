"""Cached, chunked, padded and batched calls give what one full forward pass gives, tokens exiting at different loops.

Each case runs in float64, where the ways must agree to rounding, and in float32, where they must agree to 1e-5 of the
logits' scale. The cases' decisions are further from a tie than that, which is checked.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import OpenMythos
from tests.models import ATTENTIONS, CASES, PARTS, RULES, THRESHOLDS, random_ids, scaled, tiny, worst
from tests.reference import Oracle

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
T, MAX_LOOPS = 8, 4
RULE_CASES = [
    # Every part with one rule and one part with every rule; all pairs in the slow tier.
    pytest.param(*case, exit, marks=() if case[1] == "default" or (i + j) % len(RULES) == 0 else pytest.mark.slow)
    for i, case in enumerate(CASES)
    for j, exit in enumerate(RULES)
]


def options(exit: str | None) -> dict[str, Any]:
    return {"exit": exit, "exit_threshold": THRESHOLDS.get(exit or "")}


def in_chunks(model: OpenMythos, ids: Tensor, n_loops: int, sizes: list[int], levels: int, **kwargs: Any) -> Tensor:
    """The logits of a cache fed `sizes` tokens at a time."""
    mask = kwargs.pop("attention_mask", None)
    cache = model.make_cache(ids.shape[0], ids.shape[1], levels)
    out = []
    for chunk in zip(
        ids.split(sizes, 1), mask.split(sizes, 1) if mask is not None else [None] * len(sizes), strict=True
    ):
        out.append(model(chunk[0], n_loops, cache=cache, attention_mask=chunk[1], **kwargs))
    assert cache.length == ids.shape[1]
    return torch.cat(out, 1)


def margin(model: OpenMythos, row: Tensor, n_loops: int, exit: str | None) -> tuple[float, list[int]]:
    """How near the row's decisions come to a tie, and the loops of its tokens."""
    oracle = Oracle(model.double(), n_loops, exit, THRESHOLDS.get(exit or ""))
    loops = [token.loops for token in oracle.run(row.tolist())]
    return oracle.margin, loops


def left_pad(rows: list[Tensor], junk: int = 1) -> tuple[Tensor, Tensor]:
    """One batch of rows of different lengths; padding holds an id that must not matter."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), junk)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return ids, mask


@pytest.mark.parametrize(("attn_type", "part", "exit"), RULE_CASES)
@torch.no_grad()
def test_every_way_to_feed_a_prompt(attn_type: str, part: str, exit: str | None) -> None:
    cfg = tiny(attn_type=attn_type, **PARTS[part])
    n_loops = 6
    for dtype, tolerance in TOLERANCE.items():
        model, ids = scaled(cfg, dtype=dtype), random_ids(cfg, 2, T, seed=3)
        full = model(ids, n_loops, **options(exit))
        errors = []
        # The arithmetic of a split is the same in float32; a few show its rounding.
        for split in range(1, T) if dtype == torch.float64 else (1, T // 2):
            chunked = in_chunks(model, ids, n_loops, [split, T - split], n_loops, **options(exit))
            errors.append(worst(chunked, full))
        for sizes, levels in (([1] * T, n_loops), ([1] * T, n_loops + 2), ([3, 1, 4], n_loops)):
            errors.append(worst(in_chunks(model, ids, n_loops, sizes, levels, **options(exit)), full))
        padded, mask = left_pad([ids[0], ids[1, :4], ids[1, :1], ids[1]])
        together = model(padded, n_loops, attention_mask=mask, **options(exit))
        cached = in_chunks(model, padded, n_loops, [5, 2, 1], n_loops, attention_mask=mask, **options(exit))
        for logits in (together, cached):
            for row, source, length in ((0, 0, T), (1, 1, 4), (2, 1, 1), (3, 1, T)):
                errors.append(worst(logits[row, T - length :], full[source, :length]))
        print(f"largest difference in {dtype}: {max(errors):.1e} of the logits' scale")
        assert max(errors) < tolerance, errors
    assert min(margin(model, row, n_loops, exit)[0] for row in ids) > 1e-5, "too near a tie: take another seed"


@pytest.mark.parametrize("n_loops", [1, MAX_LOOPS - 1, MAX_LOOPS, MAX_LOOPS + 1, 3 * MAX_LOOPS])
@pytest.mark.parametrize("exit", RULES)
@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_every_depth(attn_type: str, exit: str | None, n_loops: int) -> None:
    """Below, at and above max_loop_iters; with as many cache levels as loops, and with more."""
    cfg = tiny(attn_type=attn_type, injection="diagonal")
    for dtype, tolerance in TOLERANCE.items():
        model, ids = scaled(cfg, seed=5, dtype=dtype), random_ids(cfg, 2, T, seed=1)
        full = model(ids, n_loops, **options(exit))
        for sizes, levels in (([1] * T, n_loops + 3), ([4, T - 4], n_loops)):
            assert worst(in_chunks(model, ids, n_loops, sizes, levels, **options(exit)), full) < tolerance
    near, loops = zip(*(margin(model, row, n_loops, exit) for row in ids), strict=True)
    assert min(near) > 1e-5, "too near a tie: take another seed"
    if exit != "fixed" and n_loops == 3 * MAX_LOOPS:
        assert any(len(set(row)) > 1 for row in loops), "tokens of one row must exit at different loops"


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_depth_may_change_from_call_to_call(attn_type: str) -> None:
    """A call with fewer loops fills forward: later, deeper tokens see its last loop, as if it had exited there."""
    cfg = tiny(attn_type=attn_type, halting="none")
    model = scaled(cfg, dtype=torch.float64)
    ids, depths = random_ids(cfg, 1, T), [2, 5, 1, 5, 3, 1, 5, 4]
    cache, oracle = model.make_cache(1, T, 5), Oracle(model, 5)
    for i, depth in enumerate(depths):
        logits = model(ids[:, i : i + 1], depth, cache=cache)
        oracle.n_loops = depth
        assert worst(logits[0, 0], oracle.push(int(ids[0, i])).logits) < 1e-12


@pytest.mark.parametrize("state", ["e", "zero", "normal"])
@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_noise_depends_on_row_and_position_only(attn_type: str, state: str) -> None:
    cfg = tiny(attn_type=attn_type, initial_state=state)
    model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 3, T)
    full = model(ids, 5)
    assert torch.equal(model(ids, 5), full)
    for sizes in ([1] * T, [4, T - 4]):
        assert worst(in_chunks(model, ids, 5, sizes, 5), full) < 1e-12
    padded, mask = left_pad([ids[0, :3], ids[1]])
    assert worst(model(padded, 5, attention_mask=mask)[0, -3:], full[0, :3]) < 1e-12
    drawn = [model(ids, 5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2]) == (state != "normal")


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_rows_at_different_loops_share_a_cache(attn_type: str) -> None:
    """One loop of an engine: rows at different loops, one of them exited, write and read what each would alone."""
    cfg = tiny(attn_type=attn_type)
    model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 4, 5)
    loop_index, active = torch.tensor([2, 0, 1, 3]), torch.tensor([True, True, True, False])[:, None]
    h, e = torch.randn(2, 4, 1, cfg.dim, dtype=torch.float64)

    def loop(rows: slice) -> tuple[Tensor, list[Tensor]]:
        n = len(ids[rows])
        cache = model.make_cache(n, 6, 4)
        model(ids[rows], cache=cache)
        for store in cache.layers[1]:
            # What the new token left at its earlier loops.
            store[:, :, 5] = torch.arange(1.0, 5).double().view(4, *[1] * (store.ndim - 2))
        view = dataclasses.replace(model.make_view((n, 1), cache=cache), active=active[rows])
        out = model.recur(h[rows], e[rows], loop_index[rows], view)
        return out, [store[loop_index[rows], torch.arange(n)] for store in cache.layers[1]]

    together, written = loop(slice(0, 4))
    for row in range(4):
        alone, alone_written = loop(slice(row, row + 1))
        assert worst(together[row], alone[0]) < 1e-13
        assert all(worst(a[row], b[0]) < 1e-13 for a, b in zip(written, alone_written, strict=True))
    # The exited row shows its level 2 at level 3.
    assert all((store[3, 5] == 3).all() for store in written)


@torch.no_grad()
def test_padding_may_stand_anywhere() -> None:
    for attn_type in ATTENTIONS:
        cfg = tiny(attn_type=attn_type)
        model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 1, 12)
        keep = torch.tensor([0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0], dtype=torch.bool)
        short = model(ids[:, keep], 5)
        assert worst(model(ids, 5, attention_mask=keep[None])[:, keep], short) < 1e-12
        cached = in_chunks(model, ids, 5, [2, 1, 4, 5], 5, attention_mask=keep[None])
        assert worst(cached[:, keep], short) < 1e-12
        trace = model(ids, 5, attention_mask=keep[None], trace=True)
        assert (trace.exit_loop[0, ~keep] == -1).all() and (trace.exit_loop[0, keep] >= 0).all()


@torch.no_grad()
def test_nothing_leaks_from_unused_slots() -> None:
    """A NaN in a slot that no query may see must not reach an answer, and neither may a neighbour's NaN."""
    for attn_type in ATTENTIONS:
        cfg = tiny(attn_type=attn_type)
        model, ids = scaled(cfg), random_ids(cfg, 2, T)
        full = model(ids, 5)
        cache = model.make_cache(2, 2 * T, 5)
        for store in (x for layer in cache.layers for x in layer):
            store.fill_(torch.nan)
        got = torch.cat([model(chunk, cache=cache) for chunk in ids.split(4, 1)], 1)
        assert worst(got, full) < 1e-5


@torch.no_grad()
def test_dropped_rows_leave_the_others_as_they_were() -> None:
    for attn_type in ATTENTIONS:
        cfg = tiny(attn_type=attn_type, initial_state="normal")
        model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 4, T)
        seeds = torch.Generator().manual_seed(0)
        cache = model.make_cache(4, T, 5)
        first = model(ids[:, :5], cache=cache, generator=seeds)
        keep = torch.tensor([3, 1])
        cache.keep_rows(keep)
        rest = model(ids[keep, 5:], cache=cache)
        full = model(ids, 5, generator=torch.Generator().manual_seed(0))
        assert worst(first, full[:, :5]) < 1e-12
        assert worst(rest, full[keep, 5:]) < 1e-12


@torch.no_grad()
def test_cache_size_is_what_attention_keeps() -> None:
    """The bytes of a cache are those of its definition: mla keeps one latent and one rotary key per token and level."""
    for attn_type, per_token in (("gqa", 2 * 2 * 8), ("mla", 12 + 8)):
        cfg = tiny(attn_type=attn_type, recurrent_layers=2)
        cache = scaled(cfg).make_cache(3, 11, 7)
        assert cache.nbytes == 4 * 3 * 11 * per_token * (1 + 2 * 7 + 1)


@torch.no_grad()
def test_last_only_is_the_last_position() -> None:
    cfg = tiny()
    model, ids = scaled(cfg), random_ids(cfg, 2, T)
    assert worst(model(ids, last_only=True), model(ids)[:, -1:]) < 1e-6
