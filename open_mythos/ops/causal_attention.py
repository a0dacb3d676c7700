"""Causal attention for training on a CPU: blocks of queries against the keys up to them, through the fast products.

Where rows hold several documents, the keys begin at the document of a block's first query.

Torch's fused kernel for CPUs multiplies with MKL (see ops/linear.py) and takes values only as wide as keys. From 512
tokens on, blocks need three quarters of its time, and save no padded copies for the backward pass.

Shapes: B rows, T tokens, H query heads, G key/value heads, R = H / G, K key width, W value width, N queries of a block.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import product, repeat
from typing import Any

import torch
from torch import Tensor

from open_mythos.ops.linear import autocasts, linear, uses_onednn

BLOCK = 128
"""Queries of a block: enough for a product at full speed, few enough that little of the square is wasted."""
MIN_TOKENS = 512
"""Fewer tokens are faster in torch's kernel."""
SHORT = 2**14
"""Tokens times channels of a head below which torch's backward kernel takes longer in bfloat16 than in float32: 1.3
times as long at 256 x 32, 6 times at 64 x 32."""


def takes_blocks(q: Tensor) -> bool:
    """Return whether blocks are the faster way for causal attention of q (B, T, H, K) among themselves."""
    if q.shape[1] < MIN_TOKENS or not torch.is_grad_enabled():
        return False
    return uses_onednn(q, MIN_TOKENS, BLOCK * BLOCK)


def prefers_float32(q: Tensor) -> bool:
    """Return whether attention of q (B, T, H, K) with gradient is faster in float32 where autocast takes bfloat16."""
    is_short = q.shape[1] * q.shape[3] < SHORT
    return is_short and q.device.type == "cpu" and torch.is_grad_enabled() and autocasts(q)


class CausalAttention(torch.autograd.Function):
    """softmax(scale * q k^T) v with every query seeing itself and what is before it.

    q (B, T, H, K), k (B, T, G, K), v (B, T, G, W), scale -> (B, T, H, W). No second derivative. With `starts` (B, T)
    int64, non-decreasing, a query sees nothing before its own.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None) -> Tensor:
        B, T, H, _ = q.shape
        G, W = v.shape[2:]
        q, k, v = _by_group(q * scale, G), _by_group(k, G), _by_group(v, G)
        out, log_sum = q.new_empty(B, T, H, W), q.new_empty(B * G, T * H // G)
        for row, blocks in enumerate(_blocks(B, T, q.dtype, starts)):
            for i, (first, end, keys, bias) in product(range(row * G, row * G + G), blocks):
                queries = slice(first * H // G, end * H // G)
                # The softmax of each query, and the logarithm of its sum for the backward pass.
                p = _scores(q[i, queries], k[i, keys], bias)
                highest = p.amax(-1, keepdim=True)
                total = p.sub_(highest).exp_().sum(-1, keepdim=True)
                head = out[row].unflatten(1, (G, -1))[first:end, i % G]
                head.copy_(linear(p, v[i, keys].T).div_(total).view_as(head))
                log_sum[i, queries] = highest.add_(total.log_())[:, 0]
        ctx.save_for_backward(q, k, v, out, log_sum, starts)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum, starts = ctx.saved_tensors
        B, T, H, _ = out.shape
        G = len(k) // B
        # Each query's sum of p * dp, which the softmax takes off.
        taken_off = _by_group(torch.linalg.vecdot(grad, out)[..., None], G)
        grad = _by_group(grad, G)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for row, blocks in enumerate(_blocks(B, T, q.dtype, starts)):
            for i, (first, end, keys, bias) in product(range(row * G, row * G + G), blocks):
                queries = slice(first * H // G, end * H // G)
                p = _scores(q[i, queries], k[i, keys], bias).sub_(log_sum[i, queries, None]).exp_()
                # With s = q k^T and p = softmax(s): dv = p^T do, ds = p (do v^T - sum p dp), dq = ds k, dk = ds^T q.
                dv[i, keys] += linear(p.T, grad[i, queries].T)
                ds = linear(grad[i, queries], v[i, keys]).sub_(taken_off[i, queries]).mul_(p)
                dq[i, queries] = linear(ds, k[i, keys].T)
                dk[i, keys] += linear(ds.T, q[i, queries].T)
        dq, dk, dv = (x.view(B, G, T, -1, x.shape[-1]).transpose(1, 2).flatten(2, 3) for x in (dq, dk, dv))
        return dq.mul_(ctx.scale), dk, dv, None, None


def _by_group(x: Tensor, n_groups: int) -> Tensor:
    """Stack the queries of each key head token by token: (B, T, H, K) -> (B * G, T * R, K)."""
    return x.unflatten(2, (n_groups, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1).contiguous()


def _blocks(
    n_rows: int, n_tokens: int, dtype: torch.dtype, starts: Tensor | None
) -> Iterator[list[tuple[int, int, slice, Tensor]]]:
    """Yield the blocks of each row: first query, end of the queries, keys, and a bias (N, 1, S') of the last S' keys.

    The bias is -inf where a query may not see a key. Adding it takes a tenth of the time of filling the scores.
    """
    causal = torch.full((BLOCK, BLOCK), -math.inf, dtype=dtype).triu_(1)[:, None]
    if starts is None:
        cuts = [(i, min(i + BLOCK, n_tokens)) for i in range(0, n_tokens, BLOCK)]
        yield from repeat([(i, end, slice(0, end), causal[: end - i, :, : end - i]) for i, end in cuts], n_rows)
        return
    for row in starts:
        begins, blocks, i = row.tolist(), [], 0
        bounds = [*sorted(set(begins)), n_tokens]
        while i < n_tokens:
            # What is left of a document that has begun before, or as many whole ones as fit, or part of one.
            n_bounds = bisect_right(bounds, i + BLOCK)
            whole = bounds[min(n_bounds - 1, bisect_right(bounds, i))] if begins[i] < i else bounds[n_bounds - 1]
            end = whole if whole > i else i + BLOCK
            bias = causal[: end - i, :, : end - i]
            if begins[end - 1] > begins[i]:
                bias = bias.masked_fill(torch.arange(i, end) < row[i:end, None, None], -math.inf)
            blocks.append((i, end, slice(begins[i], end), bias))
            i = end
        yield blocks


def _scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Compute q k^T with the bias of the block."""
    scores = linear(q, k)
    scores.view(len(bias), -1, len(k))[..., -bias.shape[-1] :] += bias
    return scores
