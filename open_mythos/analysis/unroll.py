"""The loop one step at a time: what every analysis starts from. Halting is off: every token runs every loop.

Shapes: B rows, T tokens, D width, L loops, V vocabulary, N chosen tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.checks import check_int
from open_mythos.model import OpenMythos
from open_mythos.nn.cache import View
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.initial_state import initial_state
from open_mythos.nn.inputs import check_ids, check_n_loops, check_room


@dataclass(frozen=True)
class Call:
    """Prompts before their first loop."""

    e: Tensor
    """(B, T, D), the prelude's output, which every loop gets."""
    h: Tensor
    """(B, T, D), the state before the first loop."""
    view: View


def begin(model: OpenMythos, input_ids: Tensor) -> Call:
    """Embedding, prelude and the first state of prompts (B, T) without padding.

    Raises:
        TypeError, ValueError: the ids are unusable, or the model has no loop.
    """
    check_ids(input_ids, model.cfg)
    check_room(input_ids, None, model.cfg, model.dtype, model.device)
    if model.recurrent is None:
        raise ValueError("recurrent_layers=0 makes a plain transformer; an analysis of loops needs a model with a loop")
    view = model.make_view((input_ids.shape[0], input_ids.shape[1]))
    e = model.encode(input_ids, view)
    return Call(e, initial_state(model.cfg.initial_state, e, view), view)


def step(model: OpenMythos, h: Tensor, e: Tensor, loop_index: int, view: View) -> Tensor:
    """The state after the loop of that index, (B, T, D)."""
    return model.recur(h, e, torch.full((h.shape[0],), loop_index, device=h.device), view)


def run(model: OpenMythos, h: Tensor, e: Tensor, loops: range, view: View) -> Iterator[Tensor]:
    """The states after each of the loops."""
    for t in loops:
        h = step(model, h, e, t, view)
        yield h


def after(model: OpenMythos, h: Tensor, e: Tensor, loops: range, view: View) -> Tensor:
    """The state after all of the loops; h itself if there are none."""
    for state in run(model, h, e, loops, view):
        h = state
    return h


@dataclass(frozen=True)
class States:
    """What the loops made of prompts."""

    hidden: Tensor
    """(L + 1, B, T, D): before the first loop, then after each."""
    call: Call


def unroll(model: OpenMythos, input_ids: Tensor, n_loops: int | None = None, deepest: int = 4096) -> States:
    """Every state of `n_loops` loops (None: `max_loop_iters`); `deepest` is the most that the caller can use."""
    n_loops = check_n_loops(n_loops, model.cfg)
    check_int("n_loops", n_loops, 1, deepest)
    with evaluating(model):
        call = begin(model, input_ids)
        hidden = torch.stack([call.h, *run(model, call.h, call.e, range(n_loops), call.view)])
    return States(hidden, call)


def chosen(x: Tensor, where: Tensor | None) -> Tensor:
    """(..., B, T, K) -> (..., N, K): the tokens at which `where` (B, T) is true, or all of them, row by row."""
    return x.flatten(-3, -2) if where is None else x[..., where, :]


def log_probs(model: OpenMythos, h: Tensor, view: View, where: Tensor | None = None) -> Tensor:
    """What coda and head read off a state (B, T, D): log-probabilities (N, V) in at least float32."""
    logits = chosen(model.readout(h, view), where)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
