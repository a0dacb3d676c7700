"""The answer at every number of loops: is it right, and is it still the same?

Shapes: B rows, T tokens, L loops, N scored tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.section import Section, Subject, figure, numbers, some, table
from open_mythos.analysis.unroll import kl, log_probs, unroll
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating

IGNORE = -100
NEAR = 0.001
"""Nats above the lowest loss that count as no difference."""


@dataclass(frozen=True)
class Sweep:
    """Means over the scored tokens, (L,) for 1, 2, ... L loops."""

    loops: Tensor
    loss: Tensor  # nats per token
    accuracy: Tensor  # share of tokens whose first choice is the label
    kl_to_reference: Tensor  # nats, KL(p at the reference depth || p here)
    same_choice: Tensor  # share of tokens whose first choice is that at the reference depth
    reference: int  # `max_loop_iters`, or L if that is less


def depth_sweep(model: OpenMythos, input_ids: Tensor, labels: Tensor, n_loops: int | None = None) -> Sweep:
    """Score the read-out after every loop, with halting off.

    Args:
        labels: (B, T) int64, the right token at each position; -100 where none is scored.

    Raises:
        ValueError: no position is scored.
    """
    where = labels != IGNORE
    if not where.any():
        raise ValueError("labels has no place to score; a text needs at least two tokens")
    hidden, _, view = unroll(model, input_ids, n_loops)
    reference = min(model.cfg.max_loop_iters, len(hidden) - 1)
    right = labels[where]
    rows = []
    with evaluating(model):
        expected = log_probs(model, hidden[reference], view, where)
        for h in hidden[1:]:
            log_p = log_probs(model, h, view, where)
            loss, choice = -log_p.gather(-1, right[:, None])[:, 0], log_p.argmax(-1)
            values = [loss, choice == right, kl(expected, log_p), choice == expected.argmax(-1)]
            rows.append(torch.stack([x.double().mean() for x in values]))
    return Sweep(torch.arange(1, len(hidden)), *torch.stack(rows, dim=1), reference)


def section(subject: Subject) -> Section:
    """Describe how the loss depends on the number of loops."""
    found = depth_sweep(subject.model, subject.input_ids, subject.labels, subject.n_beyond)
    near = 1 + int((found.loss <= found.loss.min() + NEAR).int().argmax())
    n = found.reference
    finding = (
        f"The loss is {found.loss[0]:.3f} nats per token at 1 loop, {found.loss[n - 1]:.3f} at the trained {n} and "
        f"{found.loss[-1]:.3f} at {subject.n_beyond}; {near} loops come within {NEAR:g} of the lowest."
    )
    by_loops = table(
        "loops",
        some(subject.n_beyond, near, n),
        ("loss", found.loss, ".3f"),
        ("accuracy", found.accuracy, ".3f"),
        (f"KL to {n} loops", found.kl_to_reference, ".3f"),
        (f"same choice as at {n}", found.same_choice, ".3f"),
        first=1,
    )
    drawn = figure("sweep", "Loss by loops.", {"loss": found.loss}, "nats per token", first=1)
    return Section("Depth sweep", finding, numbers(found), [by_loops, drawn])
