"""Causal attention for training on a CPU: blocks of queries against the keys up to them, through the fast products.

Where rows hold several documents, the keys begin at the document of a block's first query.

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

    q (B, T, H, K), k (B, T, G, K), v (B, T, G, W), scale -> (B, T, H, W). No second derivative. With `starts` (B, T)
    int64, non-decreasing, a query sees nothing before its own.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None) -> Tensor:
        B, T, H, _ = q.shape
        G, W = v.shape[2:]
        q, k, v, mask = _by_group(q * scale, G), _by_group(k, G), _by_group(v, G), _Mask(B, T, starts)
        out, log_sum = q.new_empty(B, T, H, W), q.new_empty(B * G, T * H // G)
        for i in range(B * G):
            head = out[i // G].unflatten(1, (G, -1))[:, i % G]
            for start in range(0, T, BLOCK):
                end, rows, keys = mask.block(i // G, start, H // G)
                p = mask.scores(q[i, rows], k[i, keys], i // G, start)
                highest = p.amax(-1, keepdim=True)
                total = p.sub_(highest).exp_().sum(-1, keepdim=True)
                head[start:end] = linear(p, v[i, keys].T).div_(total).view(end - start, -1, W)
                log_sum[i, rows] = highest.add_(total.log_())[:, 0]
        ctx.save_for_backward(q, k, v, out, log_sum, starts)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum, starts = ctx.saved_tensors
        B, T, H, _ = out.shape
        G, mask = len(k) // B, _Mask(B, T, starts)
        # Each query's sum of p * dp, which the softmax takes off.
        taken_off = _by_group(torch.linalg.vecdot(grad, out)[..., None], G)
        grad = _by_group(grad, G)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i in range(B * G):
            for start in range(0, T, BLOCK):
                _, rows, keys = mask.block(i // G, start, H // G)
                p = mask.scores(q[i, rows], k[i, keys], i // G, start).sub_(log_sum[i, rows, None]).exp_()
                dv[i, keys] += linear(p.T, grad[i, rows].T)
                ds = linear(grad[i, rows], v[i, keys]).sub_(taken_off[i, rows]).mul_(p)
                dq[i, rows] = linear(ds, k[i, keys].T)
                dk[i, keys] += linear(ds.T, q[i, rows].T)
        dq, dk, dv = (x.view(B, G, T, -1, x.shape[-1]).transpose(1, 2).flatten(2, 3) for x in (dq, dk, dv))
        return dq.mul_(ctx.scale), dk, dv, None, None


def _by_group(x: Tensor, n_groups: int) -> Tensor:
    """(B, T, H, K) -> (B * G, T * R, K): the queries of a key head one below the other, token by token."""
    return x.unflatten(2, (n_groups, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1).contiguous()


class _Mask:
    """What is hidden in each block of queries of a call."""

    def __init__(self, n_rows: int, n_tokens: int, starts: Tensor | None) -> None:
        self.n_tokens, self.starts = n_tokens, starts
        self.causal = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu_(1)[:, None]
        """(BLOCK, 1, BLOCK), true for keys behind a query."""
        # Of each block's first query, and of its last one: two documents in a block are the rarer case.
        self.first = [[0] * -(-n_tokens // BLOCK)] * n_rows if starts is None else starts[:, ::BLOCK].tolist()
        last = [*range(BLOCK - 1, n_tokens, BLOCK), n_tokens - 1]
        self.last = self.first if starts is None else starts[:, last].tolist()

    def block(self, row: int, start: int, per_token: int) -> tuple[int, slice, slice]:
        """The end of the block of queries from `start` on, its rows in a group, and the keys that it reads."""
        end = min(start + BLOCK, self.n_tokens)
        return end, slice(start * per_token, end * per_token), slice(self.first[row][start // BLOCK], end)

    def scores(self, q: Tensor, k: Tensor, row: int, start: int) -> Tensor:
        """q k^T for a block of queries and the keys it reads; -inf for what a query may not see."""
        scores, i = linear(q, k), start // BLOCK
        first, n = self.first[row][i], min(BLOCK, self.n_tokens - start)
        by_token = scores.view(n, -1, len(k))
        by_token[..., start - first :].masked_fill_(self.causal[:n, :, :n], -math.inf)
        if self.starts is not None and self.last[row][i] > first:
            starts, keys = self.starts[row, start : start + n], torch.arange(first, start + n)
            by_token.masked_fill_(keys < starts[:, None, None], -math.inf)
        return scores
