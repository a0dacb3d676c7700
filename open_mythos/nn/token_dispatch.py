"""Experts that are spread over processes: tokens travel to the process of their expert, and results back.

Every process of the group has to take part in each call, also with no tokens, and again in its backward pass.

Shapes: N tokens, C experts chosen per token, M = N * C pairs of both, D width, P processes, E experts of each.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def dispatch_and_combine(
    x: Tensor,
    chosen: Tensor,
    gates: Tensor,
    n_here: int,
    group: dist.ProcessGroup,
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Compute the sum over each token's chosen experts of gate * expert(x): x (N, D), chosen, gates (N, C) -> (N, D).

    Args:
        n_here: E.
        experts: computes the same for this process's experts, numbered from 0.
    """
    # 1. Every process learns how many tokens each other process has for each of its experts. Pairs sorted by expert
    # are sorted by process too, since process p owns the experts p * E to (p + 1) * E - 1.
    order = chosen.flatten().argsort(stable=True)
    sent = torch.zeros(n_here * group.size(), dtype=torch.int64, device=x.device)
    sent = sent.scatter_add(0, chosen.flatten(), torch.ones_like(order)).view(-1, n_here)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    # The only thing that the host waits for.
    n_sent, n_got = torch.stack((sent.sum(1), got.sum(1))).tolist()
    # 2. Tokens travel to the processes of their experts.
    tokens = Exchange.apply(x[order // chosen.shape[1]], n_sent, n_got, group)
    # They arrive by process, and from each by expert: the counts alone say which expert each is for.
    expert = torch.arange(n_here, device=x.device).repeat(group.size())
    expert = expert.repeat_interleave(got.flatten(), output_size=sum(n_got))
    # A row of zeros for the first expert: experts that get no token at all have a gradient too, which is zero.
    tokens = torch.cat((tokens, tokens.new_zeros(1, tokens.shape[1])))
    expert = torch.cat((expert, expert.new_zeros(1)))[:, None]
    # A gate of 1 here: the sender applies the gates, so they never travel.
    y = experts(tokens, expert, torch.ones_like(expert, dtype=gates.dtype))[:-1]
    # 3. Results travel back, and each token sums those of its experts.
    y = Exchange.apply(y, n_got, n_sent, group)
    # Undo the sort of step 1, then add up each token's C results under its gates.
    y = torch.zeros_like(y).index_put((order,), y).unflatten(0, chosen.shape)
    return (y * gates[..., None].to(y.dtype)).sum(1)


class Exchange(torch.autograd.Function):
    """Rows for each process in turn -> rows from each process in turn; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n_sent: list[int], n_got: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way = n_sent, n_got, group
        out = x.new_empty(sum(n_got), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), n_got, n_sent, group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override]
        n_sent, n_got, group = ctx.way
        return Exchange.apply(grad, n_got, n_sent, group), None, None, None
