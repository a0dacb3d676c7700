"""The effect of the input that every loop gets again: weaken it, or put another prompt's in its place.

Shapes: B rows, T tokens, D width, L loops, M more loops, F factors, N chosen tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.section import Section, Subject, figure, numbers, table
from open_mythos.analysis.unroll import kl, log_probs, run, unroll
from open_mythos.config import MAX_LOOPS
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.reports.document import Part, Table

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Attenuation:
    """KL(p || p with e scaled) at the output after L loops, nats, mean over the chosen tokens."""

    factors: tuple[float, ...]
    every_loop: Tensor  # (F,), e scaled in all loops
    one_loop: Tensor  # (F, L), e scaled in that loop alone
    same_choice: Tensor  # (F,), share of tokens whose first choice stays, e scaled in all loops


def attenuate(
    model: OpenMythos,
    input_ids: Tensor,
    n_loops: int | None = None,
    where: Tensor | None = None,
    factors: Sequence[float] = FACTORS,
) -> Attenuation:
    """Scale e, but not the first state, by each factor."""
    hidden, e, view = unroll(model, input_ids, n_loops)
    L = len(hidden) - 1
    every, one, same = [], [], []
    with evaluating(model):
        whole = log_probs(model, hidden[-1], view, where)
        for factor in factors:
            p = log_probs(model, run(model, hidden[0], factor * e, range(L), view)[-1], view, where)
            every.append(kl(whole, p).mean())
            same.append((p.argmax(-1) == whole.argmax(-1)).double().mean())
            scaled = (run(model, hidden[t], factor * e, range(t, t + 1), view)[-1] for t in range(L))
            ends = (run(model, h, e, range(t, L), view)[-1] for t, h in enumerate(scaled, 1))
            one.append(torch.stack([kl(whole, log_probs(model, h, view, where)).mean() for h in ends]))
    return Attenuation(tuple(factors), torch.stack(every), torch.stack(one), torch.stack(same))


@dataclass(frozen=True)
class Swap:
    """Whose answer the model gives when another prompt's e takes the place of its own, over tokens where both differ.

    `new` and `old` are shares of tokens whose first choice is the other prompt's or the own prompt's; the rest has a
    third answer. `nearer` is the share whose distribution is nearer (KL) to the other's than to the own.
    """

    n_tokens: int  # chosen tokens at which the two prompts' first choices differ
    new_at: Tensor  # (L + 1,), L loops in all, the new e from loop t on (0: in all loops, L: in none)
    old_at: Tensor
    nearer_at: Tensor
    new_after: Tensor  # (M + 1,), the new e for m more loops after L loops with the old one
    old_after: Tensor
    nearer_after: Tensor


def swap(
    model: OpenMythos,
    input_ids: Tensor,
    other_ids: Tensor,
    n_loops: int | None = None,
    where: Tensor | None = None,
    n_more: int | None = None,
) -> Swap:
    """Put `other_ids`' e into the loops of `input_ids`, both (B, T); the state is never swapped.

    Args:
        n_more: M; None: as many as `n_loops`.

    Raises:
        ValueError: the shapes differ, or there are more than 4096 loops.
    """
    if input_ids.shape != other_ids.shape:
        shapes = f"{tuple(input_ids.shape)} and {tuple(other_ids.shape)}"
        raise ValueError(f"input_ids and other_ids have shapes {shapes}; give prompts of equally many tokens")
    (hidden, _, view), others = unroll(model, input_ids, n_loops), unroll(model, other_ids, n_loops)
    e, L = others.e, len(hidden) - 1
    M = L if n_more is None else n_more
    if L + M > MAX_LOOPS:
        raise ValueError(f"n_more={M} after {L} loops is beyond {MAX_LOOPS} loops; use n_more={MAX_LOOPS - L} or less")
    with evaluating(model):
        old, new = log_probs(model, hidden[-1], view, where), log_probs(model, others.hidden[-1], others.view, where)
        differ = old.argmax(-1) != new.argmax(-1)

        def judge(h: Tensor) -> Tensor:
            p = log_probs(model, h, view, where)[differ]
            a, b = old[differ], new[differ]
            follows = [p.argmax(-1) == b.argmax(-1), p.argmax(-1) == a.argmax(-1), kl(b, p) < kl(a, p)]
            return torch.stack([x.double().mean() for x in follows])

        at = [judge(run(model, hidden[t], e, range(t, L), view)[-1]) for t in range(L + 1)]
        later = [judge(h) for h in run(model, hidden[-1], e, range(L, L + M), view)]
    return Swap(int(differ.sum()), *torch.stack(at, dim=1), *torch.stack(later, dim=1))


def section(subject: Subject) -> Section:
    """Describe what a weaker input and another prompt's input do to the answers."""
    L = subject.n_loops
    weaker = attenuate(subject.model, subject.input_ids, L, subject.where)
    swapped = swap(subject.model, subject.input_ids, subject.other_ids, L, subject.where)
    half = weaker.factors.index(0.5)
    finding = (
        f"With half the input in every loop {weaker.same_choice[half]:.0%} of the first choices stay (KL "
        f"{weaker.every_loop[half]:.3f} nats). "
    )
    rows = [
        [f"{f:g}", f"{all_loops:.3f}", f"{same:.2f}", *(f"{x:.3f}" for x in one)]
        for f, all_loops, same, one in zip(
            weaker.factors, weaker.every_loop, weaker.same_choice, weaker.one_loop, strict=True
        )
    ]
    head = ["input times", "KL, every loop", "same choice", *(f"KL, loop {t + 1}" for t in range(L))]
    caption, label = "Effect of a weaker or stronger input in every loop on the answer.", "KL at the output, nats"
    drawn = figure("attenuation", caption, {"all loops": weaker.every_loop}, label, "input times", weaker.factors)
    parts: list[Part] = [Table(head, rows), drawn]
    if swapped.n_tokens:
        turned = (swapped.new_after > 0.5).nonzero()[:, 0].tolist()
        when = f"after {turned[0]} more loops." if turned else f"at no time in {L} more loops."
        finding += f"With another prompt's input after {L} loops, most answers are the other prompt's {when}"
        by_loops = table(
            "loops",
            range(L + 1),
            ("swapped at this loop: new", swapped.new_at, ".2f"),
            ("old", swapped.old_at, ".2f"),
            ("nearer new", swapped.nearer_at, ".2f"),
            ("so many loops after: new", swapped.new_after, ".2f"),
            ("old", swapped.old_after, ".2f"),
            ("nearer new", swapped.nearer_after, ".2f"),
        )
        curves = {"the other prompt's answer": swapped.new_after, "the own answer": swapped.old_after}
        caption = f"Whose answer the model gives after the input was swapped, {swapped.n_tokens} tokens."
        drawn = figure("swap", caption, curves, "share of tokens", x="loops since the swap")
        where = f"Another prompt's input, at {swapped.n_tokens} positions where the two answers differ:"
        parts += [where, by_loops, drawn]
    else:
        finding += "The two prompts' answers nowhere differ, so a swap tells nothing: give --swap."
    return Section("The input in every loop", finding, numbers({"attenuation": weaker, "swap": swapped}), parts)
