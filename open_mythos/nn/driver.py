"""One call of the looped block: which rows and tokens each loop computes, and how those that have exited leave.

Shapes: B rows, T tokens, D width, E experts, L executed loops, C blocks in the core.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from open_mythos.nn.cache import KVCache, Scratch
from open_mythos.nn.halting import Exit, Fixed, HaltingRule, Probe, Rows, State
from open_mythos.nn.static_cache import StaticKVCache
from open_mythos.nn.view import KeyValues, KVStore, RouterLog, Selection, View
from open_mythos.ops.linear import is_traced
from open_mythos.ops.precision import at_least_float32

Compaction = Literal["counts", "always", "never"]
"""When exited tokens leave the computation: as soon as a quarter of it can go, at once, or never."""
Loop = Callable[[Tensor, Tensor, Tensor, View], Tensor]
"""loop(h, e, loop_index, view) -> the next h"""
Advance = Callable[[Rows, State, Tensor, Tensor, View, Exit], tuple[Rows, State, Tensor, Tensor | None]]
"""advance(rows, state, e, loop_index, view, exit) -> the rows, the rule's state, the exit mask and the weights after
one loop and the decision behind it."""


@dataclass
class RecurrentOutput:
    """The result of the whole loop."""

    out: Tensor
    """(B, T, D), the last state of each token, or under ACT the halt-weighted sum of its states."""
    loops: Tensor
    """(B, T) int64, loops each token ran; 0 for padding."""
    ponder_cost: Tensor | None = None
    """(B, T), loops plus remainder, differentiable; only under ACT and without a cache."""
    router_z: Tensor | None = None
    """Scalar, mean square of the router's log-sum-exp over routed tokens; only in training with experts."""
    tokens_per_expert: Tensor | None = None
    """(C, E) over all loops; only in training with experts."""
    hidden: Tensor | None = None
    """(L, B, T, D), the state after each loop; only with trace."""
    halt_weight: Tensor | None = None
    """(L, B, T), the weight of each state in `out`; only with trace."""


