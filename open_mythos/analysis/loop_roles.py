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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from open_mythos.analysis import unroll
from open_mythos.analysis.section import Section, Subject, numbers
from open_mythos.checks import check_int
from open_mythos.model import OpenMythos
from open_mythos.nn.cache import Scratch
from open_mythos.nn.depth import check_n_loops
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.halting import Exit
from open_mythos.nn.view import View
from open_mythos.ops.precision import at_least_float32
from open_mythos.reports.document import Figure, Table
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import Interval, bootstrap, over_seeds

SMALL, SMALL_KL = 0.01, 1e-3
"""Share of answers, and nats at the output, below which a change counts as none."""


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

        return cls(**{field.name: tensor(values[field.name]) for field in dataclasses.fields(cls)})


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
    parts = {
        "delta": ss - tt,
        "function_before": ts - tt,
        "function_after": ss - st,
        "state_before": st - tt,
        "state_after": ss - ts,
    }
    for cause in ("function", "state"):
        parts[cause] = (parts[f"{cause}_before"] + parts[f"{cause}_after"]) / 2
    return parts


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


# The report. Loops are counted by index, from 0, as in the model.

Runs = Sequence[LoopRoles]
"""The seeds of one training, or a single model; all with equally many loops."""


def across(runs: Runs, name: str) -> Interval:
    """Compute the interval of each of K values (N, K): over seeds if there are several, else over sequences.

    Args:
        name: a field, such as "share"; for an intervention "kl.skip" or "changed.skip"; of the shuffles, the mean.
    """
    field, _, intervention = name.partition(".")
    values = [getattr(run, field)[intervention] if intervention else getattr(run, field) for run in runs]
    values = [(x.mean(1, keepdim=True) if intervention == "shuffle" else x).numpy() for x in values]
    return bootstrap(values[0]) if len(values) == 1 else over_seeds([np.nanmean(x, 0) for x in values])


def cells(values: Interval, form: str = ".3f") -> list[str]:
    """Write each value as '0.512 [0.470, 0.554]'; the mean alone where there is no interval."""
    rows = zip(*values, strict=True)
    return [f"{m:{form}}" if np.isnan(low) else f"{m:{form}} [{low:{form}}, {high:{form}}]" for m, low, high in rows]


def split_table(runs: Runs) -> Table:
    """Make a table of what changes from each loop to the next, and why."""
    columns = {
        "change": "delta",
        "from the function": "function",
        "at the state before": "function_before",
        "at the state after": "function_after",
        "from the state": "state",
        "cosine of both": "cosine",
        "function's share": "share",
    }
    filled = [cells(across(runs, name)) for name in columns.values()] + [cells(across(runs, "step"))[1:]]
    rows = [[f"{t} to {t + 1}", *row] for t, row in enumerate(zip(*filled, strict=True))]
    return Table(["loops", *columns, "later update, of the state"], rows)


def effect_table(runs: Runs) -> Table:
    """Make a table of what each intervention does to the output, in nats and in answers changed."""
    titles = {
        "skip": "loop {} left out",
        "repeat": "loop {} twice",
        "swap": "loops {} and {} swapped",
        "more": "one loop more",
        "shuffle": "all loops shuffled",
    }
    rows = []
    for name, title in titles.items():
        nats, changed = cells(across(runs, f"kl.{name}"), ".3g"), cells(across(runs, f"changed.{name}"))
        rows += [[title.format(t, t + 1), *row] for t, row in enumerate(zip(nats, changed, strict=True))]
    return Table(["intervention", "KL in nats", "answers changed"], rows)


def without_order_or_last(runs: Runs) -> tuple[str, str]:
    """Write the shares of answers that a shuffle changes, and that need the last loop: else no order could matter."""
    return cells(across(runs, "changed.shuffle"))[0], cells(across(runs, "changed.skip"))[-1]


def interchangeable(runs: Runs) -> bool | None:
    """Decide whether shuffling the loops changes less than `SMALL` of the answers; None where the numbers do not tell.

    Where no answer changed, resampling has no spread: 3 / N is then the upper end of a share in N sequences.
    """
    changed = across(runs, "changed.shuffle")
    high = max(changed.high[0], 3 / sum(len(run.step) for run in runs))
    return True if high < SMALL else False if changed.low[0] > SMALL else None


