"""The rows and tokens that are in the loop during one call, and how those that have exited leave the computation.

Shapes: B rows, T tokens, D width, E experts, L executed loops, C blocks in the core.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from open_mythos.nn.cache import KeyValues, KVCache, KVStore, Scratch, Selection, View
from open_mythos.nn.halting import Exit, Fixed, HaltingRule, Probe, Rows, State
from open_mythos.nn.static_cache import StaticKVCache
from open_mythos.ops.linear import is_traced
from open_mythos.ops.precision import at_least_float32

if TYPE_CHECKING:
    from open_mythos.nn.recurrent import RecurrentBlock

Compaction = Literal["counts", "always", "never"]
"""When tokens that have exited leave the computation; see `RecurrentBlock.compaction`."""
RouterLog = list[tuple[Tensor, Tensor]]


@dataclass
class RecurrentOutput:
    """What the loop leaves."""

    out: Tensor
    """(B, T, D), the last state of each token, or under ACT the halt-weighted sum of its states."""
    loops: Tensor
    """(B, T) int64, loops each token ran; 0 for padding."""
    ponder_cost: Tensor | None = None
    """(B, T), loops plus remainder, differentiable; only under ACT."""
    router_z: Tensor | None = None
    """Scalar, mean square of the router's log-sum-exp over routed tokens; only in training with experts."""
    tokens_per_expert: Tensor | None = None
    """(C, E) over all loops; only in training with experts."""
    hidden: Tensor | None = None
    """(L, B, T, D), the state after each loop; only with trace."""
    halt_weight: Tensor | None = None
    """(L, B, T), the weight of each state in `out`; only with trace."""


