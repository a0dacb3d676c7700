"""The looped part of the model: one loop, and the call that runs a batch through as many as each token needs.

Shapes: B rows, T tokens, D width.
"""

import dataclasses

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.nn.block import TransformerBlock
from open_mythos.nn.cache import KVCache
from open_mythos.nn.depth import LoopPlan, LoRAAdapter, loop_embeddings
from open_mythos.nn.driver import Compaction, LoopDriver, RecurrentOutput
from open_mythos.nn.halting import ACT, ACTHalting, Exit, Fixed, HaltingRule, Ouro, Probe, Rows, State
from open_mythos.nn.injection import INJECTIONS, Injection
from open_mythos.nn.moe import MoEFFN
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.view import LoopConstants, View
from open_mythos.ops.linear import autocasts, is_traced
from open_mythos.ops.precision import as_dtype


class RecurrentBlock(nn.Module):
    """The recurrent block. Its `forward` runs the whole loop, so that sharding gathers its weights once per call."""

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.cfg = cfg
        blocks = [TransformerBlock(cfg, recurrent=True) for _ in range(cfg.recurrent_layers)]
        self.block: nn.Module = blocks[0] if len(blocks) == 1 else nn.ModuleList(blocks)
        self.injection: Injection = INJECTIONS[cfg.injection](cfg.dim)
        self.act = None if cfg.halting == "none" else ACTHalting(cfg.dim, cfg.max_loop_iters)
        self.lora = LoRAAdapter(cfg.dim, cfg.lora_rank, cfg.max_loop_iters) if cfg.lora_rank else None
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps) if self.injection.normalises_input else None
        self.out_norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.state_norm == "loop" else None
        self.checkpoint_loops = False
        """Recompute each loop and each outer block in the backward pass instead of keeping their activations."""
        self.compaction: Compaction = "counts"
        """When tokens that have exited leave the computation. Results differ in rounding only, and in dropout's draws.

        `counts`: as soon as a quarter of the tokens has exited. `always`: at once. `never`: they are computed, and the
        results dropped. None of them reads a clock, so the same call gives the same bits.
        """

    @property
    def blocks(self) -> list[TransformerBlock]:
        """Blocks of the core as a list, also when there is only one."""
        return list(self.block) if isinstance(self.block, nn.ModuleList) else [self.block]  # ty: ignore[invalid-explicit-return]

    @property
    def layers(self) -> range:
        """Indices of the core's blocks in a store of keys and values."""
        return range(self.cfg.prelude_layers, self.cfg.prelude_layers + self.cfg.recurrent_layers)

    @property
    def rule(self) -> HaltingRule:
        """Halting rule of the model itself."""
        if self.act is None:
            return Fixed(self.cfg.min_loops)
        if self.cfg.halting == "ouro":
            return Ouro.make(None, self.cfg.min_loops, self.cfg, self.act)
        return ACT(self.act, self.cfg.act_threshold, self.cfg.min_loops)

    def loop(self, h: Tensor, e: Tensor, loop_index: Tensor, view: View) -> Tensor:
        """Compute one loop: h' = after(h, e, y), y = core(u) + lora(core(u)), u = before(h + loop embedding, e).

        Args:
            h: (B, T, D), the state.
            e: (B, T, D), what `injection.prepare` made of the prelude's output.
            loop_index: (B,) int64, 0-based; rows may differ. Beyond `max_loop_iters` the last index is used.
            view: of this loop, made by `View.at_loop`, with `constants`.
        """
        shared = view.constants or self.constants(h)
        last = self.cfg.max_loop_iters - 1
        # A compiler would make a graph for each value of an int.
        index = loop_index.clamp(max=last) if is_traced() or view.lockstep is None else min(view.lockstep, last)
        # 1. Tell the block which loop this is, and inject the prelude's output.
        u = h
        if shared.loop_embeddings is not None:
            embedding = shared.loop_embeddings[index]
            u = as_dtype(h + (embedding if isinstance(index, int) else embedding[:, None]), h.dtype)
        u = self.injection.before(u, e, shared.decay)
        if self.norm is not None:
            u = self.norm(u)
        # 2. The core, and a low-rank change of it for each loop.
        for i, block in enumerate(self.blocks):
            u = block(u, view, self.cfg.prelude_layers + i)
        if self.lora is not None:
            u = u + self.lora(u, index)
        # 3. The next state.
        h = self.injection.after(h, e, u, shared.decay)
        return h if self.out_norm is None else self.out_norm(h)

    def advance(
        self, rows: Rows, state: State, e: Tensor, loop_index: Tensor, view: View, exit: Exit
    ) -> tuple[Rows, State, Tensor, Tensor | None]:
        """Run a loop and the exit decision after it as one function, which a compiler can make one graph of.

        Returns: the new rows, the rule's state, the tokens that exit (B, T), and the weights (B, T) or None.
        """
        h_new = self.loop(rows["h"], e, loop_index, view)
        return exit.apply(rows, state, h_new, loop_index, view.active)

    def constants(self, h: Tensor) -> LoopConstants:
        """Return the tensors that the loops of a call on states like `h` share."""
        embeddings = None
        if self.cfg.loop_embedding:
            every = torch.arange(self.cfg.max_loop_iters, device=h.device)
            embeddings = loop_embeddings(every, h, self.cfg.dim // 8)
        experts = {}
        # Autocast would convert the experts' weights again in every loop.
        if autocasts(h):
            ffns = zip(self.layers, (block.ffn for block in self.blocks), strict=True)
            experts = {layer: ffn.experts.weights(h) for layer, ffn in ffns if isinstance(ffn, MoEFFN)}
        return LoopConstants(embeddings, self.injection.get_A(), experts)

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
        """Run the loop until every token has exited.

        Args:
            h: (B, T, D), the state before the first loop.
            e: (B, T, D), the prelude's output.
            view: of this call. A cache takes an int `depth`.
            depth: loops for every row, or a plan with one depth per row.
            exit: replaces the model's own halting; the output is then the last state (ACT keeps its weighted sum).
            probe: state -> logits (B, T, V), for rules that need it.
            trace: keep every state; takes an int `depth`.
        """
        # 1. One depth per row, the deepest row first.
        plan = depth if isinstance(depth, LoopPlan) else LoopPlan((depth,) * h.shape[0])
        order = None
        if min(plan.depths) < max(plan.depths):
            # Rows join in order of depth, so the rows in the loop are always the first ones: a slice drops the rest.
            deepest_first = sorted(range(len(plan.depths)), key=lambda i: -plan.depths[i])
            order = torch.tensor(deepest_first, device=h.device)
            h, e, view = h[order], e[order], view.take_rows(order)
        # 2. Processes that share experts exchange tokens in every loop, so all run equally many, whatever has exited.
        together = plan.n_ticks is not None or any(
            isinstance(block.ffn, MoEFFN) and block.ffn.experts.group is not None for block in self.blocks
        )
        # 3. The loop. What does not change from loop to loop (the injection's input, constants) is made once, here.
        # The calls on one cache share their constants.
        cache = view.store if isinstance(view.store, KVCache) and not autocasts(h) else None
        constants = self.constants(h) if cache is None or cache.constants is None else cache.constants
        if cache is not None:
            cache.constants = constants
        driver = LoopDriver(
            self.loop,
            self.advance,
            exit or self.rule,
            probe,
            self.injection.prepare(e),
            dataclasses.replace(view, constants=constants),
            sorted(plan.depths, reverse=True),
            plan.n_ticks or max(plan.depths),
            together,
            self.compaction,
            self.checkpoint_loops,
            self.cfg.n_experts_per_tok if self.training and self.cfg.n_experts else 0,
            trace,
        )
        n_done = driver.run(h, plan.n_grad)
        # 4. Levels that no loop reached take the last loop's keys and values, for later tokens that go deeper.
        if isinstance(view.store, KVCache):
            view.store.fill_forward(n_done, h.shape[1])
        # `order` sorted the rows; its inverse puts the results back in the caller's order.
        return driver.output(None if order is None else order.argsort())
