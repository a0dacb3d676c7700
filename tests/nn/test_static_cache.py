"""Calls at fixed depth wait for nothing, and with a static cache they can be captured; the results stay the same.

A model on the meta device has no values: whatever asks for one, or for a shape that depends on one, is an error there.
It takes the code paths of a GPU, so a call that passes has nothing in it that a GPU would make the host wait for.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos import KVCache, LoopPlan, MythosConfig, OpenMythos
from open_mythos.nn.static_cache import StaticKVCache
from tests.models import ATTENTIONS, PARTS, THRESHOLDS, random_ids, scaled, tiny, worst

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "repeat_interleave.Tensor")
T = 6


class Ops(TorchDispatchMode):
    """The names of the operators that run inside, with the shapes of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.append((str(func), tuple(out.shape) if isinstance(out, Tensor) else None))
        return out

    def waits(self) -> list[str]:
        return [name for name, _ in self.seen if any(wait in name for wait in WAITS)]


def on_meta(cfg: MythosConfig) -> OpenMythos:
    with torch.device("meta"):
        return OpenMythos(cfg).to(torch.bfloat16)


def aligned(**changes: Any) -> MythosConfig:
    """Widths that the grouped product takes: multiples of 16 bytes."""
    return tiny(**{"halting": "none", "expert_dim": 16, **changes})


@pytest.mark.parametrize("part", ["default", "diagonal", "two-layers"])
@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_fixed_depth_waits_for_nothing(attn_type: str, part: str) -> None:
    """Forward, prefill, decode, and training with its backward pass."""
    cfg = aligned(attn_type=attn_type, **PARTS[part])
    model = on_meta(cfg)
    ids = torch.zeros(2, T, dtype=torch.int64, device="meta")
    with Ops() as ops:
        with torch.no_grad():
            model.eval()(ids, 5)
            model(ids, 5, attention_mask=torch.ones_like(ids))
            for static in (False, True):
                cache = model.make_cache(2, 2 * T, 6, static=static)
                for n in (T, 1, 1):
                    model(ids[:, :n], 5, cache=cache)
        model.train()
        for plan in (LoopPlan((5, 5)), LoopPlan((3, 5), 2)):
            out = model(ids, plan=plan)
            loss = out.logits.sum() if out.router_z_loss is None else out.logits.sum() + out.router_z_loss
            loss.backward()
    assert len(ops.seen) > 1000 and not ops.waits()


@torch.no_grad()
def test_a_rule_waits_once_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has to tell the host who is left; after the last loop nobody can be. One wait is the check of the ids."""
    model, waits = scaled(tiny(halting="none", n_experts=0)), []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: (waits.append(1), original(x))[1])
    ids = random_ids(model.cfg, 3, T)
    for exit, expected in (("fixed", 0), ("latent_diff", 4)):
        waits.clear()
        model(ids, 5, exit=exit, exit_threshold=None if exit == "fixed" else 1e-9)
        assert len(waits) == 1 + expected


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_every_step_is_the_same_program(attn_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators and shapes of a decode step do not depend on how much the cache holds; nothing is copied to it."""
    model = on_meta(aligned(attn_type=attn_type))
    ids = torch.zeros(2, 1, dtype=torch.int64, device="meta")
    static, growing = model.make_cache(2, 16, 4, static=True), model.make_cache(2, 16, 4)
    programs: dict[bool, list[Any]] = {True: [], False: []}
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a graph holds no copy from the host"))
    for _ in range(5):
        for is_static, cache in ((True, static), (False, growing)):
            with Ops() as ops:
                model.run(ids, model.make_view((2, 1), cache=cache), 4, None, cache, last_only=True)
            assert not ops.waits()
            programs[is_static].append(ops.seen)
    # The first call also makes the views of the levels.
    assert all(program == programs[True][1] for program in programs[True][2:])
    assert programs[False][1] != programs[False][2]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_results_are_those_of_an_ordinary_cache(attn_type: str, padded: bool) -> None:
    """Chunks, decode, fewer loops than levels, and going back."""
    cfg = tiny(attn_type=attn_type, recurrent_layers=2, halting="none", initial_state="normal")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, ids = scaled(cfg, dtype=dtype), random_ids(cfg, 3, 2 * T)
        mask = torch.arange(2 * T) >= torch.tensor([4, 0, 7])[:, None]
        static, ordinary = model.make_cache(3, 4 * T, 5, static=True), model.make_cache(3, 4 * T, 5)
        calls = [
            (slice(0, 8), 5),
            (slice(8, 11), 5),
            (slice(11, 12), 5),
            *((slice(0, 1), depth) for depth in (5, 3, 5)),
        ]
        for i, (new, depth) in enumerate(calls):
            part = mask[:, new] if padded and i < 3 else None
            got, expected = (
                model(ids[:, new], depth, cache=cache, attention_mask=part) for cache in (static, ordinary)
            )
            rows = slice(None) if part is None else part
            assert worst(got[rows], expected[rows]) < tolerance
        assert static.length == ordinary.length == int(static.cursor) == 2 * T + 3
        static.rewind(2 * T)
        again = model(ids[:, :1], 5, cache=static)
        static.rewind(2 * T)
        assert torch.equal(model(ids[:, :1], 5, cache=static), again)
        assert static.valid.sum(1).tolist() == static.n_valid.tolist()


