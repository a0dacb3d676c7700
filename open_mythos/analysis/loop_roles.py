"""Does loop t do something different from loop t+1?

Loop t takes the state h_t to F_t(h_t); its update is u(h, t) = F_t(h) - h. Two consecutive updates differ because the
state has moved on, or because the loop index makes another function of the block (loop embedding, depth LoRA). The
change delta_t = u(h_{t+1}, t+1) - u(h_t, t) is exactly the sum of both, in either of two orders:

    delta_t = [u(h_{t+1}, t+1) - u(h_{t+1}, t)] + [u(h_{t+1}, t) - u(h_t, t)]       function after, state before
            = [u(h_t, t+1) - u(h_t, t)] + [u(h_{t+1}, t+1) - u(h_t, t+1)]           function before, state after

The report has the mean of the two orders (the Shapley value of two causes), and each order beside it. An injection
leaves the function part unchanged: only the block and its adapter see the index. Without them it is zero.

All positions of a sequence run in one pass and read keys of the same loop, so F_t is a map of whole sequences. Tokens
that ACT has let out have the state and keys that the model leaves them with; that belongs to the state.

Shapes: N sequences, T tokens, D width, L loops, P shuffles, V vocabulary.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from open_mythos.analysis import unroll
from open_mythos.analysis.section import numbers
from open_mythos.checks import check_int
from open_mythos.model import OpenMythos
from open_mythos.nn.cache import Scratch
from open_mythos.nn.depth import check_n_loops
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.halting import Exit
from open_mythos.nn.view import View
from open_mythos.ops.precision import at_least_float32


@dataclass(frozen=True)
class LoopRoles:
    """Differences between the loops of a model on N sequences. Norms are over the chosen positions and all channels.

    Parts of a change are in units of the mean norm of the two updates that it lies between, so `delta` is at most 2.
    Values are NaN where none of the chosen positions is in the loop any more.
    """

    step: Tensor  # (N, L), the norm of the update over that of the state it leads to
    delta: Tensor  # (N, L-1), the change between the updates of loops t and t+1
    function: Tensor  # (N, L-1), its part from the loop index, mean of the two orders
    function_before: Tensor  # (N, L-1), the same at the state h_t alone
    function_after: Tensor  # (N, L-1), the same at the state h_{t+1} alone
    state: Tensor  # (N, L-1), the part from the state, mean of the two orders
    state_before: Tensor  # (N, L-1), the same under index t alone; with `function_after` it makes up delta
    state_after: Tensor  # (N, L-1), the same under index t+1 alone
    cosine: Tensor  # (N, L-1), between the two parts; at -1 one undoes the other. 0 where a part is zero
    other: Tensor  # (N, L, L), effect of index s (last) at state t: |F_s(h_t) - F_t(h_t)| in units of loop t's update
    kl: dict[str, Tensor]
    """KL(untouched || changed) of the next token in nats, by intervention: `skip` and `repeat` (N, L), `swap` with the
    next loop (N, L-1), `shuffle` (N, P) all indices, `more` (N, 1) one loop more, for comparison."""
    changed: dict[str, Tensor]
    """The share of positions whose most likely token is another, shaped like `kl`."""

    @property
    def share(self) -> Tensor:
        """|function| / (|function| + |state|), (N, L-1): 0 where two updates differ by the state only."""
        return self.function / (self.function + self.state)

    @property
    def distinct(self) -> Tensor:
        """How far each loop stands out, (N, L): the median over other indices of their effect in its place."""
        n = self.other.shape[-1]
        others = self.other[:, ~torch.eye(n, dtype=torch.bool)].unflatten(1, (n, n - 1))
        return others.quantile(0.5, dim=-1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON with 4 digits; None for NaN."""
        return numbers(self, digits=4)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoopRoles":
        """Make the result again from what `to_dict` returned."""

        def tensor(x: Any) -> Any:
            return {k: tensor(v) for k, v in x.items()} if isinstance(x, Mapping) else torch.tensor(np.array(x, float))

        return cls(**tensor(values))


