"""Routed experts: E SwiGLU networks in two stacked matrices, each applied to the tokens that chose it.

One definition, six ways to compute it; shapes and device alone decide which. `by_group` consists of torch's own
differentiable operators and serves wherever no other way is better; the others are for a CPU.

Shapes: N tokens, C experts chosen per token, M = N * C pairs of both, D width, E experts, F expert width.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.batch_invariant import invariant, size_of
from open_mythos.ops.grouped_linear import grouped_linear
from open_mythos.ops.int8 import Int8Weight
from open_mythos.ops.linear import is_traced, linear, linear_by_head, materialize, outer, prefers_compiled_sum
from open_mythos.ops.swiglu import silu_product, swiglu_backward

ExpertWeights = tuple[Tensor, Tensor]
"""gate_up (E, 2 F, D), down (E, D, F)"""
StoredExperts = ExpertWeights | tuple[Int8Weight, Int8Weight]

FEW_PAIRS = 16
"""Number of pairs up to which each is computed alone: sorting them would cost more than reading an expert twice."""
FEW_PRODUCTS = 2**24
"""Multiplications up to which computing every expert for every token is cheaper than sorting the tokens."""
CALL_VALUES = 30_000
"""Values of a weight that are read in the time which calling the operations for a pair costs."""
TOGETHER_VALUES = 2**20
"""Hidden values of all pairs up to which the steps between the products are faster as one call for all experts."""
GROUP_MULTIPLE = 8
"""Rows of a group are padded to a multiple of this: oneDNN compiles a kernel for each shape (0.3 ms), so few shapes."""


def routed_experts(x: Tensor, chosen: Tensor, gates: Tensor, weights: StoredExperts) -> Tensor:
    """Compute the sum over each token's chosen experts of gate * expert(x), by the best way for shapes and device."""
    gate_up, down = weights
    if isinstance(gate_up, Int8Weight) or isinstance(down, Int8Weight):
        # Neither reads an expert that no token chose.
        return (by_pair if chosen.numel() <= FEW_PAIRS else by_expert)(x, chosen, gates, weights)
    weights = gate_up, down
    if x.device.type != "cpu":
        return by_group(x, chosen, gates, weights)
    n_experts, values = gate_up.shape[0], 3 * down.shape[1] * down.shape[2]
    n_rows, n_pairs = (GROUP_MULTIPLE, FEW_PAIRS + 1) if invariant() else (x.shape[0], chosen.numel())
    # A pair reads the weights of one expert, all experts together read each of them once.
    pays = n_pairs <= FEW_PAIRS and n_pairs * (values + CALL_VALUES) <= n_experts * values
    if pays and not is_traced() and not torch.is_grad_enabled():
        return by_pair(x, chosen, gates, weights)
    if pays and prefers_compiled_sum(x):
        return by_gather(x, chosen, gates, weights)
    # In half precision an expert that was never meant for a token could overflow, and zero times infinity is NaN.
    if x.element_size() >= 4 and computes_all(n_rows, chosen.shape[1], down):
        return all_experts(x, chosen, gates, weights)
    if prefers_compiled_sum(x):
        return by_gather(x, chosen, gates, weights)
    if is_traced():
        return by_group(x, chosen, gates, weights)
    if torch.is_grad_enabled():
        return _OneByOne.apply(x, chosen, gates, *weights)
    if n_pairs <= FEW_PAIRS:
        return by_pair(x, chosen, gates, weights)
    is_small = chosen.numel() * gate_up.shape[1] <= TOGETHER_VALUES
    return (by_expert_together if is_small else by_expert)(x, chosen, gates, weights)


def computes_all(n_rows: int, n_chosen: int, down: Tensor) -> bool:
    """Return whether every expert is computed for every token, since sorting so many tokens would take longer."""
    # Eight rows take as long as one: reading the weights is what a product of fewer waits for.
    n_left, values = down.shape[0] - n_chosen, 3 * down.shape[1] * down.shape[2]
    return max(n_rows, GROUP_MULTIPLE) * n_left * values <= FEW_PRODUCTS