def verdict(runs: Runs) -> str:
    """Write a paragraph that follows from the intervals alone."""
    share, fewer, other = (across(runs, name) for name in ("share", "kl.skip", "kl.shuffle"))
    if share.mean.max() < 1e-5:
        return (
            "No loop has a function of its own: the part from the function is zero, so two updates differ by the state "
            f"alone, and only the number of loops can matter (one fewer: KL {cells(fewer, '.3g')[-1]} nats)."
        )
    reasons = {
        "mostly because the function differs": share.low > 0.5,
        "mostly because the state has moved on": share.high < 0.5,
    }
    reasons["for both reasons, or the intervals do not tell"] = ~np.any(list(reasons.values()), axis=0)
    parts = [
        f"from loop {', '.join(f'{t} to {t + 1}' for t in np.flatnonzero(which))} {why}"
        for why, which in reasons.items()
        if which.any()
    ]
    said = {True: "The loops are interchangeable as far as answers go", False: "The loops are not interchangeable"}
    order = said.get(interchangeable(runs), "Whether the loops are interchangeable is open")
    shuffled, needed = without_order_or_last(runs)
    swapped = np.flatnonzero(across(runs, "changed.swap").low > SMALL)
    pairs = " and for ".join(f"{t} and {t + 1}" for t in swapped) or "none"
    more = "Neither the number of loops nor their order clearly matters more"
    if max(fewer.high[-1], other.high[0]) < SMALL_KL:
        more = "Neither the number of loops nor their order matters here"
    elif fewer.low[-1] > other.high[0]:
        more = "The number of loops matters more than their order"
    elif fewer.high[-1] < other.low[0]:
        more = "The order of the loops matters more than whether there is one fewer"
    return (
        f"The update changes {'; '.join(parts)}. {order}: shuffling them changes {shuffled} of the answers, one loop "
        f"fewer {needed}; swapping two neighbours changes more than {SMALL:.0%} for {pairs}. {more}: one fewer costs "
        f"{cells(fewer, '.3g')[-1]} nats at the output, a shuffle {cells(other, '.3g')[0]}."
    )


def draw_split(models: Mapping[str, Runs], path: Path) -> None:
    """Draw the function's share of each change, by loop, for every model."""
    curves = [_points(name, across(runs, "share")) for name, runs in models.items()]
    ticks = {t: f"{t} to {t + 1}" for t in range(max(len(curve.xs) for curve in curves))}
    curves.append(Curve(list(ticks), [0.0] * len(ticks), "without index-dependent parts", None))
    labels = ("from loop to loop", "share from the function")
    draw_curves({"What changes between two consecutive loops": curves}, path, labels, ticks=ticks)


def draw_effects(models: Mapping[str, Runs], path: Path) -> None:
    """Draw the KL at the output for each loop that is left out, run twice or swapped, a panel for each model."""
    names = {"skip": "left out", "repeat": "run twice", "swap": "swapped with the next"}
    panels = {
        model: [_points(title, across(runs, f"kl.{name}")) for name, title in names.items()]
        + [_points("all shuffled", across(runs, "kl.shuffle"), first=-1)]
        for model, runs in models.items()
    }
    ticks = {-1: "all"} | {t: str(t) for t in range(max(len(curves[0].xs) for curves in panels.values()))}
    draw_curves(panels, path, ("loop index", "KL in nats"), ticks=ticks, log="y")


def _points(label: str, values: Interval, first: int = 0) -> Curve:
    mean, low, high = (x.tolist() for x in values)
    return Curve(range(first, first + len(mean)), mean, label, 0, low, high, points=True)


def section(subject: Subject) -> Section:
    """Describe whether each loop does something of its own."""
    title = "Does each loop do something of its own?"
    if subject.n_loops < 2:
        return Section(title, "One loop has no next loop to compare with.", {})
    runs = [loop_roles(subject.model, subject.input_ids, subject.n_loops, subject.where)]
    shown = {"this model": runs}
    split = Figure("split", "Share of a change that is due to the loop index.", lambda path: draw_split(shown, path))
    effects = Figure("effects", "Effect of disturbed loops on the answer.", lambda path: draw_effects(shown, path))
    parts = [split_table(runs), split, effect_table(runs), effects]
    return Section(title, verdict(runs), runs[0].to_dict(), parts)
