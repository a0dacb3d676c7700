"""Tokens that have exited leave the computation: the same results as computing them all, with exactly less work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import LoopPlan, OpenMythos
from open_mythos.nn.halting import HaltingRule, LatentDiff
from tests.models import ATTENTIONS, THRESHOLDS, random_ids, scaled, tiny, worst, worst_of

RULES = (None, "latent_diff", "second_difference", "kl")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
T = 9


def options(exit: str | None) -> dict[str, Any]:
    return {"exit": exit, "exit_threshold": THRESHOLDS.get(exit or "")}


def padding(B: int) -> Tensor:
    """(B, T), rows with different numbers of padding on the left, the last with none."""
    return torch.arange(T) >= torch.tensor([(3 * i + 2) % 7 for i in range(B - 1)] + [0])[:, None]


def token_loops(model: OpenMythos) -> list[tuple[int, int]]:
    """Filled with (rows, tokens) of every call of the looped block."""
    calls: list[tuple[int, int]] = []
    model.recurrent.blocks[0].register_forward_hook(lambda _, args, __: calls.append(tuple(args[0].shape[:2])))
    return calls


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize("exit", RULES)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_results_are_those_of_computing_everyone(attn_type: str, exit: str | None, padded: bool) -> None:
    """Without a cache, in prefill, in chunks and in decode; a later, full call then sees the same keys."""
    cfg = tiny(attn_type=attn_type, recurrent_layers=2)
    n_loops = 7
    for dtype, tolerance in TOLERANCE.items():
        for B in (1, 5) if exit is None else (5,):
            model, ids = scaled(cfg, dtype=dtype), random_ids(cfg, B, T + 3, seed=3)
            mask = padding(B) if padded else None
            results: dict[str, list[Tensor]] = {}
            work = token_loops(model)
            spent = {}
            for mode in ("never", "always", "counts"):
                model.recurrent.compaction = mode
                work.clear()
                out = model(ids[:, :T], n_loops, attention_mask=mask, trace=True, **options(exit))
                logits = [out.logits, out.hidden, out.halt_weight, out.exit_loop]
                logits.append(model(ids[:, :T], n_loops, attention_mask=mask, **options(exit)))
                for sizes in ([T, 1, 1, 1], [4, 1, 4, 1, 2]) if dtype == torch.float64 else ([T, 1, 2],):
                    cache = model.make_cache(B, T + 4, n_loops + 1)
                    for chunk, part in zip(ids.split(sizes, 1), _parts(mask, sizes), strict=True):
                        logits.append(model(chunk, n_loops, cache=cache, attention_mask=part, **options(exit)))
                    logits.append(model(ids[:, :1], n_loops, cache=cache, exit="fixed"))
                    logits += [x for kept in cache.layers for x in kept]
                results[mode], spent[mode] = logits, sum(b * t for b, t in work)
            for mode in ("always", "counts"):
                errors = [worst(a, b) for a, b in zip(results[mode], results["never"], strict=True)]
                assert max(errors) < tolerance, (mode, errors)
                assert torch.equal(results[mode][3], results["never"][3]), "the exits themselves"
            assert spent["always"] <= spent["counts"] <= spent["never"] and spent["always"] < spent["never"]


def _parts(mask: Tensor | None, sizes: list[int]) -> Any:
    """The mask of each chunk; the last three tokens are none of them padding."""
    return [None] * len(sizes) if mask is None else torch.cat((mask, mask[:, -3:] | True), 1).split(sizes, 1)


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("depths", [(9, 9, 9, 9), (6, 1, 9, 9), (4, 8, 4, 6)])
def test_gradients_under_act(attn_type: str, padded: bool, depths: tuple[int, ...]) -> None:
    """Loss, every gradient and the router's counts; rows join late, and after others have left."""
    cfg = tiny(attn_type=attn_type, recurrent_layers=2)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        model, ids = scaled(cfg, dtype=dtype).train(), random_ids(cfg, 4, T)
        model.recurrent.act.halt.bias.data.add_(1)  # earlier exits
        mask = padding(4) if padded else None
        work = token_loops(model)
        results, counted = {}, {}
        for mode in ("never", "counts", "always"):
            for model.recurrent.checkpoint_loops in (False, True) if mode == "always" else (False,):
                model.recurrent.compaction = mode
                work.clear()
                out = model(ids, plan=LoopPlan(depths), attention_mask=mask)
                counted[mode] = sum(b * t for b, t in work)
                seen = torch.ones_like(ids) if mask is None else mask
                loss = (out.logits.log_softmax(-1)[..., 0] * seen).sum() + out.ponder_cost + out.router_z_loss
                grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
                key = f"{mode}, checkpoints" if model.recurrent.checkpoint_loops else mode
                results[key] = (loss.detach(), grads, out.loops, out.tokens_per_expert)
        model.recurrent.checkpoint_loops = False
        loss, grads, loops, load = results.pop("never")
        for name, (same_loss, same, same_loops, same_load) in results.items():
            assert torch.equal(same_loops, loops) and torch.equal(same_load, load), name
            assert worst(same_loss, loss) < tolerance and worst_of(same, grads) < tolerance, name
        assert counted["always"] < counted["never"]
        assert len(set(loops.flatten().tolist())) > 2, "tokens must exit at different loops"


