"""FLOPs of a training step, counted as they are executed.

A weight costs two FLOPs per token forward and four backward. Rows that wait for deeper ones cost nothing, loops outside
the window of back-propagation run forward only, and recomputed ones run forward twice. Elementwise work is not counted.

`torch.utils.flop_counter` would have to run each of these passes; benchmarks/plan.py compares the formulas with it.

Shapes: B rows, T tokens, K and W key and value width of a head, H heads.
"""

from collections import Counter
from dataclasses import dataclass

from open_mythos.config import MythosConfig
from open_mythos.nn.block import attention_costs, feed_forward_costs
from open_mythos.nn.injection import injection_costs
from open_mythos.nn.layer_costs import Execution
from open_mythos.ops.causal_attention import BLOCK
from open_mythos.train.config import TrainConfig
from open_mythos.train.muon import ITERATIONS


@dataclass(frozen=True)
class MatrixSizes:
    """Values of the matrices that one token meets: of the experts the chosen ones, no norms and no embedding."""

    outer: int
    """Prelude and coda."""
    coda: int
    prepared: int
    """The injection's matrices that meet a token once per call."""
    loop: int
    head: int


def matrix_sizes(cfg: MythosConfig) -> MatrixSizes:
    """Add up the matrices of all layers that one token meets."""
    D, attention = cfg.dim, attention_costs(cfg).weights
    plain = attention + feed_forward_costs(cfg, recurrent=False).weights
    loop = prepared = 0
    if cfg.recurrent_layers:
        injection = injection_costs(cfg)
        prepared, loop = injection.prepared, injection.per_loop
        ffn = feed_forward_costs(cfg, recurrent=True).weights
        if cfg.n_experts:
            ffn += D * cfg.n_experts + cfg.n_experts_per_tok * 3 * D * cfg.expert_dim
        loop += cfg.recurrent_layers * (attention + ffn) + 2 * D * cfg.lora_rank
        loop += D if cfg.halting != "none" else 0
    outer = (cfg.prelude_layers + cfg.coda_layers) * plain
    return MatrixSizes(outer, cfg.coda_layers * plain, prepared, loop, cfg.vocab_size * D)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step over all ranks, by what they are for."""

    once: float
    """Prelude, coda and the injection's `prepare`, with their attention."""
    loop: float
    head: float
    recomputed: float
    """Second forward passes, for `checkpoint_loops`."""
    optimizer: float
    """Muon's iterations, counted once."""

    @property
    def total(self) -> float:
        return self.model + self.recomputed + self.optimizer

    @property
    def model(self) -> float:
        """Forward and backward passes, without recomputation and optimizer."""
        return self.once + self.loop + self.head


def step_flops(cfg: TrainConfig, execution: Execution, loops: float, grad_loops: float) -> StepFlops:
    """Return the FLOPs of a step whose rows run `loops` loops in all, `grad_loops` of them with gradient."""
    model, T = cfg.model, cfg.data.seq_len
    met, rows = matrix_sizes(model), cfg.batch_size
    attend, attend_idle, attend_both = _attention_flops(model, execution, T)
    layers = model.prelude_layers + model.coda_layers
    # With a loss after every loop, coda and head run for each of them.
    readouts = loops / rows if cfg.losses.per_loop else 1
    coda_again = (readouts - 1) * (3 * 2 * met.coda + model.coda_layers * attend_both)
    once = 3 * 2 * (met.outer + met.prepared) + layers * attend_both + coda_again
    per_loop = 2 * met.loop + model.recurrent_layers * attend
    idle = 2 * met.loop + model.recurrent_layers * attend_idle
    per_grad_loop = 3 * 2 * met.loop + model.recurrent_layers * attend_both
    recomputed = 0.0
    if cfg.checkpoint_loops:
        recomputed = T * (grad_loops * per_loop + rows * (2 * met.outer + layers * attend))
    return StepFlops(
        once=T * rows * once,
        loop=T * (grad_loops * per_grad_loop + (loops - grad_loops) * idle),
        head=T * rows * readouts * 3 * 2 * met.head,
        recomputed=recomputed,
        optimizer=_newton_schulz(model) if cfg.optim.kind == "muon" else 0,
    )


def _attention_flops(cfg: MythosConfig, execution: Execution, T: int) -> tuple[float, float, float]:
    """Count the products of one layer's queries, keys and values, per token: forward, without gradient, and both ways.

    Backward the scores are made again; then the gradients of p, v, q and k.
    """
    H, K, W = attention_costs(cfg).heads
    padded, keys = max(K, W), execution.keys_of_kernel(T)  # torch's kernels take values as wide as keys
    # Without gradient torch's kernel runs, whatever runs with it.
    without_grad, width = 2 * H * keys * (K + padded), padded
    if execution.attends_in_blocks(T):
        # Whole blocks above the diagonal are left out.
        keys, width = sum(min(BLOCK, T - start) * min(start + BLOCK, T) for start in range(0, T, BLOCK)) / T, W
    forward = 2 * H * keys * (K + width)
    return forward, without_grad, forward + 2 * H * keys * (3 * K + 2 * width)


def _newton_schulz(cfg: MythosConfig) -> int:
    """Return the FLOPs of Muon's iterations.

    Each makes three products for a matrix: two of (r, c) with (r, r), r the shorter side, and one of (r, r).
    """
    sides = ((n, *sorted(shape)) for shape, n in hidden_matrices(cfg).items())
    return sum(n * ITERATIONS * (4 * r * r * c + 2 * r**3) for n, r, c in sides)


def hidden_matrices(cfg: MythosConfig) -> Counter[tuple[int, int]]:
    """Count the matrices by (rows, columns) as Muon takes them: maps of one input count apart."""
    attention, counts = attention_costs(cfg).matrices, Counter[tuple[int, int]]()
    for recurrent, n_layers in ((False, cfg.prelude_layers + cfg.coda_layers), (True, cfg.recurrent_layers)):
        shapes = attention + feed_forward_costs(cfg, recurrent).matrices
        if recurrent and cfg.n_experts:
            # Gate and up of a routed expert are one matrix.
            shapes += Counter(dict.fromkeys([(2 * cfg.expert_dim, cfg.dim), (cfg.dim, cfg.expert_dim)], cfg.n_experts))
        counts.update({shape: n_layers * n for shape, n in shapes.items()})
    return +counts
