"""The answer at every number of loops: is it right, and is it still the same?

Shapes: B rows, T tokens, L loops, N scored tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.unroll import kl, log_probs, unroll
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating

IGNORE = -100


@dataclass(frozen=True)
class Sweep:
    """Means over the scored tokens; one value for 1, 2, ... L loops."""

    loops: Tensor
    """(L,) int64"""
    loss: Tensor
    """(L,) nats per token"""
    accuracy: Tensor
    """(L,) share of tokens whose first choice is the label"""
    kl_to_reference: Tensor
    """(L,) nats, KL(p at the reference depth || p here)"""
    same_choice: Tensor
    """(L,) share of tokens whose first choice is that at the reference depth"""
    reference: int
    """the depth compared with: `max_loop_iters`, or L if that is less"""


def depth_sweep(model: OpenMythos, input_ids: Tensor, labels: Tensor, n_loops: int | None = None) -> Sweep:
    """Score the read-out after every loop, halting off.

    Args:
        labels: (B, T) int64, the right token at each place; -100 where none is scored.

    Raises:
        ValueError: no place is scored.
    """
    where = labels != IGNORE
    if not where.any():
        raise ValueError("labels has no place to score; a text needs at least two tokens")
    states = unroll(model, input_ids, n_loops)
    L = len(states.hidden) - 1
    reference = min(model.cfg.max_loop_iters, L)
    right = labels[where]
    rows = []
    with evaluating(model):
        expected = log_probs(model, states.hidden[reference], states.call.view, where)
        for h in states.hidden[1:]:
            log_p = log_probs(model, h, states.call.view, where)
            loss = -log_p.gather(-1, right[:, None])[:, 0]
            choice = log_p.argmax(-1)
            values = [loss, (choice == right), kl(expected, log_p), (choice == expected.argmax(-1))]
            rows.append(torch.stack([x.double().mean() for x in values]))
    loss, accuracy, divergence, same = torch.stack(rows, dim=1)
    return Sweep(torch.arange(1, L + 1), loss, accuracy, divergence, same, reference)
