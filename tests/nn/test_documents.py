"""Rows of several documents: each document's tokens come out as if it stood alone."""

import math

import pytest
import torch
from torch import Tensor

from open_mythos import LoopPlan, OpenMythos
from open_mythos.nn.view import Selection
from open_mythos.ops import causal_attention as causal
from open_mythos.ops.causal_attention import CausalAttention
from tests.models import ATTENTIONS, random_ids, scaled, tiny, worst, worst_of

LENGTHS = ((5, 1, 9, 6), (21,), (2, 19), (13, 7, 1))
"""Documents of each row, 21 tokens in all."""


def numbers(lengths: tuple[tuple[int, ...], ...]) -> Tensor:
    """Document numbers; they need not be successive."""
    return torch.stack([torch.arange(len(row)).mul(3).repeat_interleave(torch.tensor(row)) for row in lengths])


def alone(model: OpenMythos, ids: Tensor, lengths: tuple[tuple[int, ...], ...], depths: tuple[int, ...]) -> Tensor:
    """Hidden states (B, T, D) of every document as a row of its own, in a call of its own."""
    return torch.stack(
        [
            torch.cat([model(part[None], plan=LoopPlan((depth,))).hidden[0] for part in row.split(parts)])
            for row, parts, depth in zip(ids, lengths, depths, strict=True)
        ]
    )