def ordinary_of(model: OpenMythos) -> KVCache:
    return model.make_cache(3, 2 * T, 6)


def static_of(model: OpenMythos) -> StaticKVCache:
    return model.make_cache(3, 2 * T, 6, static=True)


@pytest.mark.parametrize("exit", [None, "kl", "latent_diff"])
@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_tokens_exit_as_with_an_ordinary_cache(attn_type: str, exit: str | None) -> None:
    """Chunks and single tokens, the rows at depths of their own; also in the memory of a cache that was ordinary."""
    model = scaled(tiny(attn_type=attn_type), dtype=torch.float64)
    ids, options = random_ids(model.cfg, 3, 2 * T), {"exit": exit, "threshold": THRESHOLDS.get(exit or "")}
    ordinary, taken_over = ordinary_of(model), ordinary_of(model)
    rule = model.exit_rule(**options)
    model(ids[:, :T], 6, cache=taken_over, exit=rule)
    static, taken_over = static_of(model), StaticKVCache.over(taken_over)
    loops = []
    for new in (slice(0, T), slice(T, T + 3), *(slice(i, i + 1) for i in range(T + 3, 2 * T))):
        view = model.make_view(ids[:, new].shape, cache=ordinary)
        expected, result = model.run(ids[:, new], view, 6, rule, ordinary)
        loops.append(result.loops)
        for cache in (static, taken_over) if new.start else (static,):
            assert worst(model(ids[:, new], 6, cache=cache, exit=rule), expected) < 1e-12
    assert len(torch.cat(loops, dim=1).unique()) > 1
    traces = [model(ids[:, :1], 6, cache=c, trace=True, exit=rule) for c in (ordinary_of(model), static_of(model))]
    for name in ("logits", "hidden", "halt_weight", "exit_loop"):
        assert worst(getattr(traces[0], name).double(), getattr(traces[1], name).double()) < 1e-12


@torch.no_grad()
def test_a_static_cache_refuses_what_it_cannot_hold() -> None:
    model = scaled(tiny())
    cache = model.make_cache(2, 8, 4, static=True)
    ids = random_ids(model.cfg, 2, 3)
    view = model.make_view((2, 3), cache=cache)
    e = model.encode(ids, view)
    with pytest.raises(ValueError, match="make the cache with static=False"):
        model.recur(e, e, torch.tensor([0, 1]), view)
    with pytest.raises(ValueError, match="length=9 must be 0 to max_len=8"):
        cache.rewind(9)


@pytest.mark.gpu
@pytest.mark.parametrize("halting", ["none", "act"])
@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_a_cuda_graph_replays_decode(attn_type: str, halting: str) -> None:
    """One captured step, fed its own tokens, gives the greedy text of ordinary calls."""
    n_new, cfg = 12, aligned(attn_type=attn_type, halting=halting)
    model, ids = scaled(cfg).cuda(), random_ids(cfg, 2, T).cuda()
    expected = model.generate(ids, max_new_tokens=n_new, temperature=0)[:, T:]
    cache = model.make_cache(2, T + n_new, static=True)
    token = model(ids, cache=cache, last_only=True).argmax(-1)

    def step() -> None:
        view = model.make_view((2, 1), cache=cache)
        logits, _ = model.run(token, view, cfg.max_loop_iters, None, cache, last_only=True)
        token.copy_(logits.argmax(-1))

    first = token.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    cache.rewind(T)
    token.copy_(first)
    got = [first]
    for _ in range(n_new - 1):
        graph.replay()
        got.append(token.clone())
    assert torch.equal(torch.cat(got, dim=1), expected)
    assert int(cache.cursor) == T + n_new - 1