@dataclass
class LoopDriver:
    """The rows of one call in the loop, in order of decreasing depth.

    Rows are right-aligned: a row of depth d joins d ticks before the end. After a compaction `rows` are a subset of the
    call's tokens, indexed by `selection`; `parked` holds all joined rows as of that compaction, and `output` writes
    `rows` back into it. A token that has exited and not left stays in `rows` as it is, which changes no result.
    """

    loop: Loop
    advance: Advance
    rule: HaltingRule
    probe: Probe | None
    e: Tensor
    """(B, T, D), the prelude's output as the injection has prepared it."""
    view: View
    depths: list[int]
    """Loops of each row, the deepest first."""
    n_ticks: int
    together: bool
    """True if all ticks have to run, because other processes exchange tokens with this one in each of them."""
    compaction: Compaction
    recompute: bool
    """Recompute each loop in the backward pass instead of saving its activations."""
    n_chosen: int
    """Experts that each token is routed to, if their statistics are wanted; else 0."""
    trace: bool

    def __post_init__(self) -> None:
        device = self.e.device
        self.lockstep = self.n_ticks == self.depths[-1]
        # One depth for all needs no copy from the host, which a CUDA graph could not hold.
        every = torch.full((len(self.depths),), self.n_ticks, device=device)
        self.n_loops = every if self.lockstep else torch.tensor(self.depths, device=device)
        # At fixed depth nobody exits early: no masks, no copies, and nothing for a GPU to wait for.
        self.adaptive = not isinstance(self.rule, Fixed)
        # A graph runs the same operations for every input, so every loop runs in it and nothing leaves.
        self.in_graph = is_traced() or self.e.is_meta or (self.e.is_cuda and torch.cuda.is_current_stream_capturing())
        self.static = self.view.store if isinstance(self.view.store, StaticKVCache) else None
        self.scratch = Scratch()
        self.rows: Rows = {}
        self.state: State = {}
        self.row_ids: list[int] = []
        """Rows of the call that are in `rows`, by their index in it."""
        self.n_active: list[int] | None = []
        """Tokens in the loop, of each row in `rows`; None: not counted yet."""
        self.n_joined = 0
        self.current = (self.view, self.e, self.n_loops)
        # All loops' indices at once: an operation for each loop fewer.
        ticks = torch.arange(self.n_ticks, device=device)[:, None]
        self.loop_indices: tuple[Tensor, ...] = (self.n_loops - self.n_ticks + ticks).unbind()
        self.selection: Selection | None = None
        self.parked: Rows = {}
        self.routers: list[RouterLog] = []
        self.hidden: list[Tensor] = []
        self.weights: list[Tensor] = []

    def run(self, h: Tensor, n_grad: int | None) -> int:
        """Run the loop from the states `h` (B, T, D) and return the number of ticks that ran.

        Gradients flow through the last `n_grad` ticks; None: through all of them.
        """
        # A graph runs a fixed number of ticks, and ranks that share experts have to run equally many.
        may_end_early = self.adaptive and not self.in_graph and not self.together
        for tick in range(self.n_ticks):
            self.add_rows(h, tick)
            with nullcontext() if n_grad is None or tick >= self.n_ticks - n_grad else torch.no_grad():
                self.tick(tick)
            # With rows still to come, the loop goes on even if every row in it has exited.
            everyone_joined = self.n_joined == len(self.depths)
            if tick + 1 < self.n_ticks and may_end_early and everyone_joined and not self._any_active():
                break
        return tick + 1

    def add_rows(self, h: Tensor, tick: int) -> None:
        """Add the rows whose first loop is this tick."""
        # Rows end together at the last tick, so a row of depth d runs its first loop d ticks before the end.
        n_rows = sum(depth >= self.n_ticks - tick for depth in self.depths)
        if n_rows == self.n_joined and self.rows:
            return
        new = slice(self.n_joined, n_rows)
        rows: Rows = {"h": h[new]}
        if self.adaptive:
            # New rows bring all their tokens, so rows that were cut to fewer tokens get theirs back first.
            self._expand()
            self.scratch = self.scratch.add_rows(n_rows - self.n_joined)
            valid = self.view.valid
            active = torch.ones(h[new].shape[:2], dtype=torch.bool, device=h.device) if valid is None else valid[new]
            loops = torch.zeros_like(active, dtype=torch.int64)
            rows |= {"active": active, "loops": loops, "n_loops": self.n_loops[new]}
            if self.rule.weighted:
                # Sums of many small weights: at least float32. Contiguous, whatever h is: one graph serves all loops.
                sums = at_least_float32(h[new])
                rows["out"] = sums.new_zeros(sums.shape)
                if not isinstance(self.view.store, KVCache):  # decoding has no loss
                    rows["ponder_cost"] = sums.new_zeros(sums.shape[:2])
            self.state = _extend(self.state, _checked(self.rule.init(h[new], self.n_loops[new]), h[new]))
        self.rows = _extend(self.rows, rows)
        self.parked = _extend(self.parked, rows) if self.parked else {}
        # Without padding every token of a new row is in the loop, and the count needs no wait for the device.
        known = self.n_active is not None and self.view.valid is None
        self.n_active = [*(self.n_active or []), *[h.shape[1]] * (n_rows - self.n_joined)] if known else None
        self.row_ids += range(self.n_joined, n_rows)
        self.n_joined = n_rows
        self._select(None)

    def tick(self, tick: int) -> None:
        """Run one loop for the tokens in `rows`."""
        # 1. Leave out what has exited. At the first tick nothing has.
        if self.adaptive and tick and not self.in_graph:
            if not self._any_active():
                # Every row that has joined has exited, and others are still to come.
                if self.together:
                    self._run_empty_loop()
                return
            self._compact(tick)
        # 2. What this loop computes: rows count their loops down, so that all end at the last tick.
        h = self.rows["h"]
        view, e, n_loops = self.current
        whole = len(n_loops) == len(self.n_loops)
        loop_index, active = self.loop_indices[tick] if whole else n_loops - (self.n_ticks - tick), self._active()
        last = tick + 1 == self.n_ticks
        # All rows end at the same tick. For a compiled decision each case would be another graph, and only a rule with
        # a probe gains enough from it.
        counted = self.lockstep and self.static is None
        exit = Exit(self.rule, self.probe, last and (counted or self.rule.needs_probe), tick + 1 if counted else None)
        # 3. The loop, then its exits.
        if self.static is not None and self.adaptive:
            # A single token is in every loop that runs. Else always a mask, for with one or without are two graphs.
            active = self.rows["active"] if self.rows["active"].numel() > 1 or self.in_graph else None
            view = view.at_loop(loop_index, tick, active, self.static.at(tick, 0 if active is None else h.shape[1]))
            self._store(*self.advance(self.rows, self.state, e, loop_index, view, exit), last)
        else:
            store = None if self.static is None else self.static.at(tick)
            # Rows at different loops have no common level, so the cache then gathers by `loop_index`.
            view = view.at_loop(loop_index, tick if self.lockstep else None, active, store)
            # A cache stores the loop before as a level; a call without one takes it from the scratch.
            cached = isinstance(self.view.store, KVCache)
            h_new, store, log = self._run_loop(h, e, loop_index, view, None if cached else self.scratch.current)
            # At fixed depth every token writes in every loop, so no loop needs the keys of the one before it.
            if isinstance(store, Scratch) and self.adaptive:
                self.scratch = store
            if log:
                self.routers.append(log)
            if self.adaptive:
                self._store(*exit.apply(self.rows, self.state, h_new, loop_index, active), last)
            else:
                self.rows["h"] = h_new
        if self.trace:
            self.hidden.append(self._all_rows("h"))

    def _run_loop(
        self, h: Tensor, e: Tensor, loop_index: Tensor, view: View, previous: dict[int, KeyValues] | None
    ) -> tuple[Tensor, KVStore, RouterLog | None]:
        """Run one loop, recomputed in the backward pass if asked; `previous`: keys and values of the loop before."""
        loop = partial(_loop_and_log, self.loop, view, previous, self.n_chosen > 0)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(loop, h, e, loop_index, use_reentrant=False)
        return loop(h, e, loop_index)

    def _run_empty_loop(self) -> None:
        """Run a loop of no rows, between those before and after it in the backward pass too."""
        none = slice(0, 0)
        view = self.view.take_rows(none).at_loop(self.n_loops[none])
        zero = self._run_loop(self.rows["h"][none], self.e[none], self.n_loops[none], view, {})[0].sum()
        self.rows |= {name: self.rows[name] + zero for name in ("h", "out") if name in self.rows}

    def _any_active(self) -> bool:
        """Count the tokens in the loop, if they are not counted yet, and return whether there are any."""
        if self.n_active is None:
            self.n_active = _count(self.rows["active"])
        return any(self.n_active)

    def _active(self) -> Tensor | None:
        """Return the mask of tokens in the loop; None if every one is known to be in it: a dozen operations fewer."""
        n_tokens = self.rows["h"].shape[1]
        whole = self.selection is None or self.selection.slots is None
        everyone = whole and self.n_active is not None and min(self.n_active, default=n_tokens) == n_tokens
        return self.rows["active"] if self.adaptive and not everyone else None

    def _store(self, rows: Rows, state: State, exit_mask: Tensor, weight: Tensor | None, last: bool) -> None:
        """Take over the results of a loop, and count the tokens that are still in it unless it was the last one."""
        if self.trace:
            weight = exit_mask.to(rows["h"].dtype) if weight is None else weight
            none = weight.new_zeros(self.view.positions.shape)
            self.weights.append(weight if self.selection is None else self.selection.put(none, weight))
        self.rows, self.state = rows, state
        if self.in_graph:
            self.n_active = None
        elif not last:
            # The only thing in a loop that the host waits for.
            self.n_active = _count(rows["active"])

    # Compaction. `within` counts rows and tokens inside `rows`, `selection` inside the call.

    def _compact(self, tick: int) -> None:
        """Drop rows and tokens that have exited from `rows`, if that pays. `tick` loops are done."""
        assert self.n_active is not None
        active = self.rows["active"]
        # 1. The smallest rectangle: every row with a token in the loop, as wide as the fullest of these rows.
        (B, T), device = active.shape, active.device
        keep, width = [i for i, n in enumerate(self.n_active) if n], max(self.n_active)
        # A compaction takes 25 to 40 small operations beside about 130 of a block, so at least a quarter has to leave.
        pays = self.compaction == "always" or len(keep) * width <= 0.75 * B * T
        if (len(keep), width) == (B, T) or self.static is not None or self.compaction == "never" or not pays:
            return
        slots = None
        if width < T:
            # 2. Tokens in the loop come first in each row, in their order. Exited tokens fill up rows that have
            # fewer; they stay frozen, so computing them again does no harm.
            slots = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        rows = _as_index(keep, device)
        within = Selection(rows, None if slots is None else Selection(rows, None, B, T).pick(slots), B, T)
        # 3. Park the results of all rows as they stand now, then go on with the rectangle alone.
        self.parked = {name: self._all_rows(name) for name in self.rows}
        self.rows = {name: within.pick(x) for name, x in self.rows.items()}
        self.state = {name: within.pick(x) for name, x in self.state.items()}
        if len(keep) < B:
            self.scratch = self.scratch.take_rows(within.row_index(device))
            if isinstance(self.view.store, KVCache):
                # A row that leaves writes no more: its last keys and values stand for every deeper loop from here on.
                gone = [row for row, n in zip(self.row_ids, self.n_active, strict=True) if not n]
                self.view.store.fill_forward(tick, self.e.shape[1], torch.tensor(gone, device=device))
        # 4. `within` counts inside the old rectangle: its tokens' places in the call come from the old selection.
        before = None if self.selection is None else self.selection.slots
        self.row_ids, self.n_active = [self.row_ids[i] for i in keep], [self.n_active[i] for i in keep]
        self._select(within.slots if before is None else within.pick(before))

    def _expand(self) -> None:
        """Give the rows in the loop all their tokens back, exited ones too, before rows of full width join them."""
        if self.selection is None or self.selection.slots is None:
            return
        B, T = len(self.row_ids), self.e.shape[1]
        # Write the rectangle's results back, then take its rows out again at full width.
        self.parked = {name: self._all_rows(name) for name in self.rows}
        whole = Selection(_as_index(self.row_ids, self.e.device), None, len(self.depths), T)
        self.rows = {name: whole.pick(x) for name, x in self.parked.items()}
        within = Selection(slice(None), self.selection.slots, B, T)
        # Exited tokens get a state of zeros: nothing asks for theirs again. A state of shape (B,) has no tokens.
        self.state = {
            name: x if x.ndim == 1 else within.put(x.new_zeros(B, T, *x.shape[2:]), x) for name, x in self.state.items()
        }

    def _select(self, slots: Tensor | None) -> None:
        """Record that `rows` are the rows `row_ids` of the call, cut to the tokens `slots` (None: all of them)."""
        if slots is None and len(self.row_ids) == self.n_joined:
            # Nothing is left out: slices do, and nothing has to be written back.
            self.selection, self.parked = None, {}
            rows = slice(0, self.n_joined)
            view = self.view if self.n_joined == len(self.depths) else self.view.take_rows(rows)
            self.current = (view, self.e[rows], self.n_loops[rows])
            return
        picked = Selection(_as_index(self.row_ids, self.e.device), slots, len(self.depths), self.e.shape[1])
        self.selection = picked
        self.current = (self.view.narrow(picked), picked.pick(self.e), picked.pick(self.n_loops))

    def _all_rows(self, name: str) -> Tensor:
        """Return one of `rows` for every row that has joined and all of their tokens."""
        x = self.rows[name]
        return x if self.selection is None else self.selection.put(self.parked[name], x)

    def output(self, restore: Tensor | None) -> RecurrentOutput:
        """Return the result, with rows put back in the caller's order by the index `restore`."""
        rows = {name: self._all_rows(name) for name in self.rows}
        if not self.adaptive:
            # At fixed depth nobody counted: a token ran its row's loops, padding none.
            loops = self.n_loops[:, None].expand(rows["h"].shape[:2])
            rows["loops"] = loops if self.view.valid is None else loops * self.view.valid
        if restore is not None:
            rows = {name: x[restore] for name, x in rows.items()}
        # The weighted sum was made in at least float32; the coda expects the dtype of the states.
        out = rows.get("out", rows["h"]).to(rows["h"].dtype)
        result = RecurrentOutput(out, rows["loops"], rows.get("ponder_cost"))
        if self.routers:
            z, load = (
                torch.stack([torch.stack([layer[i] for layer in loop]) for loop in self.routers]) for i in (0, 1)
            )
            # A batch of nothing but padding routes no token.
            routed = (load.sum() / self.n_chosen).clamp(min=1)
            result.router_z, result.tokens_per_expert = z.sum() / routed, load.sum(0).detach()
        if self.trace:
            result.hidden = torch.stack(self.hidden)
            result.halt_weight = torch.stack(self.weights) if self.weights else _last_loop_only(result.hidden)
        return result


