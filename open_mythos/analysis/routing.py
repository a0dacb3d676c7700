"""The experts that each loop calls.

Shapes: B rows, T tokens, L loops, N chosen tokens, R recurrent layers, E experts, C experts chosen per token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.section import Section, Subject, figure, numbers, table
from open_mythos.analysis.unroll import chosen, unroll
from open_mythos.model import OpenMythos
from open_mythos.nn.moe import MoEFFN


@dataclass(frozen=True)
class Routing:
    """The routed experts of every token, loop and recurrent layer."""

    experts: Tensor  # (L, R, N, C) int64
    load: Tensor  # (L, R, E), each expert's share of the choices; 1 / E is even
    load_entropy: Tensor  # (L, R), entropy of the load over log E: 1 is even, 0 is one expert for all
    changed: Tensor  # (L - 1, R), share of tokens whose set of experts is another one in the next loop
    kept: Tensor  # (L - 1, R), mean share of a token's experts that the next loop calls again
    kept_by_chance: Tensor
    """(L - 1, R), the same share with the next loop's set of another token, mean over all others: what the load alone
    would keep; NaN for one token."""


def routing(
    model: OpenMythos, input_ids: Tensor, n_loops: int | None = None, where: Tensor | None = None
) -> Routing | None:
    """Run the loops and record every choice; None for a model without experts."""
    if not model.cfg.n_experts or model.recurrent is None:
        return None
    ffns = [block.ffn for block in model.recurrent.blocks if isinstance(block.ffn, MoEFFN)]
    seen: list[Tensor] = []

    def note(ffn: MoEFFN, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        seen.append(chosen(ffn.route(x.flatten(0, 1))[1].view(*x.shape[:2], -1), where))

    hooks = [ffn.register_forward_pre_hook(note) for ffn in ffns]
    try:
        unroll(model, input_ids, n_loops)
    finally:
        for hook in hooks:
            hook.remove()
    return tally(torch.stack(seen).unflatten(0, (-1, len(ffns))), model.cfg.n_experts)


def tally(experts: Tensor, n_experts: int) -> Routing:
    """Count choices (L, R, N, C) of `n_experts`."""
    L, R, N, C = experts.shape
    member = torch.zeros(L, R, N, n_experts, dtype=torch.bool, device=experts.device).scatter(-1, experts, True)
    load = member.double().mean(2) / C
    entropy = -torch.special.xlogy(load, load).sum(-1) / math.log(max(2, n_experts))
    kept = (member[1:] & member[:-1]).sum(-1) / C
    # Count over all pairs of tokens, then subtract each token with itself.
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


def section(subject: Subject) -> Section:
    """Describe how the experts change from loop to loop."""
    found, title = routing(subject.model, subject.input_ids, subject.n_loops, subject.where), "Experts by loop"
    if found is None:
        return Section(title, "The model has no experts.", {})
    if subject.n_loops < 2:
        return Section(title, "One loop has no next loop to compare with.", numbers(found))
    kept, chance, changed = (x.mean(1) for x in (found.kept, found.kept_by_chance, found.changed))
    finding = (
        f"From one loop to the next {changed.mean():.0%} of the tokens change their set of experts; of its experts a "
        f"token keeps {kept.mean():.0%} (by the load alone it would be {chance.mean():.0%})."
    )
    by_loop = table(
        "loop",
        range(1, subject.n_loops + 1),
        ("set changes in the next", changed, ".2f"),
        ("experts kept", kept, ".2f"),
        ("by chance", chance, ".2f"),
        ("load entropy", found.load_entropy.mean(1), ".3f"),
        ("largest load times even", found.load.amax((1, 2)) * found.load.shape[-1], ".1f"),
        first=1,
    )
    curves = {"kept": kept, "kept by chance": chance, "set changes": changed}
    drawn = figure("experts", "Experts from each loop to the next.", curves, "share", first=1)
    return Section(title, finding, numbers(found), [by_loop, drawn])
