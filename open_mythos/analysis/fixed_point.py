"""Where the state ends: at a fixed point, on an orbit, or does it keep moving?

Shapes: B rows, T tokens, D width, L loops, N chosen tokens.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.unroll import chosen, unroll
from open_mythos.model import OpenMythos

STILL = 1e-3
"""A state rests if no step of the last quarter of the loops is longer than this share of it."""
RETURNS = 0.1
"""A state is on an orbit if after p loops it is back within this share of a step, all through the last quarter."""
SHRINKS = 0.25
"""A state comes to rest if the steps at the end are at most this share of those half-way; 1/t comes to 1/2."""
STRAIGHT = 0.5
"""A state drifts if the last half of its way leads this far away, as a share of the way's length."""
KINDS = ("fixed", "shrinking", "orbit", "drift", "wander")
"""Tried in this order; `wander` is what is left: it moves on, goes nowhere, and has no period that was seen."""
FEWEST = 8
"""Fewer loops than this say nothing about where a state ends."""


@dataclass(frozen=True)
class Motion:
    """How each token's state moves, loop by loop, and where that leads."""

    step: Tensor
    """(L, N), |h_t - h_t-1| / |h_t|: the relative residual"""
    cosine: Tensor
    """(L, N), of h_t and h_t-1"""
    turn: Tensor
    """(L - 1, N), cosine of one step and the next: 1 straight on, 0 square, -1 back"""
    norm: Tensor
    """(L + 1, N), |h_t| / sqrt(D)"""
    kind: list[str]
    """N of `KINDS`"""
    period: Tensor
    """(N,) int64, of the orbits; 0 elsewhere"""

    @property
    def shares(self) -> dict[str, float]:
        """Share of the tokens of each kind."""
        count = Counter(self.kind)
        return {kind: count[kind] / len(self.kind) for kind in KINDS}


def follow(model: OpenMythos, input_ids: Tensor, n_loops: int | None = None, where: Tensor | None = None) -> Motion:
    """Run `n_loops` loops, of which there should be several times as many as were trained (None: four times)."""
    n_loops = 4 * model.cfg.max_loop_iters if n_loops is None else n_loops
    return motion(chosen(unroll(model, input_ids, n_loops).hidden, where))


def motion(hidden: Tensor) -> Motion:
    """Judge states (L + 1, N, D).

    Raises:
        ValueError: there are fewer than `FEWEST` loops.
    """
    L = len(hidden) - 1
    if L < FEWEST:
        raise ValueError(f"n_loops={L} is too few to tell where a state ends; use n_loops={FEWEST} or more")
    h = hidden.double()
    steps = h.diff(dim=0)
    length, size = steps.norm(dim=-1), h.norm(dim=-1)
    tiny = torch.finfo(torch.float64).tiny
    relative = length / size[1:].clamp(min=tiny)
    quarter = max(2, L // 4)

    # What each kind asks for; the first that is given what it asks decides.
    fixed = (relative[-quarter:] <= STILL).all(0)
    eighth = max(1, L // 8)
    shrinking = length[-eighth:].mean(0) <= SHRINKS * length[L // 2 : L // 2 + eighth].mean(0)
    period = torch.zeros(h.shape[1], dtype=torch.int64, device=h.device)
    for p in range(quarter, 1, -1):
        back = (h[-quarter:] - h[-quarter - p : -p]).norm(dim=-1)
        period[(back <= RETURNS * length[-quarter:]).all(0)] = p
    away = (h[-1] - h[L // 2]).norm(dim=-1)
    straight = away > STRAIGHT * length[L // 2 :].sum(0)
    met = torch.stack([fixed, shrinking, period > 0, straight, torch.ones_like(fixed)])
    which = met.int().argmax(0).tolist()
    kind = [KINDS[i] for i in which]
    period = period * torch.tensor([k == "orbit" for k in kind], device=h.device)
    cosine = torch.cosine_similarity(h[1:], h[:-1], dim=-1)
    turn = torch.cosine_similarity(steps[1:], steps[:-1], dim=-1)
    return Motion(relative, cosine, turn, size / h.shape[-1] ** 0.5, kind, period)