def gradients(model: OpenMythos, hidden: Tensor) -> list[Tensor]:
    direction = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(1))
    leaves = list(model.parameters())
    grads = torch.autograd.grad((hidden * direction).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("halting", ["none", "act"])
@pytest.mark.parametrize("injection", ["lti", "diagonal", "concat", "add"])
@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_a_packed_row_is_its_documents(attn_type: str, injection: str, halting: str, checkpoint: bool) -> None:
    """With depths of their own, so that rows join and leave; values and every parameter's gradient."""
    cfg = tiny(attn_type=attn_type, injection=injection, halting=halting)
    model = scaled(cfg, dtype=torch.float64).train()
    assert model.recurrent is not None
    model.recurrent.checkpoint_loops = checkpoint
    ids, depths = random_ids(cfg, 4, 21), (3, 1, 4, 2)
    out = model(ids, plan=LoopPlan(depths), documents=numbers(LENGTHS))
    if halting == "act":
        assert out.loops.unique().numel() > 2
    expected = alone(model, ids, LENGTHS, depths)
    assert worst(out.hidden, expected) < 1e-12
    assert worst_of(gradients(model, out.hidden), gradients(model, expected)) < 1e-10
    # Which the documents decide: without them the first row is another.
    assert worst(model(ids, plan=LoopPlan(depths)).hidden[0], expected[0]) > 1e-3


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_without_a_plan(attn_type: str) -> None:
    """Logits, traces and exits; a single token, and rows of one document, change nothing."""
    cfg = tiny(attn_type=attn_type)
    model = scaled(cfg, dtype=torch.float64)
    ids, documents = random_ids(cfg, 4, 21), numbers(LENGTHS)
    trace = model(ids, exit="latent_diff", exit_threshold=0.3, documents=documents, trace=True)
    for row, lengths, logits, exits in zip(ids, LENGTHS, trace.logits, trace.exit_loop, strict=True):
        parts = [model(x[None], exit="latent_diff", exit_threshold=0.3, trace=True) for x in row.split(lengths)]
        assert worst(logits, torch.cat([part.logits[0] for part in parts])) < 1e-12
        assert torch.equal(exits, torch.cat([part.exit_loop[0] for part in parts]))
    assert worst(model(ids[:, :1], documents=documents[:, :1]), model(ids[:, :1])) < 1e-12
    assert worst(model(ids, documents=torch.full_like(ids, 7)), model(ids)) < 1e-12


@torch.no_grad()
def test_with_padding() -> None:
    """Wherever it stands, and whatever document it is counted to."""
    cfg = tiny()
    model = scaled(cfg, dtype=torch.float64)
    ids, documents = random_ids(cfg, 4, 21), numbers(LENGTHS)
    padded = torch.cat((ids[:, :2], ids[:, :9], ids[:, :1], ids[:, 9:]), dim=1)
    kept = torch.tensor([0] * 2 + [1] * 9 + [0] + [1] * 12).expand(4, -1)
    numbered = torch.cat((documents[:, :1].expand(4, 2), documents[:, :9], documents[:, 9:10], documents[:, 9:]), dim=1)
    out = model(padded, attention_mask=kept, documents=numbered)[kept.bool()]
    assert worst(out, model(ids, documents=documents).flatten(0, 1)) < 1e-12


@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_in_blocks(attn_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 a long row goes through the blocks, where they are."""
    taken = []
    monkeypatch.setattr(causal, "_blocks", _spy(causal._blocks, taken))
    cfg = tiny(attn_type=attn_type, max_seq_len=600)
    model = scaled(cfg).train()
    lengths = ((300, 1, 127, 92), (520,), (128, 128, 264))
    ids, depths = random_ids(cfg, 3, 520), (2, 1, 3)
    out = model(ids, plan=LoopPlan(depths), documents=numbers(lengths))
    blocks = taken.copy()
    expected = alone(model, ids, lengths, depths)
    assert worst(out.hidden, expected) < 1e-4
    assert worst_of(gradients(model, out.hidden), gradients(model, expected)) < 1e-3
    assert bool(blocks) == causal.takes_blocks(torch.zeros(1, 520, 1, 1))


def _spy(function, calls: list):
    def call(*args):
        calls.append(args[-1])
        return function(*args)

    return call


@pytest.mark.parametrize(
    "lengths", [(300,), (1, 299), (128, 128, 44), (127, 2, 171), (1,) * 300, (40, 3, 90, 60, 7, 100)]
)
def test_blocks_of_documents(lengths: tuple[int, ...]) -> None:
    T, H, G, K, W = 300, 4, 2, 24, 16
    each = torch.stack([torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), torch.zeros(T).long()])
    starts = torch.stack([torch.searchsorted(row, row) for row in each])
    seen = torch.ones(T, T, dtype=torch.bool).tril() & (each[:, :, None] == each[:, None])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        q, k, v = (torch.randn(2, T, n, w, dtype=dtype, requires_grad=True) for n, w in ((H, K), (G, K), (G, W)))
        own = torch.arange(H) * G // H
        scores = 0.3 * torch.einsum("bthk,bshk->bhts", q, k[:, :, own])
        scores = scores.masked_fill(~seen[:, None], -math.inf)
        expected = torch.einsum("bhts,bshw->bthw", scores.softmax(-1), v[:, :, own])
        out = CausalAttention.apply(q, k, v, 0.3, starts)
        direction = torch.randn_like(out)
        grads = [torch.autograd.grad((y * direction).sum(), (q, k, v)) for y in (out, expected)]
        assert worst(out, expected) < tolerance and worst_of(*grads) < tolerance


def test_narrowed_views() -> None:
    """Whole rows take their documents along for the blocks; a choice of tokens has the mask alone."""
    view = scaled(tiny()).make_view((4, 21), documents=numbers(LENGTHS))
    assert view.starts is not None and view.mask is not None and view.is_square
    rows = view.narrow(Selection(torch.tensor([2, 0]), None, 4, 21))
    assert rows.starts is not None and torch.equal(rows.starts, view.starts[[2, 0]]) and rows.is_square
    tokens = view.narrow(Selection(slice(1, 3), torch.tensor([[4, 0], [2, 3]]), 4, 21))
    assert tokens.mask is not None and not tokens.is_square
    for row, slots in ((0, [4, 0]), (1, [2, 3])):
        assert torch.equal(tokens.mask[row, 0], view.mask[row + 1, 0, slots])


def test_refuses() -> None:
    model = scaled(tiny())
    ids = random_ids(model.cfg, 2, 5)
    for documents, error, message in (
        (torch.zeros(2, 4).long(), ValueError, r"documents has shape \(2, 4\), but .* input_ids' shape \(2, 5\)"),
        (torch.zeros(2, 5), TypeError, "documents must be .* not torch.float32; number the documents"),
        ([[0] * 5] * 2, TypeError, "documents must be .* not list"),
        (torch.tensor([[0] * 5, [0, 1, 1, 0, 2]]), ValueError, "documents falls from 1 to 0 in row 1, .* upwards"),
    ):
        with pytest.raises(error, match=message):
            model(ids, documents=documents)
    cache = model.make_cache(2, 8)
    with pytest.raises(ValueError, match=r"documents= does not go with cache=, .* a row of its own"):
        model(ids, cache=cache, documents=torch.zeros_like(ids))
    assert cache.length == 0
