"""OpenMythos: a recurrent-depth transformer. Prelude, a block that is looped, coda; the head is tied to the embedding.

The stages `encode`, `recur`, `readout` and the whole loop `recurrent` are what everything above the model calls;
`forward` composes them.

Shapes: B rows, T new tokens, D width, L loops, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from open_mythos import model_folder
from open_mythos.accounting import count_parameters
from open_mythos.checks import check_choice, check_int, check_number
from open_mythos.config import MythosConfig
from open_mythos.convert.published import find_published
from open_mythos.device import AutoDtype
from open_mythos.generation.generate import GenerationMixin
from open_mythos.nn.block import ATTENTIONS, TransformerBlock
from open_mythos.nn.cache import KVCache
from open_mythos.nn.depth import LoopPlan, check_n_loops, check_plan
from open_mythos.nn.halting import HaltingRule, rule_of_call
from open_mythos.nn.init import NoDraws, init_weights
from open_mythos.nn.initial_state import check_start, first_state
from open_mythos.nn.inputs import check_documents, check_ids, check_mask, check_room, make_view, refuse_unknown
from open_mythos.nn.moe import MoEFFN, check_load
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.quantized import use_int8
from open_mythos.nn.recurrent import RecurrentBlock, RecurrentOutput
from open_mythos.nn.static_cache import StaticKVCache
from open_mythos.nn.view import View
from open_mythos.ops.linear import Linear, autocasts, linear
from open_mythos.ops.routes import faster_dtype


@dataclass
class LoopTrace:
    """One forward pass with everything the loop did. L counts executed loops; a token that exited repeats its state."""

    logits: Tensor
    """(B, T, V)"""
    hidden: Tensor
    """(L, B, T, D), the state after each loop."""
    halt_weight: Tensor
    """(L, B, T), the weight of each loop's state in the output; sums to 1 over L."""
    exit_loop: Tensor
    """(B, T) int64, the last loop each token ran, 0-based; -1 for padding."""


@dataclass
class TrainOutput:
    """The outputs of a forward pass in training. Logits are computed when they are first used, and stored."""

    hidden: Tensor
    """(B, T, D), what the head reads: after coda and norm, in the dtype of the head's product."""
    loop_hidden: Tensor | None
    """(L, B, T, D), what the head reads of the state after each loop; only with trace."""
    head: Tensor
    """(V, D), the head's weight in the same dtype: with `hidden`, all that a chunked cross-entropy needs."""
    loops: Tensor
    """(B, T) int64, loops each token ran."""
    ponder_cost: Tensor | None
    """Scalar, mean over tokens of loops plus remainder (Graves 2016); only with halting="act"."""
    router_z_loss: Tensor | None
    """Scalar, mean over routed tokens of logsumexp(router logits)^2 (Zoph et al. 2022); only with experts."""
    tokens_per_expert: Tensor | None
    """(recurrent_layers, n_experts), for `update_expert_bias`; only with experts."""
    n_routed: Tensor | None
    """Scalar, loops that tokens have run: what `router_z_loss` is the mean over, layers apart; only with experts."""

    @cached_property
    def logits(self) -> Tensor:
        """(B, T, V)"""
        return linear(self.hidden, self.head)

    @cached_property
    def loop_logits(self) -> Tensor | None:
        """(L, B, T, V), what coda and head read off the state after each loop; only with trace."""
        return None if self.loop_hidden is None else linear(self.loop_hidden, self.head)


