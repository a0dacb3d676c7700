"""Is loop t doing something different from loop t+1?

Loop t takes the state h_t to F_t(h_t); its update is u(h, t) = F_t(h) - h. Two consecutive updates differ because the
state has moved on, or because the loop index makes another function of the block (loop embedding, depth LoRA). The
change delta_t = u(h_{t+1}, t+1) - u(h_t, t) is exactly the sum of both, in either of two orders:

    delta_t = [u(h_{t+1}, t+1) - u(h_{t+1}, t)] + [u(h_{t+1}, t) - u(h_t, t)]       function after, state before
            = [u(h_t, t+1) - u(h_t, t)] + [u(h_{t+1}, t+1) - u(h_t, t+1)]           function before, state after

The mean of the two orders (the Shapley value of two causes) is what is reported, and each order beside it. Counting
what an injection adds to the block's own output as part of the update leaves the function part as it is: only the
block and its adapter see the index. Without parts that do, the function part is zero: the null control.

Every position of a sequence runs in one pass and reads keys of the same loop, so F_t is a map of whole sequences. Where
ACT has let tokens out, their state and keys stay as the model has them; that belongs to the state.

Shapes: N sequences, T tokens, D width, L loops, P shuffles, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from open_mythos.checks import check_int
from open_mythos.model import OpenMythos
from open_mythos.nn.cache import Scratch, View
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.halting import Exit
from open_mythos.nn.initial_state import initial_state
from open_mythos.nn.inputs import check_ids, check_n_loops
from open_mythos.ops.precision import at_least_float32

Orders = dict[str, list[list[int]]]


@dataclass(frozen=True)
class LoopRoles:
    """What tells the loops of a model apart on N sequences. Norms are over the positions asked for and all channels.

    Parts of a change are in units of the mean norm of the two updates that it lies between, so `delta` is at most 2.
    Values are NaN where no position asked for is in the loop any more.
    """

    step: Tensor
    """(N, L), the norm of the update over that of the state it leads to."""
    delta: Tensor
    """(N, L-1), the change between the updates of loops t and t+1."""
    function: Tensor
    """(N, L-1), its part from the loop index, mean of the two orders."""
    function_before: Tensor
    """(N, L-1), the same at the state h_t alone."""
    function_after: Tensor
    """(N, L-1), the same at the state h_{t+1} alone."""
    state: Tensor
    """(N, L-1), the part from the state, mean of the two orders."""
    state_before: Tensor
    """(N, L-1), the same under index t alone; with `function_after` it makes up delta."""
    state_after: Tensor
    """(N, L-1), the same under index t+1 alone."""
    cosine: Tensor
    """(N, L-1), between the two parts; at -1 one undoes the other. 0 where a part is zero."""
    other: Tensor
    """(N, L, L), what index s (last) would do at state t: |F_s(h_t) - F_t(h_t)| in units of loop t's own update."""
    kl: dict[str, Tensor]
    """KL(untouched || changed) of the next token in nats, by intervention: `skip` and `repeat` (N, L), `swap` with the
    loop after it (N, L-1), `shuffle` (N, P) all indices, `more` (N, 1) one loop more, for comparison."""
    changed: dict[str, Tensor]
    """The share of positions whose likeliest token is another, shaped like `kl`."""

    @property
    def share(self) -> Tensor:
        """(N, L-1), |function| / (|function| + |state|): 0 where only the state tells two updates apart."""
        return self.function / (self.function + self.state)

    @property
    def distinct(self) -> Tensor:
        """(N, L), how far loop t stands out: the median over other indices of what each would do in its place."""
        n = self.other.shape[-1]
        others = self.other[:, ~torch.eye(n, dtype=torch.bool)].unflatten(1, (n, n - 1))
        return others.quantile(0.5, dim=-1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON with 4 digits; None for NaN."""

        def plain(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: plain(value) for name, value in x.items()}
            if isinstance(x, list):
                return [plain(value) for value in x]
            return None if x != x else float(f"{x:.4g}")

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return plain({name: _map(x, Tensor.tolist) for name, x in values.items()})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoopRoles":
        """Make the result again from what `to_dict` returned."""

        def tensor(x: list[Any]) -> Tensor:
            def known(x: Any) -> Any:
                return [known(value) for value in x] if isinstance(x, list) else (torch.nan if x is None else x)

            return torch.tensor(known(x), dtype=torch.float64)

        return cls(**{field.name: _map(values[field.name], tensor) for field in dataclasses.fields(cls)})


class Pass(NamedTuple):
    """One pass of a model whose loop k ran under an index of choice."""

    logits: Tensor
    """(N, T, V)"""
    e: Tensor
    """(N, T, D)"""
    states: list[Tensor]
    """h_0 to h_L, each (N, T, D)."""
    views: list[View]
    """What each loop saw: `active` is None, or the (N, T) tokens in the loop, and the store's `previous` the keys and
    values of those that have left."""


def run_loops(model: OpenMythos, input_ids: Tensor, order: Sequence[int]) -> Pass:
    """Run len(order) loops, the k-th with loop_index order[k]; the model's own halting counts loops, not indices."""
    assert model.recurrent is not None
    rule = model.recurrent.rule
    whole = model.make_view((input_ids.shape[0], input_ids.shape[1]))
    e = model.encode(input_ids, whole)
    h = initial_state(model.cfg.initial_state, e, whole)
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
    """F_index(h), and the keys and values it left. The store is a new one, so that no other loop's are read."""
    assert isinstance(view.store, Scratch)
    store = Scratch(view.store.previous)
    view = dataclasses.replace(view, store=store)
    return model.recur(h, e, torch.full_like(view.positions[:, 0], index), view), store.current


def update(model: OpenMythos, run: Pass, k: int, index: int) -> Tensor:
    """u(h_k, index) (N, T, D): what a loop under `index` adds to the state before the k-th; 0 for tokens out of it."""
    h, view = run.states[k], run.views[k]
    change = _loop(model, h, run.e, index, view)[0] - h
    return change if view.active is None else change * view.active[..., None]


class Split(NamedTuple):
    """The change between two consecutive updates and its parts, (N, T, D) each; see the head of this file."""

    delta: Tensor
    function_before: Tensor
    function_after: Tensor
    state_before: Tensor
    state_after: Tensor

    @property
    def function(self) -> Tensor:
        return (self.function_before + self.function_after) / 2

    @property
    def state(self) -> Tensor:
        return (self.state_before + self.state_after) / 2


def split(early: tuple[Tensor, Tensor], late: tuple[Tensor, Tensor]) -> Split:
    """The parts of late[1] - early[0]; early are the updates of state t under indices t and t+1, late of state t+1."""
    (tt, ts), (st, ss) = early, late
    return Split(ss - tt, ts - tt, ss - st, st - tt, ss - ts)


def loop_roles(
    model: OpenMythos,
    input_ids: Tensor,
    n_loops: int | None = None,
    where: Tensor | None = None,
    shuffles: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> LoopRoles:
    """Measure what the loops do on `input_ids` (N, T). About (4 L + shuffles) L loops of work.

    Args:
        n_loops: at least 2; None: `max_loop_iters`.
        where: (N, T) bool, the positions that count, such as those of answers, at least one in each row; None: all.
        shuffles: orders of the loops drawn at random, none of them the usual one.
        seed: of these draws.
        progress: show a bar.

    Returns:
        Tensors in float64 on the CPU.

    Raises:
        TypeError, ValueError: an argument is unusable; nothing has been computed.
    """
    if model.recurrent is None:
        raise ValueError("recurrent_layers=0 leaves no loop to look at; use a model that has a recurrent block")
    check_ids(input_ids, model.cfg)
    L = check_n_loops(n_loops, model.cfg)
    check_int("n_loops", L, 2, remedy="use n_loops=4: with fewer than 2 there is nothing to compare")
    check_int("shuffles", shuffles, 1)
    where = torch.ones_like(input_ids, dtype=torch.bool) if where is None else where
    if where.shape != input_ids.shape or not where.any(1).all():
        raise ValueError(
            f"where has shape {tuple(where.shape)}; it must be {tuple(input_ids.shape)} like input_ids and true "
            "somewhere in each row; use where=None for all positions"
        )
    orders = interventions(L, shuffles, seed)
    with evaluating(model), Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("loops", total=L * (1 + L) + sum(len(order) for each in orders.values() for order in each))
        run = run_loops(model, input_ids, range(L))
        bar.advance(task, L)
        parts: dict[str, list[Tensor]] = {name: [] for name in ("step", "other", "cosine", *SPLIT)}
        before: list[Tensor] = []
        for k in range(L):
            updates = [update(model, run, k, index) for index in range(L)]
            bar.advance(task, L)
            counted = _counted(where, run.views[k].active)
            own = _norm(updates[k], counted)
            parts["step"].append(own / _norm(run.states[k + 1], counted))
            parts["other"].append(torch.stack([_norm(u - updates[k], counted) / own for u in updates], dim=1))
            if k:
                # Tokens in both loops: those in the later one.
                changes = split((before[k - 1], before[k]), (updates[k - 1], updates[k]))
                unit = (_norm(before[k - 1], counted) + own) / 2
                norms = {name: _norm(getattr(changes, name), counted) for name in SPLIT}
                for name, norm in norms.items():
                    parts[name].append(norm / unit)
                product = (changes.function * changes.state).double().sum(-1).mul(counted).sum(1)
                scale = norms["function"] * norms["state"]
                parts["cosine"].append(torch.where(scale > 0, product / scale, scale))
            before = updates
        kl, changed = {}, {}
        for name, each in orders.items():
            effects = []
            for order in each:
                effects.append(_effect(run.logits, run_loops(model, input_ids, order).logits, where))
                bar.advance(task, len(order))
            kl[name], changed[name] = (torch.stack(x, dim=1).cpu() for x in zip(*effects, strict=True))
    return LoopRoles(**{name: torch.stack(x, dim=1).cpu() for name, x in parts.items()}, kl=kl, changed=changed)


SPLIT = ("delta", "function", "function_before", "function_after", "state", "state_before", "state_after")


def interventions(n_loops: int, shuffles: int, seed: int) -> Orders:
    """The loop indices in the order they run, for each way to disturb them."""
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


def _counted(where: Tensor, active: Tensor | None) -> Tensor:
    return where if active is None else where & active


def _norm(x: Tensor, where: Tensor) -> Tensor:
    """(N, T, D) -> (N,), over the channels of the positions `where`; NaN where there is none."""
    norm = x.double().square().sum(-1).mul(where).sum(1).sqrt()
    return norm.where(where.any(1), torch.nan)


def _effect(logits: Tensor, changed: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """KL(untouched || changed), and the share of positions with another likeliest token: (N,) each."""
    p, q = logits.double().log_softmax(-1), changed.double().log_softmax(-1)
    kl, other = (p.exp() * (p - q)).sum(-1), logits.argmax(-1) != changed.argmax(-1)
    counts = where.sum(1)
    return (kl * where).sum(1) / counts, (other & where).sum(1).double() / counts


def _map(x: Any, change: Any) -> Any:
    return {name: change(value) for name, value in x.items()} if isinstance(x, dict) else change(x)