class Pass(NamedTuple):
    """One pass of a model whose k-th loop ran under a chosen index."""

    logits: Tensor  # (N, T, V)
    e: Tensor  # (N, T, D)
    states: list[Tensor]  # h_0 to h_L, each (N, T, D)
    views: list[View]  # of each loop: `active` the tokens in it (None: all), `store.previous` the keys of the others


def run_loops(model: OpenMythos, input_ids: Tensor, order: Sequence[int]) -> Pass:
    """Run len(order) loops, the k-th with loop_index order[k]; the model's own halting counts loops, not indices."""
    h, e, whole = unroll.begin(model, input_ids)
    assert model.recurrent is not None
    rule = model.recurrent.rule
    n_loops = torch.full_like(input_ids[:, 0], len(order))
    state, active = rule.init(h, n_loops), torch.ones_like(input_ids, dtype=torch.bool) if rule.weighted else None
    rows = {"h": h, "n_loops": n_loops, "out": torch.zeros_like(at_least_float32(h))}
    exit, states, views, left = Exit(rule, None), [h], [], {}
    for k, index in enumerate(order):
        views.append(dataclasses.replace(whole, active=active, store=Scratch(left)))
        new, left = _loop(model, rows["h"], e, index, views[-1])
        rows, state, exit_mask, _ = exit.apply(rows, state, new, torch.full_like(n_loops, k), active)
        active = None if active is None else active & ~exit_mask
        states.append(rows["h"])
    out = rows["out"].to(h.dtype) if rule.weighted else rows["h"]
    return Pass(model.readout(out, whole), e, states, views)


def _loop(model: OpenMythos, h: Tensor, e: Tensor, index: int, view: View) -> tuple[Tensor, dict[int, Any]]:
    """Compute F_index(h), and its keys and values in a new store, so that no other loop's are read."""
    assert isinstance(view.store, Scratch)
    store, loop_index = Scratch(view.store.previous), torch.full_like(view.positions[:, 0], index)
    return model.recur(h, e, loop_index, dataclasses.replace(view, store=store)), store.current


def update(model: OpenMythos, run: Pass, k: int, index: int) -> Tensor:
    """Compute u(h_k, index) (N, T, D), the change that a loop under `index` makes; 0 for tokens that have left."""
    h, view = run.states[k], run.views[k]
    change = _loop(model, h, run.e, index, view)[0] - h
    return change if view.active is None else change * view.active[..., None]


def split(early: Sequence[Tensor], late: Sequence[Tensor]) -> dict[str, Tensor]:
    """Split late[1] - early[0] into its parts, (N, T, D) each, as at the head of this file.

    Args:
        early: the updates of state t under indices t and t+1.
        late: the updates of state t+1 under the same.
    """
    (tt, ts), (st, ss) = early, late
    parts = {"function_before": ts - tt, "function_after": ss - st, "state_before": st - tt, "state_after": ss - ts}
    means = {cause: (parts[f"{cause}_before"] + parts[f"{cause}_after"]) / 2 for cause in ("function", "state")}
    return {"delta": ss - tt} | parts | means