@pytest.mark.parametrize("exit", RULES)
@torch.no_grad()
def test_the_block_computes_what_is_in_the_loop_and_no_more(exit: str | None) -> None:
    """At every loop: rows with a token in the loop, times the most tokens of such a row. In decode, nothing else."""
    cfg = tiny()
    model, ids = scaled(cfg), random_ids(cfg, 6, T, seed=3)
    work = token_loops(model)
    exit_loop = model(ids, 7, trace=True, **options(exit)).exit_loop
    expected = []
    for loop in range(int(exit_loop.max()) + 1):
        active = (exit_loop >= loop).sum(1)
        expected.append((int((active > 0).sum()), int(active.max())))
    assert work == expected
    cache = model.make_cache(6, T + 4, 7)
    model(ids, cache=cache, **options(exit))
    for i in range(4):
        work.clear()
        _, result = model.run(ids[:, i : i + 1], model.make_view((6, 1), cache=cache), 7, _rule(model, exit), cache)
        assert sum(b * t for b, t in work) == int(result.loops.sum())


def _rule(model: OpenMythos, exit: str | None) -> HaltingRule | None:
    return model.exit_rule(exit, THRESHOLDS.get(exit or ""))


@torch.no_grad()
def test_rows_that_wait_and_rows_that_are_done_cost_nothing() -> None:
    """A row joins at the last tick, long after the others have left: nothing runs in between."""
    cfg = tiny()
    model, ids = scaled(cfg), random_ids(cfg, 3, T)
    model.recurrent.act.halt.bias.add_(20)
    work = token_loops(model)
    out = model(ids, plan=LoopPlan((6, 1, 6)))
    assert work == [(2, T), (1, T)] and out.loops.unique().tolist() == [1]


def test_fixed_depth_narrows_nothing() -> None:
    cfg = tiny(halting="none")
    model, ids = scaled(cfg), random_ids(cfg, 3, T)
    work = token_loops(model)
    model(ids, 5)
    model(ids, plan=LoopPlan((5, 5, 5)))
    assert work == [(3, T)] * 10


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_the_same_call_gives_the_same_bits(attn_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every model made of one folder, at the first call and at later ones, however long anything takes."""
    for clock in ("perf_counter", "monotonic", "thread_time", "process_time", "time"):
        monkeypatch.setattr(f"time.{clock}", lambda: pytest.fail("a clock was read"))
    model = scaled(tiny(attn_type=attn_type))
    model.save_pretrained(tmp_path)
    ids, first = random_ids(model.cfg, 6, T, seed=3), None
    for _ in range(5):
        model = OpenMythos.from_pretrained(tmp_path)
        assert model.recurrent.compaction == "counts"
        work = token_loops(model)
        for _ in range(3):
            logits = model(ids, 7, **options("latent_diff"))
            first = logits if first is None else first
            assert torch.equal(logits, first)
        assert len({rows * tokens for rows, tokens in work}) > 1, "something must leave"


@torch.no_grad()
def test_counts_narrow_when_a_quarter_has_left() -> None:
    model = scaled(tiny())
    model.recurrent.compaction = "counts"
    ids, work = random_ids(model.cfg, 6, T, seed=3), token_loops(model)
    exit_loop = model(ids, 7, trace=True).exit_loop
    expected, B, width = [], 6, T
    for loop in range(int(exit_loop.max()) + 1):
        active = (exit_loop >= loop).sum(1)
        rows, tokens = int((active > 0).sum()), int(active.max())
        if rows * tokens <= 0.75 * B * width:
            B, width = rows, tokens
        expected.append((B, width))
    assert work == expected and len(set(expected)) > 2


class PerChannel(LatentDiff):
    """A rule whose state is neither of a row nor of a token."""

    def init(self, h: Tensor, n_loops: Tensor) -> dict[str, Tensor]:
        return {"mean": h.mean(1)}


def test_a_state_without_rows_or_tokens_is_named() -> None:
    cfg = tiny()
    with pytest.raises(ValueError, match=r"state 'mean' has shape \(3, 32\)"):
        scaled(cfg)(random_ids(cfg, 3, T), exit=PerChannel(0.1))