class OpenMythos(GenerationMixin):
    """The model. Its values are drawn once, by `init_weights`; under `torch.device("meta")` it has none."""

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        cfg.validate()
        self.cfg = cfg
        with NoDraws():
            self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
            self.prelude = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.prelude_layers))
            self.prelude_norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.prelude_norm else nn.Identity()
            self.recurrent = RecurrentBlock(cfg) if cfg.recurrent_layers else None
            self.coda = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.coda_layers))
            self.norm = nn.Identity() if cfg.state_norm == "loop" else RMSNorm(cfg.dim, cfg.norm_eps)
            self.head = Linear(cfg.dim, cfg.vocab_size)
        self.tie_head()
        if not self.embed.weight.is_meta:
            init_weights(self, cfg)
        if cfg.weights == "int8":
            use_int8(self)

    def train(self, mode: bool = True) -> "OpenMythos":
        if mode and self.cfg.weights == "int8":
            raise ValueError("weights='int8' cannot be trained; train the model that this one was made from")
        return super().train(mode)

    def tie_head(self) -> None:
        """Make the embedding the head, unless the head has a matrix of its own."""
        if self.cfg.tie_embeddings:
            self.head.weight = self.embed.weight

    @property
    def _last_norm(self) -> Any:
        return self.norm if self.cfg.state_norm != "loop" else self._recurrent().out_norm

    @property
    def device(self) -> torch.device:
        return self._last_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._last_norm.weight.dtype

    # The stages.

    def encode(self, input_ids: Tensor, view: View) -> Tensor:
        """Embedding and prelude: (B, T) int64 -> e (B, T, D)."""
        x = self.embed(input_ids)
        x = x if self.cfg.embed_scale == 1 else x * self.cfg.embed_scale
        for layer, block in enumerate(self.prelude):
            x = self._run_block(block, x, view, layer)
        return self.prelude_norm(x)

    def recur(self, h: Tensor, e: Tensor, loop_index: Tensor, view: View) -> Tensor:
        """One loop: h, e (B, T, D) and loop_index (B,) int64, 0-based, one per row -> the next h (B, T, D)."""
        block = self._recurrent()
        return block.loop(
            h, block.injection.prepare(e), loop_index, view.at_loop(loop_index, view.lockstep, view.active)
        )

    def readout(self, out: Tensor, view: View, last_only: bool = False) -> Tensor:
        """Coda, norm and head: (B, T, D) -> logits (B, T, V), or (B, 1, V) of the last position."""
        return self.head(self.decode(out, view, last_only))

    def decode(self, out: Tensor, view: View, last_only: bool = False) -> Tensor:
        """Coda and norm: (B, T, D) -> what the head reads, (B, T, D), or (B, 1, D) of the last position."""
        first = self.cfg.prelude_layers + self.cfg.recurrent_layers
        out = self.norm(out) if self.cfg.state_norm == "coda" else out
        for i, block in enumerate(self.coda):
            out = self._run_block(block, out, view, first + i)
        return self.norm(out[:, -1:] if last_only else out)

    def _run_block(self, block: nn.Module, x: Tensor, view: View, layer: int) -> Tensor:
        if self.recurrent is not None and self.recurrent.checkpoint_loops and torch.is_grad_enabled():
            return checkpoint(block, x, view, layer, use_reentrant=False)
        return block(x, view, layer)

    def make_view(
        self,
        shape: tuple[int, int],
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
    ) -> View:
        """Return the view of a call with `shape` = (B, T) new tokens: positions, masks, angles and the store."""
        check_documents(documents, shape, cache)
        dim, theta = ATTENTIONS[self.cfg.attn_type].rope_dim(self.cfg), self.cfg.rope_theta
        return make_view(shape, dim, theta, self.dtype, self.device, attention_mask, cache, documents)

    def make_cache(self, batch_size: int, max_len: int, n_loops: int | None = None, static: bool = False) -> KVCache:
        """Make an empty key/value cache: `batch_size` rows of up to `max_len` tokens at up to `n_loops` loops.

        With `static`, a `StaticKVCache`: calls at fixed depth that a CUDA graph can capture, each of which reads all
        `max_len` slots.

        Raises:
            ValueError: `max_len` is beyond `max_seq_len`, or a size is not positive.
        """
        cfg = self.cfg
        check_int("batch_size", batch_size, 1, 2**31, "use batch_size=1")
        check_int("max_len", max_len, 1, cfg.max_seq_len, f"use max_len={cfg.max_seq_len} (max_seq_len) or less")
        levels = check_n_loops(n_loops, cfg)
        shapes = ATTENTIONS[cfg.attn_type].cache_shapes(cfg)
        around, looped = [(1, shapes)], [(levels, shapes)]
        layers = around * cfg.prelude_layers + looped * cfg.recurrent_layers + around * cfg.coda_layers
        kind = StaticKVCache if static else KVCache
        return kind(layers, batch_size, max_len, levels, self.dtype, self.device)

    # The whole model.

    def forward(
        self,
        input_ids: Tensor,
        n_loops: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        plan: LoopPlan | None = None,
        exit: str | HaltingRule | None = None,
        exit_threshold: float | None = None,
        trace: bool = False,
        last_only: bool = False,
        generator: torch.Generator | None = None,
        initial_state: Tensor | None = None,
        documents: Tensor | None = None,
        **removed: Any,
    ) -> Tensor | LoopTrace | TrainOutput:
        """Return the logits of every position.

        Args:
            input_ids: (B, T) int64, new tokens.
            n_loops: loops for every row; None takes the cache's depth, else `max_loop_iters`, beyond which the depth
                LoRA and the loop embedding stay at their last index.
            attention_mask: (B, T), zero for padding (on the left for generation), of the new tokens only; None: none.
            cache: from `make_cache`. The call appends its tokens (any number at a time), runs without gradients, and
                may use fewer loops than the cache has levels: the last loop run then stands for the deeper ones.
            plan: training. One depth per row and the window of back-propagation; the result is a `TrainOutput`.
            exit: a rule that replaces the model's halting for this call: a name in HALTING_RULES, or a `HaltingRule`.
            exit_threshold: of that rule; None takes its default.
            trace: return a `LoopTrace` instead of logits. With `plan`, whose depths then have to be equal and the
                model's halting "none", the `TrainOutput` holds logits of every loop.
            last_only: logits of the last position only, (B, 1, V): all that sampling needs.
            generator: draws the noise of `initial_state="normal"`. None: fixed noise in eval mode, torch's in training.
            initial_state: (B, T, D), the state of the new tokens before the first loop, in place of the model's own.
            documents: (B, T) int64, each token's document, never falling: attention stays inside. Not with a cache.

        Raises:
            TypeError, ValueError: an argument is unusable; nothing has been computed and the cache is untouched.
        """
        refuse_unknown(removed)
        check_ids(input_ids, self.cfg)
        check_mask(input_ids, attention_mask)
        check_room(input_ids, cache, self.cfg, self.dtype, self.device)
        start = check_start(generator, initial_state, input_ids, self.cfg.dim)
        depth: int | LoopPlan = check_n_loops(n_loops, self.cfg, None if cache is None else cache.n_loops)
        if plan is not None:
            others = {"n_loops": n_loops, "cache": cache, "exit": exit, "last_only": last_only or None}
            check_plan(plan, input_ids, self.cfg, trace, others)
            depth = plan
        if trace:
            self._recurrent()
        rule = self.exit_rule(exit, exit_threshold)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            view = self.make_view((input_ids.shape[0], input_ids.shape[1]), attention_mask, cache, documents)
            if plan is not None:
                return self._train_output(self.run_loop(input_ids, view, depth, rule, cache, start, trace), view)
            logits, result = self.run(input_ids, view, depth, rule, cache, start, trace, last_only)
        if result.hidden is not None and result.halt_weight is not None:
            return LoopTrace(logits, result.hidden, result.halt_weight, result.loops - 1)
        return logits

    def run(
        self,
        input_ids: Tensor,
        view: View,
        depth: int | LoopPlan,
        rule: HaltingRule | None = None,
        cache: KVCache | None = None,
        start: torch.Generator | Tensor | None = None,
        trace: bool = False,
        last_only: bool = False,
    ) -> tuple[Tensor, RecurrentOutput]:
        """Compute `forward` from checked arguments; return logits and the result of the loop."""
        result = self.run_loop(input_ids, view, depth, rule, cache, start, trace)
        logits = self.readout(result.out, view, last_only)
        if cache is not None:
            cache.advance(input_ids.shape[1], view.valid)
        return logits, result

    def run_loop(
        self,
        input_ids: Tensor,
        view: View,
        depth: int | LoopPlan,
        rule: HaltingRule | None,
        cache: KVCache | None,
        start: torch.Generator | Tensor | None,
        trace: bool,
    ) -> RecurrentOutput:
        """Compute embedding, prelude and loop from checked arguments."""
        e = self.encode(input_ids, view)
        if self.recurrent is None:
            return RecurrentOutput(e, torch.zeros_like(input_ids))
        h = first_state(self.cfg, e, view, cache, start, self.training)
        return self.recurrent(h, e, view, depth, rule, self._probe, trace)

    def exit_rule(self, exit: str | HaltingRule | None, threshold: float | None = None) -> HaltingRule | None:
        """Return the rule for `exit` and `exit_threshold` of a call; None: the model's own halting."""
        return rule_of_call(exit, threshold, self.cfg, lambda: self._recurrent().act)

    @torch.no_grad()
    def update_expert_bias(self, tokens_per_expert: Tensor, rate: float = 1e-3) -> Tensor:
        """Move every expert's bias by `rate` towards an even load; call it after each optimizer step.

        Args:
            tokens_per_expert: (recurrent_layers, n_experts), `TrainOutput.tokens_per_expert` summed over the step's
                micro-batches (and ranks).

        Returns:
            The largest expert's load over the mean, the worst layer's; 1 is even. A scalar tensor: nothing waits for a
            GPU until it is read.

        Raises:
            TypeError, ValueError: the shape is another, or `rate` is no finite number of at least 0; nothing has moved.

        Source: Wang et al. 2024, arXiv 2408.15664.
        """
        check_load(tokens_per_expert, self.cfg)
        check_number("rate", rate, 0)
        mean = tokens_per_expert.mean(dim=-1, keepdim=True)
        experts = [block.ffn for block in self._recurrent().blocks if isinstance(block.ffn, MoEFFN)]
        for ffn, error in zip(experts, mean - tokens_per_expert, strict=True):
            ffn.router_bias += rate * error.sign()
        return (tokens_per_expert / mean).max()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`.

        Over an older model this is one step: at any instant the folder loads as the one model or as the other.
        """
        model_folder.save(folder, self.cfg, self.state_dict())

    @classmethod
    def without_weights(cls, folder: str | Path) -> "OpenMythos":
        """Make the model of a folder on the meta device, once the folder's tensors are known to be this model's.

        Raises:
            As `from_pretrained`.
        """
        if (source := find_published(folder)) is not None:
            with torch.device("meta"):
                return cls(source.cfg)
        cfg, shapes = model_folder.read_config(folder), model_folder.read_shapes(folder)
        layers = cfg.prelude_layers + cfg.recurrent_layers + cfg.coda_layers
        model_folder.check_size(shapes, count_parameters(cfg).total, layers)
        with torch.device("meta"):
            model = cls(cfg)
        model_folder.check(shapes, model.state_dict(), cfg)
        return model

    @classmethod
    def from_pretrained(
        cls, folder_or_repo: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
    ) -> "OpenMythos":
        """Load a folder of `save_pretrained` or of docs/families.md, or such a hub repository. Nothing is unpickled.

        Args:
            dtype: of the weights; None: the file's. "auto": bfloat16 where this machine computes this model's products
                faster in it, else float32. Other names are those of torch.

        Raises:
            FileNotFoundError: there is no such folder or repository, or it lacks a file.
            ValueError: the file is damaged, or its tensors are not those of the configuration; the message says which.
        """
        folder = model_folder.locate(folder_or_repo)
        model, source = cls.without_weights(folder), find_published(folder)
        state = model_folder.load(folder) if source is None else source.load()
        model.load_state_dict(state, strict=False, assign=True)  # all names are checked but a tied head's
        if model.cfg.weights == "float":
            model.tie_head()
        if dtype == "auto":
            dtype = faster_dtype(state.values(), torch.device(device))
        elif isinstance(dtype, str):
            check_choice("dtype", dtype, get_args(AutoDtype))
            dtype = getattr(torch, dtype)
        return model.to(device=device, dtype=dtype).eval()

    def _train_output(self, result: RecurrentOutput, view: View) -> TrainOutput:
        hidden, loop_hidden, head = self.decode(result.out, view), None, self.head.weight
        if result.hidden is not None:
            loop_hidden = torch.stack([*(self.decode(h, view) for h in result.hidden[:-1]), hidden])
        if autocasts(hidden):
            # The logits are made later, and perhaps outside of the caller's autocast.
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, head = hidden.to(dtype), head.to(dtype)
            loop_hidden = None if loop_hidden is None else loop_hidden.to(dtype)
        ponder = result.ponder_cost
        if ponder is not None:
            ponder = ponder.mean() if view.valid is None else ponder.sum() / view.valid.sum().clamp(min=1)
        load, n_routed = result.tokens_per_expert, None
        if load is not None:
            n_routed = load.sum() / (self.cfg.n_experts_per_tok * self.cfg.recurrent_layers)
        return TrainOutput(hidden, loop_hidden, head, result.loops, ponder, result.router_z, load, n_routed)

    def _recurrent(self) -> RecurrentBlock:
        if self.recurrent is None:
            raise ValueError("recurrent_layers=0 makes a plain transformer without loops; leave n_loops and exit out")
        return self.recurrent

    def _probe(self, h: Tensor) -> Tensor:
        """Predict from a state without the coda, (B, T, D) -> (B, T, V): this sees one token and no cache."""
        return self.head(self.norm(h))
