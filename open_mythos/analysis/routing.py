"""Which experts each loop calls.

Shapes: B rows, T tokens, L loops, N chosen tokens, R recurrent layers, E experts, C experts chosen per token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.unroll import chosen, unroll
from open_mythos.model import OpenMythos
from open_mythos.nn.moe import MoEFFN


@dataclass(frozen=True)
class Routing:
    """The routed experts of every token, loop and recurrent layer."""

    experts: Tensor
    """(L, R, N, C) int64"""
    load: Tensor
    """(L, R, E), each expert's share of the choices; 1 / E is even"""
    load_entropy: Tensor
    """(L, R), entropy of the load over log E: 1 is even, 0 is one expert for all"""
    changed: Tensor
    """(L - 1, R), share of tokens whose set of experts is another one in the next loop"""
    kept: Tensor
    """(L - 1, R), mean share of a token's experts that the next loop calls again"""
    kept_by_chance: Tensor
    """(L - 1, R), the same with the next loop's set of another token, mean over all others: what the load alone would
    keep; NaN for one token"""


def routing(
    model: OpenMythos, input_ids: Tensor, n_loops: int | None = None, where: Tensor | None = None
) -> Routing | None:
    """Run the loops and note every choice; None for a model without experts."""
    if not model.cfg.n_experts or model.recurrent is None:
        return None
    ffns = [block.ffn for block in model.recurrent.blocks if isinstance(block.ffn, MoEFFN)]
    seen: list[list[Tensor]] = [[] for _ in ffns]

    def note(ffn: MoEFFN, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        experts = ffn.route(x.flatten(0, 1))[1].view(*x.shape[:2], -1)
        seen[ffns.index(ffn)].append(chosen(experts, where))

    hooks = [ffn.register_forward_pre_hook(note) for ffn in ffns]
    try:
        unroll(model, input_ids, n_loops)
    finally:
        for hook in hooks:
            hook.remove()
    experts = torch.stack([torch.stack(loops) for loops in seen], dim=1)
    return tally(experts, model.cfg.n_experts)


def tally(experts: Tensor, n_experts: int) -> Routing:
    """Count choices (L, R, N, C) of `n_experts`."""
    L, R, N, C = experts.shape
    member = torch.zeros(L, R, N, n_experts, dtype=torch.bool, device=experts.device).scatter(-1, experts, True)
    load = member.double().mean(2) / C
    entropy = -torch.special.xlogy(load, load).sum(-1) / math.log(max(2, n_experts))
    kept = (member[1:] & member[:-1]).sum(-1) / C
    # All pairs of tokens, less each with itself.
    called = member.sum(2).double()
    pairs = (called[1:] * called[:-1]).sum(-1) / C - kept.double().sum(-1)
    return Routing(
        experts=experts,
        load=load,
        load_entropy=entropy,
        changed=(kept < 1).double().mean(-1),
        kept=kept.double().mean(-1),
        kept_by_chance=pairs / (N * (N - 1)),
    )
