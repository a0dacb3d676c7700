"""The looped part of the model: one loop, and the driver that runs a batch through as many as each token needs.

Shapes: B rows, T tokens, D width, E experts, L executed loops, C blocks in the core.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from open_mythos.config import MythosConfig
from open_mythos.nn.block import TransformerBlock
from open_mythos.nn.cache import KVCache, Scratch, View
from open_mythos.nn.depth import LoopPlan, LoRAAdapter, loop_index_embedding
from open_mythos.nn.halting import ACT, ACTHalting, Fixed, HaltingRule
from open_mythos.nn.injection import INJECTIONS, Injection
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.numerics import wide

Probe = Callable[[Tensor], Tensor]
Rows = dict[str, Tensor]


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


class RecurrentBlock(nn.Module):
    """The recurrent block. Its `forward` runs the whole loop, so that sharding gathers its weights once per call."""

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.cfg = cfg
        blocks = [TransformerBlock(cfg, recurrent=True) for _ in range(cfg.recurrent_layers)]
        self.block: nn.Module = blocks[0] if len(blocks) == 1 else nn.ModuleList(blocks)
        self.injection: Injection = INJECTIONS[cfg.injection](cfg.dim)
        self.act = ACTHalting(cfg.dim, cfg.max_loop_iters) if cfg.halting == "act" else None
        self.lora = LoRAAdapter(cfg.dim, cfg.lora_rank, cfg.max_loop_iters) if cfg.lora_rank else None
        self.norm = RMSNorm(cfg.dim) if cfg.injection == "lti" else None
        self.checkpoint_loops = False
        """Recompute each loop in the backward pass instead of keeping its activations."""

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The core's blocks, whether there is one or several."""
        return list(self.block) if isinstance(self.block, nn.ModuleList) else [self.block]  # ty: ignore[invalid-explicit-return]

    @property
    def rule(self) -> HaltingRule:
        """The model's own halting."""
        if self.act is None:
            return Fixed(self.cfg.min_loops)
        return ACT(self.act, self.cfg.act_threshold, self.cfg.min_loops)

    def loop(self, h: Tensor, e: Tensor, loop_index: Tensor, view: View) -> Tensor:
        """One loop: h' = after(h, e, y), y = core(u) + lora(core(u)), u = before(h + loop embedding, e).

        Args:
            h, e: (B, T, D), the state and the prelude's output.
            loop_index: (B,) int64, 0-based; rows may differ. Beyond `max_loop_iters` the last index is used.
            view: of this loop, made by `View.at_loop`.
        """
        index = loop_index.clamp(max=self.cfg.max_loop_iters - 1)
        u = loop_index_embedding(h, index, self.cfg.dim // 8) if self.cfg.loop_embedding else h
        u = self.injection.before(u, e)
        if self.norm is not None:
            u = self.norm(u)
        for i, block in enumerate(self.blocks):
            u = block(u, view, self.cfg.prelude_layers + i)
        if self.lora is not None:
            u = u + self.lora(u, index)
        return self.injection.after(h, e, u)

    def forward(
        self,
        h: Tensor,
        e: Tensor,
        view: View,
        depth: int | LoopPlan,
        exit: HaltingRule | None = None,
        probe: Probe | None = None,
        trace: bool = False,
    ) -> RecurrentOutput:
        """Loop until every token has exited.

        Args:
            h: (B, T, D), the state before the first loop.
            e: (B, T, D), the prelude's output.
            view: of this call. A cache takes an int `depth`.
            depth: loops for every row, or a plan with one depth per row.
            exit: replaces the model's own halting; the output is then the last state (ACT keeps its weighted sum).
            probe: state -> logits (B, T, V), for rules that need it.
            trace: keep every state; takes an int `depth`.
        """
        plan = depth if isinstance(depth, LoopPlan) else LoopPlan((depth,) * h.shape[0])
        n_ticks = max(plan.depths)
        order = None
        if min(plan.depths) < n_ticks:
            # Deepest first: the rows in the loop are then always the first ones, and a slice drops those that wait.
            order = torch.tensor(plan.depths).argsort(descending=True, stable=True).to(h.device)
            h, e, view = h[order], e[order], view.take_rows(order)
        run = _Run(self, exit or self.rule, probe, e, view, sorted(plan.depths, reverse=True), trace)
        for tick in range(n_ticks):
            run.join(h, tick)
            window = nullcontext() if plan.n_grad is None or tick >= n_ticks - plan.n_grad else torch.no_grad()
            with window:
                run.tick(tick)
            if tick + 1 < n_ticks and run.finished():
                break
        if isinstance(view.store, KVCache):
            view.store.fill_forward(tick + 1, h.shape[1])
        return run.output(None if order is None else order.argsort())


class _Run:
    """The rows that are in the loop during one `RecurrentBlock.forward`, in order of decreasing depth."""

    def __init__(
        self,
        block: RecurrentBlock,
        rule: HaltingRule,
        probe: Probe | None,
        e: Tensor,
        view: View,
        depths: list[int],
        trace: bool,
    ) -> None:
        self.block, self.rule, self.probe, self.e, self.view, self.depths = block, rule, probe, e, view, depths
        self.n_loops = torch.tensor(depths, device=e.device)
        self.lockstep = depths[0] == depths[-1]
        # At fixed depth nobody exits early: no masks, no copies, and nothing for a GPU to wait for.
        self.adaptive = not isinstance(rule, Fixed)
        self.cached = isinstance(view.store, KVCache)
        self.scratch = Scratch()
        self.rows: Rows = {}
        self.state: Rows = {}
        self.n_rows = 0
        self.routers: list[list[tuple[Tensor, Tensor]]] = []
        self.hidden: list[Tensor] | None = [] if trace else None
        self.weights: list[Tensor] = []

    def join(self, h: Tensor, tick: int) -> None:
        """Take in the rows whose first loop is this tick."""
        n_rows = sum(depth >= self.depths[0] - tick for depth in self.depths)
        if n_rows == self.n_rows:
            return
        new = slice(self.n_rows, n_rows)
        rows: Rows = {"h": h[new]}
        if self.adaptive:
            valid = self.view.valid
            ones = torch.ones(h[new].shape[:2], dtype=torch.bool, device=h.device)
            rows |= {
                "active": ones if valid is None else valid[new],
                "loops": torch.zeros_like(ones, dtype=torch.int64),
            }
            if self.rule.weighted:
                # Sums of many small weights: at least float32.
                rows |= {"out": torch.zeros_like(wide(h[new])), "ponder_cost": torch.zeros_like(wide(h[new][..., 0]))}
            self.state = _extend(self.state, self.rule.init(h[new], self.n_loops[new]))
        self.rows = _extend(self.rows, rows)
        self.n_rows = n_rows

    def tick(self, tick: int) -> None:
        """One loop for every row that has joined."""
        rows = slice(0, self.n_rows)
        h, e = self.rows["h"], self.e[rows]
        loop_index = self.n_loops[rows] - (self.depths[0] - tick)
        store = self.view.store if self.cached else Scratch(self.scratch.current)
        log = [] if self.block.training and self.block.cfg.n_experts else None
        view = self.view if self.n_rows == len(self.depths) else self.view.take_rows(rows)
        view = view.at_loop(loop_index, tick if self.lockstep else None, self.rows.get("active"), store, log)
        if self.block.checkpoint_loops and torch.is_grad_enabled():
            h_new = checkpoint(self.block.loop, h, e, loop_index, view, use_reentrant=False)
        else:
            h_new = self.block.loop(h, e, loop_index, view)
        if isinstance(store, Scratch):
            self.scratch = store
        if log:
            self.routers.append(log)
        if self.adaptive:
            self._exit(h, h_new, loop_index)
        else:
            self.rows["h"] = h_new
        if self.hidden is not None:
            self.hidden.append(self.rows["h"])

    def _exit(self, h: Tensor, h_new: Tensor, loop_index: Tensor) -> None:
        rows = self.rows
        probe = self.probe(h_new) if self.rule.needs_probe and self.probe is not None else None
        self.state, exit_mask, weight = self.rule.update(self.state, h, h_new, loop_index, probe)
        active = rows["active"]
        exit_mask = exit_mask & active
        rows["h"] = torch.where(active[..., None], h_new, h)
        rows["loops"] = rows["loops"] + active
        if weight is not None:
            weight = weight * active
            rows["out"] = rows["out"] + weight[..., None] * h_new
            rows["ponder_cost"] = torch.where(exit_mask, rows["loops"] + weight, rows["ponder_cost"])
        if self.hidden is not None:
            self.weights.append(exit_mask.to(h.dtype) if weight is None else weight)
        rows["active"] = active & ~exit_mask

    def finished(self) -> bool:
        """Whether every row has joined and every token has exited."""
        return self.adaptive and self.n_rows == len(self.depths) and not bool(self.rows["active"].any())

    def output(self, restore: Tensor | None) -> RecurrentOutput:
        """The result, with rows put back in the caller's order by the index `restore`."""
        rows = self.rows
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


def _extend(old: Rows, new: Rows) -> Rows:
    """`old` with the rows that have just joined behind it."""
    return {name: torch.cat((old[name], x)) for name, x in new.items()} if old else new


def _last_loop_only(hidden: Tensor) -> Tensor:
    weight = hidden.new_zeros(hidden.shape[:3])
    weight[-1] = 1
    return weight
