"""What the input that every loop gets again is worth: weaken it, or put another prompt's in its place.

Shapes: B rows, T tokens, D width, L loops, F factors, N chosen tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.unroll import after, kl, log_probs, run, step, unroll
from open_mythos.config import MAX_LOOPS
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Attenuation:
    """KL(p || p with e scaled) at the output after L loops, nats, mean over the chosen tokens."""

    factors: tuple[float, ...]
    every_loop: Tensor
    """(F,), e scaled in all loops"""
    one_loop: Tensor
    """(F, L), e scaled in that loop alone"""
    same_choice: Tensor
    """(F,), share of tokens whose first choice stays, e scaled in all loops"""


def attenuate(
    model: OpenMythos,
    input_ids: Tensor,
    n_loops: int | None = None,
    where: Tensor | None = None,
    factors: Sequence[float] = FACTORS,
) -> Attenuation:
    """Scale e, but not the first state, by each factor."""
    states = unroll(model, input_ids, n_loops)
    hidden, call, L = states.hidden, states.call, len(states.hidden) - 1
    every, one, same = [], [], []
    with evaluating(model):
        whole = log_probs(model, hidden[-1], call.view, where)
        for factor in factors:
            scaled = factor * call.e
            p = log_probs(model, after(model, call.h, scaled, range(L), call.view), call.view, where)
            every.append(kl(whole, p).mean())
            same.append((p.argmax(-1) == whole.argmax(-1)).double().mean())
            row = []
            for t in range(L):
                h = step(model, hidden[t], scaled, t, call.view)
                h = after(model, h, call.e, range(t + 1, L), call.view)
                row.append(kl(whole, log_probs(model, h, call.view, where)).mean())
            one.append(torch.stack(row))
    return Attenuation(tuple(factors), torch.stack(every), torch.stack(one), torch.stack(same))


@dataclass(frozen=True)
class Swap:
    """Whose answer it is when another prompt's e takes the place of the own: over tokens where the two differ.

    A share is of tokens whose first choice is the other prompt's (new), or the own prompt's (old); the rest says a
    third thing. Nearer: share of tokens whose distribution is nearer (KL) to the other's than to the own.
    """

    n_tokens: int
    """chosen tokens; those at which the two prompts' first choices differ"""
    new_at: Tensor
    """(L + 1,), L loops in all, the new e from loop t on (0: in all loops, L: in none)"""
    old_at: Tensor
    """(L + 1,)"""
    nearer_at: Tensor
    """(L + 1,)"""
    new_after: Tensor
    """(M + 1,), the new e for m more loops after L loops with the old one"""
    old_after: Tensor
    """(M + 1,)"""
    nearer_after: Tensor
    """(M + 1,)"""


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
    states, others = unroll(model, input_ids, n_loops), unroll(model, other_ids, n_loops)
    call, L = states.call, len(states.hidden) - 1
    M = L if n_more is None else n_more
    if L + M > MAX_LOOPS:
        raise ValueError(f"n_more={M} after {L} loops is beyond {MAX_LOOPS} loops; use n_more={MAX_LOOPS - L} or less")
    with evaluating(model):
        old, new = (log_probs(model, s.hidden[-1], s.call.view, where) for s in (states, others))
        differ = old.argmax(-1) != new.argmax(-1)

        def judge(h: Tensor) -> Tensor:
            p = log_probs(model, h, call.view, where)[differ]
            a, b = old[differ], new[differ]
            follows = [p.argmax(-1) == b.argmax(-1), p.argmax(-1) == a.argmax(-1), kl(b, p) < kl(a, p)]
            return torch.stack([x.double().mean() for x in follows])

        e = others.call.e
        at = [judge(after(model, states.hidden[t], e, range(t, L), call.view)) for t in range(L + 1)]
        later = [judge(h) for h in (states.hidden[-1], *run(model, states.hidden[-1], e, range(L, L + M), call.view))]
    return Swap(int(differ.sum()), *torch.stack(at, dim=1), *torch.stack(later, dim=1))
