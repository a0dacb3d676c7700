"""The loop one step at a time, which every analysis starts from. Halting is off: every token runs every loop.

Shapes: B rows, T tokens, D width, L loops, V vocabulary, N chosen tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from open_mythos.checks import check_int
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import check_n_loops
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.initial_state import initial_state
from open_mythos.nn.inputs import check_ids, check_room
from open_mythos.nn.view import View


class States(NamedTuple):
    """The states of prompts, and what their loops need besides."""

    hidden: Tensor  # (L + 1, B, T, D): before the first loop, then after each
    e: Tensor  # (B, T, D), the prelude's output, which every loop gets
    view: View


def begin(model: OpenMythos, input_ids: Tensor) -> tuple[Tensor, Tensor, View]:
    """Compute the first state and the prelude's output, (B, T, D) each, of prompts (B, T) without padding.

    Raises:
        TypeError, ValueError: the ids are unusable, or the model has no loop.
    """
    check_ids(input_ids, model.cfg)
    check_room(input_ids, None, model.cfg, model.dtype, model.device)
    if model.recurrent is None:
        raise ValueError("recurrent_layers=0 makes a plain transformer; an analysis of loops needs a model with a loop")
    view = model.make_view((input_ids.shape[0], input_ids.shape[1]))
    e = model.encode(input_ids, view)
    return initial_state(model.cfg.initial_state, e, view, std=model.cfg.state_std), e, view


def run(model: OpenMythos, h: Tensor, e: Tensor, loops: range, view: View) -> list[Tensor]:
    """Run loops of these indices on the state h (B, T, D), and return h and the state after each."""
    states = [h]
    for index in loops:
        states.append(model.recur(states[-1], e, torch.full((len(h),), index, device=h.device), view))
    return states


def unroll(model: OpenMythos, input_ids: Tensor, n_loops: int | None = None, deepest: int = 4096) -> States:
    """Compute every state of `n_loops` loops (None: `max_loop_iters`); the caller has a use for `deepest` at most."""
    n_loops = check_n_loops(n_loops, model.cfg)
    check_int("n_loops", n_loops, 1, deepest)
    with evaluating(model):
        h, e, view = begin(model, input_ids)
        return States(torch.stack(run(model, h, e, range(n_loops), view)), e, view)


def chosen(x: Tensor, where: Tensor | None) -> Tensor:
    """Choose the tokens of (..., B, T, K) at which `where` (B, T) is true, or all: (..., N, K), row by row."""
    return x.flatten(-3, -2) if where is None else x[..., where, :]


def log_probs(model: OpenMythos, h: Tensor, view: View, where: Tensor | None = None) -> Tensor:
    """Read the state (B, T, D) out through coda and head: log-probabilities (N, V) in at least float32."""
    logits = chosen(model.readout(h, view), where)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute KL(p || q) in nats over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