def by_group(x: Tensor, chosen: Tensor, gates: Tensor, weights: ExpertWeights) -> Tensor:
    """Compute two grouped products of the tokens sorted by expert. Nothing waits for a GPU; see `grouped_linear`."""
    gate_up, down = weights
    # Sort the pairs by expert: the tokens of an expert are then neighbours.
    order = chosen.flatten().argsort(stable=True)
    counts = torch.zeros(gate_up.shape[0], dtype=torch.int64, device=x.device)
    counts = counts.scatter_add(0, chosen.flatten(), torch.ones_like(order))
    mixed = silu_product(grouped_linear(x[order // chosen.shape[1]], gate_up, counts))
    y = grouped_linear(mixed, down, counts)
    # Back to token order, so that the sum over a token's experts does not depend on the other tokens. For the backward
    # pass index_put keeps the index alone, where index_copy keeps y too.
    y = torch.zeros_like(y).index_put((order,), y).unflatten(0, chosen.shape)
    return (y * gates[..., None]).sum(1)


def all_experts(x: Tensor, chosen: Tensor, gates: Tensor, weights: ExpertWeights) -> Tensor:
    """Compute every expert for every token, as one SwiGLU of width E * F in which a gate of zero silences an expert."""
    gate_up, down = weights
    hidden = linear(x, gate_up.flatten(0, 1)).unflatten(-1, (gate_up.shape[0], -1))
    gate_of = gates.new_zeros(len(x), gate_up.shape[0]).scatter(1, chosen, gates)
    mixed = silu_product(hidden) * gate_of[..., None]
    # One product for each expert and a sum: a single product would need a copy of all of `down`.
    return linear_by_head(mixed, down).sum(1)


def by_pair(x: Tensor, chosen: Tensor, gates: Tensor, weights: StoredExperts) -> Tensor:
    """Compute one matrix-vector product after another, for the few tokens of a decode step. No autograd."""
    gate_up, down = weights
    experts = chosen.tolist()
    hidden = [linear(token, gate_up[i]) for token, mine in zip(x.unbind(), experts, strict=True) for i in mine]
    mixed = silu_product(torch.stack(hidden)).mul_(gates.view(-1, 1)).unbind()
    y = [linear(one, down[i]) for one, i in zip(mixed, chain.from_iterable(experts), strict=True)]
    return torch.stack(y).view(*chosen.shape, -1).sum(1)


def by_gather(x: Tensor, chosen: Tensor, gates: Tensor, weights: ExpertWeights) -> Tensor:
    """Compute sums over the chosen experts' weights, for a compiler: it gathers none of them, and sums in place."""
    gate_up, down = weights
    hidden = (gate_up[chosen] * materialize(x)[:, None, None]).sum(-1)
    mixed = materialize(silu_product(hidden) * gates[..., None])
    return (down[chosen] * mixed[:, :, None]).sum(-1).sum(1)


def by_expert(
    x: Tensor, chosen: Tensor, gates: Tensor, weights: StoredExperts, hiddens: list[Tensor] | None = None
) -> Tensor:
    """Compute one expert after another, so that values between its steps stay in the processor's cache. No autograd.

    Args:
        hiddens: receives gate_up(x) of each expert that has tokens.
    """
    gate_up, down = weights
    out = torch.zeros_like(x)
    for expert, n, tokens, pairs in _groups(chosen, gate_up.shape[0]):
        hidden = linear(x[tokens], gate_up[expert])
        if hiddens is not None:
            hiddens.append(hidden)
        y = linear(silu_product(hidden).mul_(gates.view(-1)[pairs, None]), down[expert])
        # A token's sum runs in the order of its experts, whoever else chose them.
        out.index_add_(0, tokens[:n], y[:n])
    return out


def by_expert_together(x: Tensor, chosen: Tensor, gates: Tensor, weights: ExpertWeights) -> Tensor:
    """Compute what `by_expert` does with a third of its calls, all steps but the products for all experts at once."""
    (gate_up, down), (N, C) = weights, chosen.shape
    # 1. Sort the pairs by expert. `place` is a pair's row in the groups, which are padded behind their own rows.
    flat = chosen.flatten().numpy()
    order = flat.argsort(kind="stable")
    experts, counts = np.unique(flat, return_counts=True)
    sizes = [size_of(n) if invariant() else _padded(n) for n in counts.tolist()]
    first = np.cumsum(sizes) - sizes
    place = np.arange(N * C) + np.repeat(first - (counts.cumsum() - counts), counts)
    # 2. Padding computes the first pair again, for a row of the result that is cut off.
    pairs, target = np.zeros(sum(sizes), dtype=np.int64), np.full(sum(sizes), N)
    pairs[place], target[place] = order, order // C
    rows = x.index_select(0, torch.from_numpy(pairs // C)).split(sizes)
    hidden = torch.cat([linear(part, gate_up[i]) for part, i in zip(rows, experts.tolist(), strict=True)])
    scale = gates.reshape(-1, 1).index_select(0, torch.from_numpy(pairs))
    mixed = silu_product(hidden).mul_(scale).split(sizes)
    y = torch.cat([linear(part, down[i]) for part, i in zip(mixed, experts.tolist(), strict=True)])
    # 3. A token's sum runs in the order of its experts, whoever else chose them.
    return x.new_zeros(N + 1, x.shape[1]).index_add_(0, torch.from_numpy(target), y)[:N]


def _groups(chosen: Tensor, n_experts: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield for each expert with tokens its index, their number n, and indices of tokens and pairs, padded behind n."""
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=n_experts).tolist()
    pairs = F.pad(flat.argsort(stable=True), (0, GROUP_MULTIPLE))
    tokens = pairs // chosen.shape[1]
    start = 0
    for expert, n in enumerate(counts):
        if n:
            end = start + _padded(n)
            yield expert, n, tokens[start:end], pairs[start:end]
        start += n


def _padded(n: int) -> int:
    multiple = GROUP_MULTIPLE if n >= GROUP_MULTIPLE else 1
    return -(-n // multiple) * multiple


class _OneByOne(torch.autograd.Function):
    """`by_expert` with a gradient that saves gate_up(x) of every pair, and nothing else of that size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        hiddens: list[Tensor] = []
        out = by_expert(x, chosen, gates, (gate_up, down), hiddens)
        ctx.save_for_backward(x, chosen, gates, gate_up, down, *hiddens)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override]
        x, chosen, gates, gate_up, down, *hiddens = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            out = by_group(x, chosen, gates, (gate_up, down))
            dx, *dweights = torch.autograd.grad(out, (x, gates, gate_up, down), grad, create_graph=True)
            return dx, None, *dweights
        dx, dgates = torch.zeros_like(x), torch.zeros_like(gates)
        dgate_up, ddown = torch.empty_like(gate_up), torch.empty_like(down)
        idle = set(range(gate_up.shape[0]))
        for (expert, n, tokens, pairs), hidden in zip(_groups(chosen, gate_up.shape[0]), hiddens, strict=True):
            idle.remove(expert)
            dy = grad[tokens]
            dy[n:] = 0
            dmixed = linear(dy, down[expert].T)
            dhidden, mixed, dscale = swiglu_backward(hidden, dmixed, gates.view(-1)[pairs, None])
            if dscale is not None:
                dgates.view(-1)[pairs[:n]] = dscale[:n]
            ddown[expert] = outer(dy, mixed)
            dgate_up[expert] = outer(dhidden, x[tokens])
            dx.index_add_(0, tokens[:n], linear(dhidden, gate_up[expert].T)[:n])
        for expert in idle:
            dgate_up[expert], ddown[expert] = 0, 0
        return dx, None, dgates, dgate_up, ddown
