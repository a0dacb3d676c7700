"""Both attentions against a loop over heads and queries, without SDPA; mla's two forms against each other."""

import math

import pytest
import torch
from torch import Tensor, nn

from open_mythos import GQAttention, MLAttention, MythosConfig
from open_mythos.nn.attention import attend
from open_mythos.nn.inputs import make_view
from tests import reference
from tests.models import tiny, worst, worst_of


def visible(mask: Tensor | None, B: int, T: int) -> Tensor:
    """(B, T, T): whether query t may see key s. A padding query sees itself, so that its softmax exists."""
    valid = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.bool()
    causal = torch.tensor([[s <= t for s in range(T)] for t in range(T)])
    return valid[:, None] & causal | torch.eye(T, dtype=torch.bool)


def naive(attn: nn.Module, cfg: MythosConfig, x: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
    """Head by head, query by query. x (B, T, D)."""

    def turn(x: Tensor, b: int) -> Tensor:
        return torch.stack(
            [reference.rope(row, int(p), cfg.rope_theta) for row, p in zip(x, positions[b], strict=True)]
        )

    rows = []
    for b, row in enumerate(x):
        heads = []
        for head in range(cfg.n_heads):
            if cfg.attn_type == "gqa":
                K = cfg.head_dim
                group = head // (cfg.n_heads // cfg.n_kv_heads)
                wq, wk, wv = attn.wqkv.weight.split(attn.wqkv.widths)
                q = row @ wq[head * K : (head + 1) * K].T
                k, v = (row @ w[group * K : (group + 1) * K].T for w in (wk, wv))
                if cfg.qk_norm:
                    q, k = (reference.rms_norm(z, n.weight) for z, n in ((q, attn.q_norm), (k, attn.k_norm)))
                q, k = turn(q, b), turn(k, b)
            else:
                N, P, W, R = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.kv_lora_rank
                low, both = (row @ attn.down.weight.T).tensor_split([cfg.q_lora_rank], 1)
                low = reference.rms_norm(low, attn.q_norm.weight)
                q = low @ attn.q_up.weight[head * (N + P) : (head + 1) * (N + P)].T
                latent = reference.rms_norm(both[:, :R], attn.kv_norm.weight)
                up = latent @ attn.kv_up.weight[head * (N + W) : (head + 1) * (N + W)].T
                q = torch.cat((q[:, :N], turn(q[:, N:], b)), 1)
                k, v = torch.cat((up[:, :N], turn(both[:, R:], b)), 1), up[:, N:]
            out = []
            for t, query in enumerate(q):
                scores = k[seen[b, t]] @ query / math.sqrt(len(query))
                weights = (scores - scores.max().detach()).exp()
                out.append(weights @ v[seen[b, t]] / weights.sum())
            heads.append(torch.stack(out))
        rows.append(torch.cat(heads, 1) @ attn.wo.weight.T)
    return torch.stack(rows)


def build(cfg: MythosConfig, dtype: torch.dtype) -> GQAttention | MLAttention:
    attn = (GQAttention if cfg.attn_type == "gqa" else MLAttention)(cfg)
    for p in attn.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim > 1 else nn.init.normal_(p, 1.0, 0.2)
    return attn.to(dtype)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("T", [1, 7, 63])
@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_heads": 4},
        {"n_kv_heads": 1},
        {"n_kv_heads": 2, "qk_norm": True},
        {"attn_type": "mla"},
        {"attn_type": "mla", "n_heads": 3, "v_head_dim": 5, "kv_lora_rank": 40, "qk_nope_head_dim": 8},
    ],
)
def test_values_and_gradients(changes: dict, T: int, padded: bool) -> None:
    cfg = tiny(**changes)
    B = 2 if T < 63 else 1
    mask = None
    if padded:
        mask = torch.ones(B, T, dtype=torch.int64)
        mask[0, : T // 2] = 0
    seen = visible(mask, B, T)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        attn = build(cfg, dtype)
        x = torch.randn(B, T, cfg.dim, dtype=dtype, requires_grad=True)
        view = make_view((B, T), attn.rope_dim(cfg), cfg.rope_theta, dtype, x.device, mask)
        out = attn(x, view, 0)
        wanted = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.bool()
        expected = naive(attn.double(), cfg, x.double(), view.positions, seen)
        assert worst(out[wanted], expected[wanted]) < tolerance
        if dtype == torch.float64:
            weight = torch.randn_like(expected) * wanted[..., None]
            inputs = [x, *attn.parameters()]
            got = torch.autograd.grad((out * weight).sum(), inputs)
            assert worst_of(got, torch.autograd.grad((expected * weight).sum(), inputs)) < 1e-11


@pytest.mark.parametrize("T", [1, 7, 63])
def test_absorbed_equals_expanded(T: int) -> None:
    cfg = tiny(attn_type="mla")
    attn = build(cfg, torch.float64)
    q_nope, q_rope = torch.randn(2, T, 4, 6), torch.randn(2, T, 4, 8)
    inputs = [x.double().requires_grad_() for x in (q_nope, q_rope, torch.randn(2, T, 12 + 8))]
    view = make_view((2, T), 8, 1e4, torch.float64, torch.device("cpu"))
    outs = [f(*inputs, view) for f in (attn._absorbed, attn._expanded)]
    assert worst(*outs) < 1e-12
    weight = torch.randn_like(outs[0])
    leaves = [*inputs, attn.kv_up.weight]
    assert worst_of(*(torch.autograd.grad((out * weight).sum(), leaves) for out in outs)) < 1e-12


def test_decode_attends_in_the_latent() -> None:
    """One new token takes the absorbed form, so the past is never expanded; a long prompt takes the other."""
    attn = build(tiny(attn_type="mla", kv_lora_rank=64, qk_nope_head_dim=16, v_head_dim=16), torch.float32)
    assert attn._absorbing_is_cheaper(1) and not attn._absorbing_is_cheaper(512)


@pytest.mark.parametrize("padded", [False, True])
def test_short_rows_under_autocast_are_attended_to_in_float32(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    mask = torch.tensor([[0] * 4 + [1] * 20, [1] * 24]) if padded else None
    view = make_view((2, 24), 16, 1e4, torch.float32, torch.device("cpu"), mask)
    inputs = [torch.randn(2, 24, heads, 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]

    def run(short: int) -> list[Tensor]:
        monkeypatch.setattr("open_mythos.ops.causal_attention.SHORT", short)
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(*inputs, view, 0.25)
        assert out.dtype is torch.bfloat16
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    wide = [x.detach().float().requires_grad_() for x in inputs]
    out = attend(*wide, view, 0.25)
    exact = [out, *torch.autograd.grad(out.square().sum(), wide)]
    short, long = run(2**14), run(0)
    assert torch.equal(short[0], out.bfloat16()) and not torch.equal(long[0], short[0])
    for got, right in zip(short, exact, strict=True):
        assert worst(got.float(), right) < 0.01