class Run:
    """The rows that are in the loop during one `RecurrentBlock.forward`, in order of decreasing depth.

    `rows` and `state` hold what the next loop computes. Once something has left, that is the `selection`, and `done`
    holds every row that has joined, as it stood when something last left. A token that has exited and not left stays in
    `rows` as it is: whether it leaves changes no result.
    """

    def __init__(
        self,
        block: "RecurrentBlock",
        rule: HaltingRule,
        probe: Probe | None,
        e: Tensor,
        view: View,
        depths: list[int],
        trace: bool,
        n_ticks: int | None = None,
    ) -> None:
        self.block, self.rule, self.probe, self.e, self.view, self.depths = block, rule, probe, e, view, depths
        self.n_ticks, self.together = n_ticks or depths[0], n_ticks is not None
        """Ticks of the call, and whether all of them have to run, for other processes count on them."""
        self.lockstep = self.n_ticks == depths[-1]
        # One depth for all needs no copy from the host, which a CUDA graph could not hold.
        every = torch.full((len(depths),), self.n_ticks, device=e.device)
        self.n_loops = every if self.lockstep else torch.tensor(depths, device=e.device)
        # At fixed depth nobody exits early: no masks, no copies, and nothing for a GPU to wait for.
        self.adaptive = not isinstance(rule, Fixed)
        # A graph runs the same operations for every input, so every loop runs in it and nothing leaves.
        self.blind = is_traced() or e.is_meta or (e.is_cuda and torch.cuda.is_current_stream_capturing())
        self.cached = isinstance(view.store, KVCache)
        self.static = view.store if isinstance(view.store, StaticKVCache) else None
        self.scratch = Scratch()
        self.rows: Rows = {}
        self.state: State = {}
        self.n_rows = 0
        self.here = (view, e, self.n_loops)
        self.live: list[int] = []
        """The rows of the call that are in `rows`."""
        self.counts: list[int] = []
        """Tokens in the loop, of each row in `rows`; shorter than that when rows have just joined."""
        self.selection: Selection | None = None
        self.done: Rows = {}
        self.routers: list[list[tuple[Tensor, Tensor]]] = []
        self.hidden: list[Tensor] | None = [] if trace else None
        self.weights: list[Tensor] = []

    def join(self, h: Tensor, tick: int) -> None:
        """Take in the rows whose first loop is this tick."""
        n_rows = sum(depth >= self.n_ticks - tick for depth in self.depths)
        if n_rows == self.n_rows and self.rows:
            return
        new = slice(self.n_rows, n_rows)
        rows: Rows = {"h": h[new]}
        if self.adaptive:
            self._widen()
            self.scratch = self.scratch.add_rows(n_rows - self.n_rows)
            valid = self.view.valid
            ones = torch.ones(h[new].shape[:2], dtype=torch.bool, device=h.device)
            rows |= {
                "active": ones if valid is None else valid[new],
                "loops": torch.zeros_like(ones, dtype=torch.int64),
                "n_loops": self.n_loops[new],
            }
            if self.rule.weighted:
                # Sums of many small weights: at least float32.
                sums = at_least_float32(h[new])
                rows |= {"out": sums.new_zeros(sums.shape), "ponder_cost": sums.new_zeros(sums.shape[:2])}
            self.state = _extend(self.state, _checked(self.rule.init(h[new], self.n_loops[new]), h[new]))
        self.rows = _extend(self.rows, rows)
        self.done = _extend(self.done, rows) if self.done else {}
        if self.view.valid is None and len(self.counts) == len(self.live):
            self.counts += [h.shape[1]] * (n_rows - self.n_rows)
        self.live += range(self.n_rows, n_rows)
        self.n_rows = n_rows
        self._select(None)

    def tick(self, tick: int) -> None:
        """One loop for what is in `rows`."""
        if self.adaptive and tick and not self.blind:
            if len(self.counts) < len(self.live):
                self.counts = self.rows["active"].sum(1).tolist()
            if not any(self.counts):
                # Whoever has joined has exited, and other rows are still to come.
                if self.together:
                    self._idle()
                return
            self._narrow(tick)
        h = self.rows["h"]
        view, e, n_loops = self.here
        loop_index, active = n_loops - (self.n_ticks - tick), self._active()
        last = tick + 1 == self.n_ticks
        exit = Exit(self.rule, self.probe, last)  # all rows end at the same tick
        if self.static is not None and self.adaptive:
            # A single token is in every loop that runs. Else always a mask, for with one or without are two graphs.
            active = self.rows["active"] if self.rows["active"].numel() > 1 or self.blind else None
            view = view.at_loop(loop_index, tick, active, self.static.at(tick, 0 if active is None else h.shape[1]))
            self._take(*self.block.advance(self.rows, self.state, e, loop_index, view, exit), last)
        else:
            store = None if self.static is None else self.static.at(tick)
            view = view.at_loop(loop_index, tick if self.lockstep else None, active, store)
            h_new, store, log = self._loop(h, e, loop_index, view, None if self.cached else self.scratch.current)
            # At fixed depth every token writes in every loop, so no loop reads what the one before it has left.
            if isinstance(store, Scratch) and self.adaptive:
                self.scratch = store
            if log:
                self.routers.append(log)
            if self.adaptive:
                self._take(*after_loop(exit, self.rows, self.state, h_new, loop_index, active), last)
            else:
                self.rows["h"] = h_new
        if self.hidden is not None:
            self.hidden.append(self._whole("h"))

    def _loop(
        self, h: Tensor, e: Tensor, loop_index: Tensor, view: View, previous: dict[int, KeyValues] | None
    ) -> tuple[Tensor, KVStore, RouterLog | None]:
        loop = partial(_loop, self.block, view, previous)
        if self.block.checkpoint_loops and torch.is_grad_enabled():
            return checkpoint(loop, h, e, loop_index, use_reentrant=False)
        return loop(h, e, loop_index)

    def _idle(self) -> None:
        """A loop of no rows, between those before and after it in the backward pass too."""
        none = slice(0, 0)
        view = self.view.take_rows(none).at_loop(self.n_loops[none])
        zero = self._loop(self.rows["h"][none], self.e[none], self.n_loops[none], view, {})[0].sum()
        self.rows |= {name: self.rows[name] + zero for name in ("h", "out") if name in self.rows}

    def _active(self) -> Tensor | None:
        """The mask of tokens in the loop; None if that is known to be every one, which spares a dozen operations."""
        if not self.adaptive:
            return None
        whole = self.selection is None or self.selection.slots is None
        n_tokens = self.rows["h"].shape[1]
        if whole and len(self.counts) == len(self.live) and min(self.counts, default=n_tokens) == n_tokens:
            return None
        return self.rows["active"]

    def _take(self, rows: Rows, state: State, weight: Tensor | None, last: bool) -> None:
        """Go on with what a loop has left."""
        if self.hidden is not None:
            left = self.rows["active"] & ~rows["active"]
            weight = left.to(rows["h"].dtype) if weight is None else weight
            none = weight.new_zeros(self.view.positions.shape)
            self.weights.append(weight if self.selection is None else self.selection.put(none, weight))
        self.rows, self.state = rows, state
        if self.blind:
            self.counts = []
        elif not last:
            # The only thing in a loop that the host waits for.
            self.counts = rows["active"].sum(1).tolist()

    def finished(self) -> bool:
        """Whether every row has joined and every token has exited."""
        return (
            self.adaptive
            and not self.blind
            and not self.together
            and self.n_rows == len(self.depths)
            and not any(self.counts)
        )

    # Compaction. `within` counts rows and tokens inside `rows`, `selection` inside the call.

    def _narrow(self, tick: int) -> None:
        """Leave out rows and tokens that have exited, if that pays. `tick` loops are done."""
        active = self.rows["active"]
        (B, T), device = active.shape, active.device
        keep, width = [i for i, n in enumerate(self.counts) if n], max(self.counts)
        if (len(keep), width) == (B, T) or not self._worthwhile(keep, width):
            return
        slots = None
        if width < T:
            # The tokens in the loop come first; such as have exited fill the shorter rows up.
            slots = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        rows = _rows(keep, device)
        within = Selection(rows, None if slots is None else Selection(rows, None, B, T).pick(slots), B, T)
        self.done = {name: self._whole(name) for name in self.rows}
        self.rows = {name: within.pick(x) for name, x in self.rows.items()}
        self.state = {name: within.pick(x) for name, x in self.state.items()}
        if len(keep) < B:
            self.scratch = self.scratch.take_rows(within.row_index(device))
            if isinstance(self.view.store, KVCache):
                gone = [row for row, n in zip(self.live, self.counts, strict=True) if not n]
                self.view.store.fill_forward(tick, self.e.shape[1], torch.tensor(gone, device=device))
        before = None if self.selection is None else self.selection.slots
        self.live, self.counts = [self.live[i] for i in keep], [self.counts[i] for i in keep]
        self._select(within.slots if before is None else within.pick(before))

    def _worthwhile(self, keep: list[int], width: int) -> bool:
        """Return whether to go on with the rows `keep` and `width` tokens of each."""
        if self.static is not None or self.block.compaction == "never":
            return False
        # Narrowing takes 25 to 40 small operations beside about 130 of a block, so at least a quarter has to leave.
        B, T = self.rows["h"].shape[:2]
        return self.block.compaction == "always" or len(keep) * width <= 0.75 * B * T

    def _widen(self) -> None:
        """Take the tokens back in that have left rows which go on: rows that join have all of theirs."""
        if self.selection is None or self.selection.slots is None:
            return
        B, T = len(self.live), self.e.shape[1]
        self.done = {name: self._whole(name) for name in self.rows}
        whole = Selection(_rows(self.live, self.e.device), None, len(self.depths), T)
        self.rows = {name: whole.pick(x) for name, x in self.done.items()}
        within = Selection(slice(None), self.selection.slots, B, T)
        # What a rule knew of a token that has exited is never read again.
        self.state = {
            name: x if x.ndim == 1 else within.put(x.new_zeros(B, T, *x.shape[2:]), x) for name, x in self.state.items()
        }

    def _select(self, slots: Tensor | None) -> None:
        """Let `rows` stand for the rows `live` of the call and these of their tokens."""
        if slots is None and len(self.live) == self.n_rows:
            self.selection, self.done = None, {}
            rows = slice(0, self.n_rows)
            view = self.view if self.n_rows == len(self.depths) else self.view.take_rows(rows)
            self.here = (view, self.e[rows], self.n_loops[rows])
            return
        picked = Selection(_rows(self.live, self.e.device), slots, len(self.depths), self.e.shape[1])
        self.selection = picked
        self.here = (self.view.narrow(picked), picked.pick(self.e), picked.pick(self.n_loops))

    def _whole(self, name: str) -> Tensor:
        """One of `rows` for every row that has joined and all their tokens."""
        x = self.rows[name]
        return x if self.selection is None else self.selection.put(self.done[name], x)

    def output(self, restore: Tensor | None) -> RecurrentOutput:
        """The result, with rows put back in the caller's order by the index `restore`."""
        rows = {name: self._whole(name) for name in self.rows}
        if not self.adaptive:
            loops = self.n_loops[:, None].expand(rows["h"].shape[:2])
            rows["loops"] = loops if self.view.valid is None else loops * self.view.valid
        if restore is not None:
            rows = {name: x[restore] for name, x in rows.items()}
        out = rows.get("out", rows["h"]).to(rows["h"].dtype)
        result = RecurrentOutput(out, rows["loops"], rows.get("ponder_cost"))
        if self.routers:
            z, load = (
                torch.stack([torch.stack([layer[i] for layer in loop]) for loop in self.routers]) for i in (0, 1)
            )
            # A batch of nothing but padding routes no token.
            routed = (load.sum() / self.block.cfg.n_experts_per_tok).clamp(min=1)
            result.router_z, result.tokens_per_expert = z.sum() / routed, load.sum(0).detach()
        if self.hidden is not None:
            result.hidden = torch.stack(self.hidden)
            result.halt_weight = torch.stack(self.weights) if self.weights else _last_loop_only(result.hidden)
        return result