def _loop_and_log(
    loop: Loop,
    view: View,
    previous: dict[int, KeyValues] | None,
    with_log: bool,
    h: Tensor,
    e: Tensor,
    loop_index: Tensor,
) -> tuple[Tensor, KVStore, RouterLog | None]:
    """Return the next h, and the containers that the loop wrote to, made anew each time: a checkpoint calls this twice.

    Recomputed keys, values and statistics in the first call's containers would keep alive all that they were made from.
    """
    store = view.store if previous is None else Scratch(previous)
    log: RouterLog | None = [] if with_log else None
    return loop(h, e, loop_index, dataclasses.replace(view, store=store, router_log=log)), store, log


def _count(active: Tensor) -> list[int]:
    """Return the true values of each row. For few of them a sum on the device takes longer than one here."""
    return list(map(sum, active.tolist())) if active.numel() <= 64 else active.sum(1).tolist()


def _as_index(rows: list[int], device: torch.device) -> Tensor | slice:
    """Return ascending rows as a slice if they are neighbours: taking them then copies nothing."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _extend(old: Rows, new: Rows) -> Rows:
    """Return the tensors of `old` with those of the rows that have just joined, `new`, appended."""
    return {name: torch.cat((old[name], x)) for name, x in new.items()} if old else new


def _checked(state: State, h: Tensor) -> State:
    """Return a rule's state, and refuse one whose tensors do not begin with rows, or rows and tokens."""
    for name, x in state.items():
        if x.shape[: min(x.ndim, 2)] not in (h.shape[:1], h.shape[:2]):
            raise ValueError(
                f"the rule's state {name!r} has shape {tuple(x.shape)}, but must be (B,) or start with (B, T) = "
                f"{tuple(h.shape[:2])}; give what belongs to a row the shape (B,)"
            )
    return state


def _last_loop_only(hidden: Tensor) -> Tensor:
    """Return the weights (L, B, T) of a call at fixed depth: 1 at the last loop, 0 before."""
    weight = hidden.new_zeros(hidden.shape[:3])
    weight[-1] = 1
    return weight
