"""FLOPs of a training step, counted as they are executed.

A weight costs two FLOPs per token forward and four backward. Rows that wait for deeper ones cost nothing, loops outside
the window of back-propagation run forward only, and what is recomputed runs forward twice. Elementwise work is not
counted.

Shapes: B rows, T tokens, K and W key and value width of a head, H heads.
"""

from collections import Counter
from dataclasses import dataclass

from open_mythos.config import MythosConfig
from open_mythos.costs.saved_activations import Path
from open_mythos.ops.causal_attention import BLOCK
from open_mythos.train.config import TrainConfig
from open_mythos.train.muon import ITERATIONS


@dataclass(frozen=True)
class Weights:
    """Values of the matrices that one token meets: those of chosen experts only, no norms and no embedding."""

    outer: int
    """Prelude and coda."""
    coda: int
    """Of these, the coda's."""
    prepared: int
    """Once per call, on the prelude's output: the injection's part that no loop changes."""
    loop: int
    head: int


def weights_met(cfg: MythosConfig) -> Weights:
    D = cfg.dim
    plain = attention_weights(cfg) + 3 * D * (D * 4 // 3)
    ffn = 3 * D * cfg.expert_dim
    if cfg.n_experts:
        ffn = D * cfg.n_experts + cfg.n_experts_per_tok * (1 + cfg.n_shared_experts) * 3 * D * cfg.expert_dim
    loop = prepared = 0
    if cfg.recurrent_layers:
        prepared = D * D if cfg.injection in ("diagonal", "concat") else 0
        loop = cfg.recurrent_layers * (attention_weights(cfg) + ffn) + 2 * D * cfg.lora_rank
        loop += D * D if cfg.injection == "concat" else 0
        loop += D if cfg.halting == "act" else 0
    outer = (cfg.prelude_layers + cfg.coda_layers) * plain
    return Weights(outer, cfg.coda_layers * plain, prepared, loop, cfg.vocab_size * D)


def attention_weights(cfg: MythosConfig) -> int:
    D, H = cfg.dim, cfg.n_heads
    if cfg.attn_type == "gqa":
        return 2 * D * D + 2 * D * cfg.n_kv_heads * cfg.head_dim
    ranks = cfg.q_lora_rank + cfg.kv_lora_rank + cfg.qk_rope_head_dim
    key, value = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.v_head_dim
    return D * ranks + H * (cfg.q_lora_rank * key + cfg.kv_lora_rank * (cfg.qk_nope_head_dim + value) + value * D)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step over all ranks, by what they are for."""

    once: float
    """Prelude, coda and what the loop prepares, with their attention."""
    loop: float
    head: float
    recomputed: float
    """Forward a second time, for `checkpoint_loops`."""
    optimizer: float
    """Muon's iterations, once."""

    @property
    def total(self) -> float:
        return self.model + self.recomputed + self.optimizer

    @property
    def model(self) -> float:
        """Forward and backward, nothing twice."""
        return self.once + self.loop + self.head


def step_flops(cfg: TrainConfig, path: Path, loops: float, grad_loops: float) -> StepFlops:
    """What one step costs whose rows run `loops` loops in all, `grad_loops` of them with gradient."""
    model, T = cfg.model, cfg.data.seq_len
    met, rows = weights_met(model), cfg.batch_size
    attention = _Attention(model, path, T)
    layers = model.prelude_layers + model.coda_layers
    # With a loss after every loop, coda and head read them all.
    readouts = loops / rows if cfg.losses.per_loop else 1
    coda_again = (readouts - 1) * (3 * 2 * met.coda + model.coda_layers * attention.both)
    once = 3 * 2 * (met.outer + met.prepared) + layers * attention.both + coda_again
    per_loop = 2 * met.loop + model.recurrent_layers * attention.forward
    idle = 2 * met.loop + model.recurrent_layers * attention.without_grad
    per_grad_loop = 3 * 2 * met.loop + model.recurrent_layers * attention.both
    recomputed = 0.0
    if cfg.checkpoint_loops:
        recomputed = T * (grad_loops * per_loop + rows * (2 * met.outer + layers * attention.forward))
    return StepFlops(
        once=T * rows * once,
        loop=T * (grad_loops * per_grad_loop + (loops - grad_loops) * idle),
        head=T * rows * readouts * 3 * 2 * met.head,
        recomputed=recomputed,
        optimizer=_newton_schulz(model) if cfg.optim.kind == "muon" else 0,
    )


class _Attention:
    """Products of queries, keys and values of one layer, per token."""

    def __init__(self, cfg: MythosConfig, path: Path, T: int) -> None:
        K = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim if cfg.attn_type == "mla" else cfg.head_dim
        W = cfg.v_head_dim if cfg.attn_type == "mla" else K
        padded = max(K, W)  # torch's kernels take values as wide as keys
        blocks = path.attends_in_blocks(T)
        keys, width = (_keys_in_blocks(T), W) if blocks else (path.keys_of_kernel(T), padded)
        each = 2 * cfg.n_heads * keys
        self.forward = each * (K + width)
        """q k^T and p v."""
        # Without gradient torch's kernel runs, whatever runs with it.
        self.without_grad = 2 * cfg.n_heads * path.keys_of_kernel(T) * (K + padded)
        self.both = self.forward + each * (3 * K + 2 * width)
        """Backward the scores are made again; then the gradients of p, v, q and k."""


def _keys_in_blocks(T: int) -> float:
    """Keys that a query is multiplied with, on average, where whole blocks above the diagonal are left out."""
    ends = [min(start + BLOCK, T) for start in range(0, T, BLOCK)]
    return sum((end - start) * end for start, end in zip(range(0, T, BLOCK), ends, strict=True)) / T


def _newton_schulz(cfg: MythosConfig) -> int:
    """Three products an iteration for each matrix: two of (r, c) with (r, r), r the shorter side, and one of (r, r)."""
    total = 0
    for shape, n in hidden_matrices(cfg).items():
        r, c = sorted(shape)
        total += n * ITERATIONS * (4 * r * r * c + 2 * r**3)
    return total


def hidden_matrices(cfg: MythosConfig) -> Counter[tuple[int, int]]:
    """(rows, columns) -> how many, as Muon takes them. Maps of one input that are one parameter are told apart."""
    D = cfg.dim
    if cfg.attn_type == "gqa":
        kv = cfg.n_kv_heads * cfg.head_dim
        attention = [(D, D), (D, D), (kv, D), (kv, D)]
    else:
        key, value = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.v_head_dim
        attention = [(rank, D) for rank in (cfg.q_lora_rank, cfg.kv_lora_rank, cfg.qk_rope_head_dim)]
        attention += [
            (cfg.n_heads * key, cfg.q_lora_rank),
            (cfg.n_heads * (cfg.qk_nope_head_dim + value), cfg.kv_lora_rank),
            (D, cfg.n_heads * value),
        ]

    def swiglu(hidden: int) -> list[tuple[int, int]]:
        return [(hidden, D), (hidden, D), (D, hidden)] if hidden else []

    outer, inner = Counter(attention + swiglu(D * 4 // 3)), Counter(attention)
    if cfg.n_experts:
        inner.update(swiglu(cfg.n_shared_experts * cfg.n_experts_per_tok * cfg.expert_dim))
        # Gate and up of an expert are one matrix.
        inner[2 * cfg.expert_dim, D] += cfg.n_experts
        inner[D, cfg.expert_dim] += cfg.n_experts
    else:
        inner.update(swiglu(cfg.expert_dim))
    counts: Counter[tuple[int, int]] = Counter()
    for layers, shapes in ((cfg.prelude_layers + cfg.coda_layers, outer), (cfg.recurrent_layers, inner)):
        for shape, n in shapes.items():
            counts[shape] += layers * n
    return +counts
