"""Causal attention for training on a CPU: blocks of queries against the keys up to them, through the fast products.

Torch's fused kernel for CPUs multiplies with MKL (see nn/linear.py) and takes values only as wide as keys. This needs
three quarters of its time from 512 tokens on, and keeps no padded copies for the backward pass.

Shapes: B rows, T tokens, H query heads, G key/value heads, R = H / G, K key width, W value width, N queries of a block.
"""

import math
from typing import Any

import torch
from torch import Tensor

from open_mythos.nn.linear import fast, linear

BLOCK = 128
"""Queries of a block: enough for a product at full speed, few enough that little of the square is wasted."""
MIN_TOKENS = 512
"""Fewer tokens are faster in torch's kernel."""


def takes_blocks(q: Tensor) -> bool:
    """Whether causal attention of q (B, T, H, K) among themselves should come here."""
    return q.shape[1] >= MIN_TOKENS and torch.is_grad_enabled() and fast(q)


class CausalAttention(torch.autograd.Function):
    """softmax(scale * q k^T) v with every query seeing itself and what is before it.

    q (B, T, H, K), k (B, T, G, K), v (B, T, G, W), scale -> (B, T, H, W). No second derivative.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        B, T, H, _ = q.shape
        G, W = v.shape[2:]
        q, k, v, hidden = _by_group(q * scale, G), _by_group(k, G), _by_group(v, G), _hidden()
        out, log_sum = q.new_empty(B, T, H, W), q.new_empty(B * G, T * H // G)
        for i in range(B * G):
            head = out[i // G].unflatten(1, (G, -1))[:, i % G]
            for start in range(0, T, BLOCK):
                end, rows = _block(start, T, H // G)
                p = _scores(q[i, rows], k[i], start, end, hidden)
                highest = p.amax(-1, keepdim=True)
                total = p.sub_(highest).exp_().sum(-1, keepdim=True)
                head[start:end] = linear(p, v[i, :end].T).div_(total).view(end - start, -1, W)
                log_sum[i, rows] = highest.add_(total.log_())[:, 0]
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        B, T, H, _ = out.shape
        G = len(k) // B
        # Each query's sum of p * dp, which the softmax takes off.
        taken_off = _by_group(torch.linalg.vecdot(grad, out)[..., None], G)
        grad, hidden = _by_group(grad, G), _hidden()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i in range(B * G):
            for start in range(0, T, BLOCK):
                end, rows = _block(start, T, H // G)
                p = _scores(q[i, rows], k[i], start, end, hidden).sub_(log_sum[i, rows, None]).exp_()
                dv[i, :end] += linear(p.T, grad[i, rows].T)
                ds = linear(grad[i, rows], v[i, :end]).sub_(taken_off[i, rows]).mul_(p)
                dq[i, rows] = linear(ds, k[i, :end].T)
                dk[i, :end] += linear(ds.T, q[i, rows].T)
        dq, dk, dv = (x.view(B, G, T, -1, x.shape[-1]).transpose(1, 2).flatten(2, 3) for x in (dq, dk, dv))
        return dq.mul_(ctx.scale), dk, dv, None


def _by_group(x: Tensor, n_groups: int) -> Tensor:
    """(B, T, H, K) -> (B * G, T * R, K): the queries of a key head one below the other, token by token."""
    return x.unflatten(2, (n_groups, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1).contiguous()


def _block(start: int, n_tokens: int, per_token: int) -> tuple[int, slice]:
    """The end of the block of queries from `start` on, and its rows in a group."""
    end = min(start + BLOCK, n_tokens)
    return end, slice(start * per_token, end * per_token)


def _hidden() -> Tensor:
    """(BLOCK, 1, BLOCK), true for keys behind a query."""
    return torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu_(1)[:, None]


def _scores(q: Tensor, k: Tensor, start: int, end: int, hidden: Tensor) -> Tensor:
    """q k^T for a block of queries and the keys up to its end; -inf for what a query may not see."""
    scores = linear(q, k[:end])
    n = end - start
    scores.view(n, -1, end)[:, :, start:].masked_fill_(hidden[:n, :, :n], -math.inf)
    return scores
