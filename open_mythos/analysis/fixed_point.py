"""Where the state ends: at a fixed point, on an orbit, or does it keep moving?

Shapes: B rows, T tokens, D width, L loops, N chosen tokens.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.section import Section, Subject, figure, numbers, some, table
from open_mythos.analysis.unroll import chosen, unroll
from open_mythos.model import OpenMythos

STILL = 1e-3
"""A state rests if no step of the last quarter of the loops is longer than this share of it."""
RETURNS = 0.1
"""A state is on an orbit if after p loops it is back within this share of a step, all through the last quarter."""
SHRINKS = 0.25
"""A state comes to rest if the steps at the end are at most this share of those half-way; steps of 1/t give 1/2."""
STRAIGHT = 0.5
"""A state drifts if the last half of its way leads this far away, as a share of the way's length."""
KINDS = ("fixed", "shrinking", "orbit", "drift", "wander")
"""Kinds of motion, the first that applies; `wander` is the rest: no rest, no progress, and no period in sight."""
FEWEST = 8
"""Loops needed to say anything about where a state ends."""


@dataclass(frozen=True)
class Motion:
    """How each token's state moves, loop by loop, and where that leads."""

    step: Tensor  # (L, N), |h_t - h_t-1| / |h_t|: the relative residual
    cosine: Tensor  # (L, N), of h_t and h_t-1
    turn: Tensor  # (L - 1, N), cosine of one step and the next: 1 straight on, 0 square, -1 back
    norm: Tensor  # (L + 1, N), |h_t| / sqrt(D)
    kind: list[str]  # N of `KINDS`
    period: Tensor  # (N,) int64, of the orbits; 0 elsewhere

    @property
    def shares(self) -> dict[str, float]:
        """Share of the tokens of each kind."""
        count = Counter(self.kind)
        return {kind: count[kind] / len(self.kind) for kind in KINDS}


def follow(model: OpenMythos, input_ids: Tensor, n_loops: int | None = None, where: Tensor | None = None) -> Motion:
    """Run `n_loops` loops, several times as many as in training (None: four times), and judge the states."""
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
    relative = length / size[1:].clamp(min=torch.finfo(torch.float64).tiny)
    quarter, eighth = max(2, L // 4), max(1, L // 8)

    # The condition of each kind; the first that holds decides.
    fixed = (relative[-quarter:] <= STILL).all(0)
    shrinking = length[-eighth:].mean(0) <= SHRINKS * length[L // 2 : L // 2 + eighth].mean(0)
    period = torch.zeros(h.shape[1], dtype=torch.int64, device=h.device)
    for p in range(quarter, 1, -1):
        back = (h[-quarter:] - h[-quarter - p : -p]).norm(dim=-1)
        period[(back <= RETURNS * length[-quarter:]).all(0)] = p
    straight = (h[-1] - h[L // 2]).norm(dim=-1) > STRAIGHT * length[L // 2 :].sum(0)
    conditions = torch.stack([fixed, shrinking, period > 0, straight, torch.ones_like(fixed)])
    kind = [KINDS[i] for i in conditions.int().argmax(0).tolist()]
    period = period * torch.tensor([k == "orbit" for k in kind], device=h.device)
    cosine = torch.cosine_similarity(h[1:], h[:-1], dim=-1)
    turn = torch.cosine_similarity(steps[1:], steps[:-1], dim=-1)
    return Motion(relative, cosine, turn, size / h.shape[-1] ** 0.5, kind, period)


def section(subject: Subject) -> Section:
    """Describe where the states end."""
    found = follow(subject.model, subject.input_ids, subject.n_beyond, subject.where)
    kinds = ", ".join(f"{share:.0%} of the tokens are {kind!r}" for kind, share in found.shares.items() if share)
    finding = (
        f"After {subject.n_beyond} loops {kinds}; the median step of the last loop is {found.step[-1].median():.1e} of "
        "the state."
    )
    periods = sorted(set(found.period[found.period > 0].tolist()))
    if periods:
        finding += f" Periods seen: {', '.join(map(str, periods))}."
    low, median, high = (found.step.quantile(q, dim=1) for q in (0.05, 0.5, 0.95))
    by_loops = table(
        "loops",
        some(subject.n_beyond),
        ("step / state", median, ".2e"),
        ("5 %", low, ".2e"),
        ("95 %", high, ".2e"),
        ("cosine to the state before", found.cosine.median(dim=1).values, ".4f"),
        # The first step follows no other.
        ("turn of the step", ["", *(f"{x:.2f}" for x in found.turn.median(dim=1).values)], ""),
        ("norm", found.norm[1:].median(dim=1).values, ".2f"),
        first=1,
    )
    # A logarithmic axis has no place for 0. The lower median is a state's own step.
    floor = found.step.clamp(min=1e-12)
    curves = {"median": floor.median(dim=1).values} | {f"{q:.0%}": floor.quantile(q, dim=1) for q in (0.05, 0.95)}
    caption = "Length of each loop's step as a share of the state, over tokens."
    drawn = figure("steps", caption, curves, "|step| / |state|", first=1, log="y")
    return Section(
        "Fixed point, orbit or drift?", finding, {"shares": found.shares} | numbers(found), [by_loops, drawn]
    )