def _loop(
    block: "RecurrentBlock",
    view: View,
    previous: dict[int, KeyValues] | None,
    h: Tensor,
    e: Tensor,
    loop_index: Tensor,
) -> tuple[Tensor, KVStore, RouterLog | None]:
    """h' and what the loop wrote besides, made anew each time, for a checkpoint calls this twice.

    Recomputed keys, values and statistics in the first call's containers would keep alive all that they were made from.
    """
    store = view.store if previous is None else Scratch(previous)
    log: RouterLog | None = [] if block.training and block.cfg.n_experts else None
    return block.loop(h, e, loop_index, dataclasses.replace(view, store=store, router_log=log)), store, log


def after_loop(
    exit: Exit, rows: Rows, state: State, h_new: Tensor, loop_index: Tensor, active: Tensor | None
) -> tuple[Rows, State, Tensor | None]:
    """Apply the exit and count loops: rows and the rule's state after a loop, and the weight of h_new if it has one."""
    still = rows["active"]
    rows, state, exit_mask, weight = exit.apply(rows, state, h_new, loop_index, active)
    rows["loops"] = rows["loops"] + still
    rows["active"] = ~exit_mask if active is None else still & ~exit_mask
    if weight is not None:
        rows["ponder_cost"] = torch.where(exit_mask, rows["loops"] + weight, rows["ponder_cost"])
    return rows, state, weight


def _rows(index: list[int], device: torch.device) -> Tensor | slice:
    """Ascending rows as a slice if they stand side by side, which copies nothing."""
    if index[-1] - index[0] == len(index) - 1:
        return slice(index[0], index[-1] + 1)
    return torch.tensor(index, device=device)


def _extend(old: Rows, new: Rows) -> Rows:
    """`old` with the rows that have just joined behind it."""
    return {name: torch.cat((old[name], x)) for name, x in new.items()} if old else new


def _checked(state: State, h: Tensor) -> State:
    """Rows and tokens of a rule's state are taken out by their place, so it has to have those."""
    for name, x in state.items():
        if x.shape[: min(x.ndim, 2)] not in (h.shape[:1], h.shape[:2]):
            raise ValueError(
                f"the rule's state {name!r} has shape {tuple(x.shape)}, but must be (B,) or start with (B, T) = "
                f"{tuple(h.shape[:2])}; give what belongs to a row the shape (B,)"
            )
    return state


def _last_loop_only(hidden: Tensor) -> Tensor:
    weight = hidden.new_zeros(hidden.shape[:3])
    weight[-1] = 1
    return weight