def loop_roles(
    model: OpenMythos,
    input_ids: Tensor,
    n_loops: int | None = None,
    where: Tensor | None = None,
    shuffles: int = 8,
    seed: int = 0,
) -> LoopRoles:
    """Measure what the loops do on `input_ids` (N, T), in about (4 L + shuffles) L loops of work; float64 on the CPU.

    Args:
        n_loops: at least 2; None: `max_loop_iters`.
        where: (N, T) bool, the positions that count, such as those of answers, at least one in each row; None: all.
        shuffles: number of orders drawn at random with `seed`, none of them the usual one.

    Raises:
        TypeError, ValueError: an argument is unusable; nothing has been computed.
    """
    with evaluating(model):
        unroll.begin(model, input_ids)  # refuses unusable ids, and a model without a loop
    L = check_n_loops(n_loops, model.cfg)
    check_int("n_loops", L, 2, remedy="use n_loops=4: with fewer than 2 there is nothing to compare")
    check_int("shuffles", shuffles, 1)
    where = torch.ones_like(input_ids, dtype=torch.bool) if where is None else where
    if where.shape != input_ids.shape or not where.any(1).all():
        raise ValueError(
            f"where has shape {tuple(where.shape)}; it must be {tuple(input_ids.shape)} like input_ids and true "
            "somewhere in each row; use where=None for all positions"
        )
    kl, changed = {}, {}
    with evaluating(model):
        run = run_loops(model, input_ids, range(L))
        parts = _compare(model, run, where)
        for name, orders in interventions(L, shuffles, seed).items():
            effects = [_effect(run.logits, run_loops(model, input_ids, order).logits, where) for order in orders]
            kl[name], changed[name] = (torch.stack(x, dim=1).cpu() for x in zip(*effects, strict=True))
    return LoopRoles(**parts, kl=kl, changed=changed)


def _compare(model: OpenMythos, run: Pass, where: Tensor) -> dict[str, Tensor]:
    """Split the changes between consecutive updates, and compare each update with those of the other indices."""
    L = len(run.views)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    before: list[Tensor] = []
    for k in range(L):
        # The updates of every index at the state before loop k, of which `own` is the norm of the one that ran.
        updates = [update(model, run, k, index) for index in range(L)]
        active = run.views[k].active
        counted = where if active is None else where & active
        own = _norm(updates[k], counted)
        parts["step"].append(own / _norm(run.states[k + 1], counted))
        parts["other"].append(torch.stack([_norm(u - updates[k], counted) / own for u in updates], dim=1))
        if k:
            # The tokens that are in both loops are those in the later one.
            changes = split(before[k - 1 : k + 1], updates[k - 1 : k + 1])
            unit = (_norm(before[k - 1], counted) + own) / 2
            norms = {name: _norm(change, counted) for name, change in changes.items()}
            for name, norm in norms.items():
                parts[name].append(norm / unit)
            product = (changes["function"] * changes["state"]).double().sum(-1).mul(counted).sum(1)
            scale = norms["function"] * norms["state"]
            parts["cosine"].append(torch.where(scale > 0, product / scale, scale))
        before = updates
    return {name: torch.stack(x, dim=1).cpu() for name, x in parts.items()}


def interventions(n_loops: int, shuffles: int, seed: int) -> dict[str, list[list[int]]]:
    """List the loop indices in the order they run, for each way to disturb them."""
    usual = list(range(n_loops))
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[int]] = []
    while len(drawn) < shuffles:
        order = torch.randperm(n_loops, generator=generator).tolist()
        if order != usual:
            drawn.append(order)
    return {
        "skip": [usual[:t] + usual[t + 1 :] for t in usual],
        "repeat": [usual[: t + 1] + usual[t:] for t in usual],
        "swap": [[*usual[:t], t + 1, t, *usual[t + 2 :]] for t in usual[:-1]],
        "shuffle": drawn,
        "more": [[*usual, n_loops]],
    }


def _norm(x: Tensor, where: Tensor) -> Tensor:
    """Compute the norms (N,) of (N, T, D) over the channels of the positions `where`; NaN where there is none."""
    norm = x.double().square().sum(-1).mul(where).sum(1).sqrt()
    return norm.where(where.any(1), torch.nan)


def _effect(logits: Tensor, changed: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Compute KL(untouched || changed), and the share of positions with another most likely token: (N,) each."""
    divergence = unroll.kl(logits.double().log_softmax(-1), changed.double().log_softmax(-1))
    other, counts = logits.argmax(-1) != changed.argmax(-1), where.sum(1)
    return (divergence * where).sum(1) / counts, (other & where).sum(1).double() / counts
