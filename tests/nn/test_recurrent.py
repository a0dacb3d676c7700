"""The loop's driver in training: windows of back-propagation, checkpoints, rows of different depth."""

import pytest
import torch
from torch import Tensor

from open_mythos import LoopPlan, OpenMythos
from tests.models import ATTENTIONS, random_ids, scaled, tiny, worst, worst_of


def gradients(
    model: OpenMythos, ids: Tensor, plan: LoopPlan, weight: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The loss with every auxiliary term in it, and its gradients."""
    out = model.train()(ids, plan=plan)
    loss = out.logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    loss = (loss if weight is None else loss * weight).mean()
    for extra in (out.ponder_cost, out.router_z_loss):
        loss = loss if extra is None else loss + 0.1 * extra
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


@pytest.mark.parametrize("injection", ["lti", "diagonal", "concat", "add"])
@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_a_window_over_every_loop_is_full_backpropagation(attn_type: str, injection: str) -> None:
    cfg = tiny(attn_type=attn_type, injection=injection, halting="none")
    model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 2, 7)
    loss, full = gradients(model, ids, LoopPlan((5, 5)))
    for n_grad in (5, 9):
        same_loss, same = gradients(model, ids, LoopPlan((5, 5), n_grad))
        assert torch.equal(loss, same_loss) and all(torch.equal(a, b) for a, b in zip(same, full, strict=True))
    for n_grad in (1, 4):
        same_loss, fewer = gradients(model, ids, LoopPlan((5, 5), n_grad))
        assert worst(same_loss, loss) < 1e-14 and worst_of(fewer, full) > 1e-3
        assert all(torch.isfinite(g).all() for g in fewer)


@pytest.mark.parametrize("halting", ["act", "none"])
@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_checkpointing_changes_no_gradient(attn_type: str, halting: str, dtype: torch.dtype) -> None:
    """Also the router's statistics: recomputation runs the experts a second time and must not count twice."""
    cfg = tiny(attn_type=attn_type, halting=halting, recurrent_layers=2)
    model, ids = scaled(cfg, dtype=dtype), random_ids(cfg, 3, 7)
    for plan in (LoopPlan((3, 5, 2)), LoopPlan((4, 4, 4)), *([LoopPlan((3, 5, 2), 2)] if halting == "none" else [])):
        results, counts = [], []
        for model.recurrent.checkpoint_loops in (False, True):
            results.append(gradients(model, ids, plan))
            counts.append(model(ids, plan=plan).tokens_per_expert)
        (loss, grads), (same_loss, same) = results
        assert torch.equal(loss, same_loss) and torch.equal(*counts)
        assert worst_of(same, grads) < (1e-13 if dtype == torch.float64 else 1e-6)


def test_checkpointing_saves_memory() -> None:
    """Counted in bytes that autograd keeps: without checkpoints they grow with the loops, with them hardly."""
    cfg = tiny(halting="none")
    model, ids = scaled(cfg).train(), random_ids(cfg, 2, 16)
    kept = {}
    for model.recurrent.checkpoint_loops in (False, True):
        for n_loops in (2, 12):
            storages: dict[int, int] = {}

            def pack(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = model(ids, plan=LoopPlan((n_loops, n_loops)))
            kept[model.recurrent.checkpoint_loops, n_loops] = sum(storages.values())
            del out
    per_loop = {flag: (kept[flag, 12] - kept[flag, 2]) / 10 for flag in (False, True)}
    print(f"bytes kept per loop: {per_loop[False]:.0f} without checkpoints, {per_loop[True]:.0f} with")
    assert per_loop[True] < per_loop[False] / 5


def test_order_and_company_of_rows_do_not_matter() -> None:
    cfg = tiny()
    model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 5, 7)
    depths = (3, 1, 6, 3, 2)
    out = model(ids, plan=LoopPlan(depths))
    order = [4, 2, 0, 3, 1]
    moved = model(ids[order], plan=LoopPlan(tuple(depths[i] for i in order)))
    assert worst(moved.logits, out.logits[order]) < 1e-13 and torch.equal(moved.loops, out.loops[order])
    for row, depth in enumerate(depths):
        alone = model(ids[row : row + 1], depth)
        assert worst(out.logits[row : row + 1], alone) < 1e-13


def test_padding_counts_nowhere() -> None:
    """In neither loss term nor load: a padded batch has the auxiliary losses and counts of its rows alone."""
    cfg = tiny()
    model, ids = scaled(cfg, dtype=torch.float64).train(), random_ids(cfg, 2, 7)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :4] = 0
    out = model(ids, plan=LoopPlan((3, 5)), attention_mask=mask)
    short, long = model(ids[:1, 4:], plan=LoopPlan((3,))), model(ids[1:], plan=LoopPlan((5,)))
    assert worst(out.logits[0, 4:], short.logits[0]) < 1e-13 and worst(out.logits[1], long.logits[0]) < 1e-13
    assert torch.equal(out.tokens_per_expert, short.tokens_per_expert + long.tokens_per_expert)
    assert worst(out.ponder_cost, (3 * short.ponder_cost + 7 * long.ponder_cost) / 10) < 1e-13
    routed = [float(x.tokens_per_expert.sum()) for x in (short, long)]
    z = (routed[0] * short.router_z_loss + routed[1] * long.router_z_loss) / sum(routed)
    assert worst(out.router_z_loss, z) < 1e-13
    assert out.loops[0].tolist()[:4] == [0] * 4


def test_a_batch_of_padding_only_is_no_nan() -> None:
    """A shard of a batch may hold no token at all; its losses are then zero, not 0 / 0."""
    cfg = tiny()
    model, ids = scaled(cfg).train(), random_ids(cfg, 2, 7)
    out = model(ids, plan=LoopPlan((3, 5)), attention_mask=torch.zeros_like(ids))
    assert float(out.ponder_cost.detach()) == float(out.router_z_loss.detach()) == 0
    (out.ponder_cost + out.router_z_loss + 0 * out.logits.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_eval_mode_and_training_mode_agree() -> None:
    cfg = tiny()
    model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 2, 7)
    with torch.no_grad():
        assert worst(model.train()(ids, 5), model.eval()(ids, 5)) < 1e-14


def test_dropout_acts_in_training_only() -> None:
    cfg = tiny(dropout=0.3)
    model, ids = scaled(cfg), random_ids(cfg, 2, 7)
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert worst(model(ids), model(ids)) > 1e-3
