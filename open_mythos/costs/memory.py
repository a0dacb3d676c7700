"""Bytes of one rank at the moments of a training step that can be its highest.

The sizes of weights, gradients and moments are exact; activations are those of costs/saved_activations.py; the working
memory of operators is counted for the largest ones only. docs/results/plan.md compares the sum with measurements.

With fsdp the recurrent block, an outer layer and the embedding are whole at once, in float32, as are their gradients.
"""

from dataclasses import dataclass

from open_mythos.accounting import Parameters, count_parameters, shared_width
from open_mythos.config import MythosConfig
from open_mythos.costs.depth_distribution import deepest
from open_mythos.costs.flops import hidden_matrices, matrix_sizes
from open_mythos.costs.saved_activations import (
    SavedBytes,
    around_loop,
    before_head,
    keys_and_values,
    one_loop,
    outer_block,
)
from open_mythos.nn.layer_costs import Execution
from open_mythos.train.config import TrainConfig
from open_mythos.train.cross_entropy import CHUNK_BYTES


@dataclass(frozen=True)
class RankParameters:
    """Parameters of one rank, by their treatment."""

    stored: float
    """Parameters that the rank stores, with the moments of the optimizer; with fsdp its share."""
    matrices: float
    """Hidden matrices among the stored ones, optimised by Muon."""
    block: float
    """The whole recurrent block, with the routed experts that this rank computes."""
    experts: float
    """Routed-expert parameters that this rank computes."""
    gathered: float
    """Parameters of the recurrent block that fsdp gathers: experts spread over ranks are not."""
    shards: int
    """Number of ranks that fsdp shards over; 1 with ddp."""

    @classmethod
    def of(cls, cfg: TrainConfig, n_gpus: int) -> "RankParameters":
        """Share a run's parameters out over `n_gpus` ranks."""
        counts, ranks = count_parameters(cfg.model), cfg.parallel.experts
        shards = n_gpus if cfg.parallel.kind == "fsdp" else 1
        matrices = sum(n * rows * columns for (rows, columns), n in hidden_matrices(cfg.model).items())
        spread = counts.routed_experts if ranks > 1 else 0
        core, experts = counts.core + counts.loop + counts.other_loops, counts.routed_experts / ranks
        return cls(
            # Each group of ranks that spreads the experts has them whole.
            stored=(counts.total - spread) / shards + spread / ranks,
            matrices=(matrices - spread) / shards + spread / ranks,
            block=core + experts,
            experts=experts,
            gathered=core + counts.routed_experts - spread,
            shards=shards,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the highest moment of a step."""

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def peak(cfg: TrainConfig, execution: Execution, n_gpus: int = 1, grad_loops: int | None = None) -> Memory:
    """Return the highest of the moments that can be a step's highest.

    Args:
        grad_loops: loops with gradient that the rows of a micro-batch have together; None: in the deepest micro-batch
            that the run has to expect.
    """
    return max(_moments(cfg, execution, n_gpus, grad_loops), key=lambda memory: memory.total)


def rows_at_once(cfg: TrainConfig, n_gpus: int) -> int:
    """Return the rows of a micro-batch on one rank."""
    per_rank = -(-cfg.batch_size // n_gpus)
    return min(per_rank, cfg.parallel.rows or per_rank)


def micro_batches(cfg: TrainConfig, n_gpus: int) -> int:
    """Return the micro-batches of a step on one rank."""
    return -(-cfg.batch_size // (n_gpus * rows_at_once(cfg, n_gpus)))


def _moments(cfg: TrainConfig, execution: Execution, n_gpus: int, grad_loops: int | None) -> list[Memory]:
    model, T, s = cfg.model, cfg.data.seq_len, execution.state_bytes
    rows, counts, on_rank = rows_at_once(cfg, n_gpus), count_parameters(cfg.model), RankParameters.of(cfg, n_gpus)
    tokens = T * rows
    if grad_loops is None:
        draws = cfg.steps * micro_batches(cfg, n_gpus) * n_gpus
        grad_loops = deepest(cfg.loops, rows, draws)
    ticks = grad_loops / rows if model.recurrent_layers else 0
    readouts = max(ticks, 1) if cfg.losses.per_loop else 1
    standing = _standing(cfg, execution, counts, on_rank, n_gpus)
    # With ddp gradients are views of the buckets in which they are sent.
    own = 0 if _has_buckets(cfg, n_gpus) else s
    gradients = {"gradients": own * on_rank.stored}

    loop, outer = (
        one_loop(model, execution, T, cfg.parallel.experts) * tokens,
        outer_block(model, execution, T) * tokens,
    )
    saved_loop, saved_outer, again, again_outer = loop, outer.total, SavedBytes(), 0.0
    if cfg.checkpoint_loops:
        again, again_outer = loop, outer.total
        saved_loop = SavedBytes(keys_and_values(model, execution), stream=s * model.dim) * tokens
        saved_outer = tokens * s * model.dim
    coda = readouts * (model.coda_layers * saved_outer + tokens * before_head(model, execution).total)
    coda += (readouts - 1) * tokens * 2 * s * model.dim  # the states of all loops, and what the coda makes of them
    prelude = model.prelude_layers * saved_outer + tokens * (8 + around_loop(model, execution).total)
    loss, loss_working = _loss(model, execution, readouts * tokens)

    def moment(name: str, loops: float, again: SavedBytes, ends: float, working: float, new: float = 0) -> Memory:
        inside = saved_loop * loops + again
        parts = standing | {
            "loops: attention": inside.attention,
            "loops: dense and shared feed-forward": inside.feed_forward,
            "loops: routed experts": inside.routed,
            "loops: states and norms": inside.stream,
            "prelude and coda": ends,
            "cross-entropy": loss,
            "working memory": working,
            "new gradients": new,
        }
        # A step begins by setting gradients free; between micro-batches their sum stays.
        return Memory(name, parts | gradients if micro_batches(cfg, n_gpus) > 1 else parts)

    # Gradients of gate, up and their product; that product and silu again.
    dense = 5 * execution.value_bytes * tokens
    stream = 3 * s * model.dim * tokens
    found = [
        moment("the loss", ticks, SavedBytes(), prelude + coda, loss_working),
        moment(
            "the backward pass of the coda",
            ticks,
            SavedBytes(),
            prelude + coda + again_outer,
            dense * (model.dim * 4 // 3) + stream,
        ),
    ]
    # Gradients of copies that autocast made for all loops add up in its dtype; recomputed loops share the experts'.
    w = execution.value_bytes
    each = s if cfg.checkpoint_loops else w
    arrived, block = own * counts.coda / on_rank.shards, w * on_rank.experts + each * (on_rank.block - on_rank.experts)
    # Autograd adds the gradients of two loops into a third tensor, of the largest parameter at a time.
    inner = shared_width(model) if model.n_experts else model.expert_dim
    added = max(w * on_rank.experts * 2 / 3, each * 2 * inner * model.dim)
    if ticks:
        name = "the backward pass of the last loop"
        found.append(moment(name, ticks, again, prelude, dense * inner + stream, arrived))
        # By the turn of the routed experts, the tensors that the shared ones saved are free.
        again += SavedBytes(feed_forward=-loop.feed_forward)
        found.append(moment(f"{name}'s experts", ticks, again, prelude, stream, arrived + block))
    if ticks > 1:
        again += SavedBytes(routed=-loop.routed)
        name = "the backward pass of the last loop but one"
        found.append(moment(name, ticks - 1, again, prelude, stream, arrived + 2 * block + added))
    if on_rank.shards > 1:
        # The gradients to reduce are copied into one buffer.
        name = "the reduce-scatter of the recurrent block"
        found.append(moment(name, 0, SavedBytes(), prelude, stream, arrived + s * (on_rank.block + on_rank.gathered)))
    update = {"working memory": _update_working(cfg, execution, on_rank)}
    return [*found, Memory("the update", standing | gradients | update)]


def _has_buckets(cfg: TrainConfig, n_gpus: int) -> bool:
    return cfg.parallel.kind == "ddp" and n_gpus > 1


def _standing(
    cfg: TrainConfig, execution: Execution, counts: Parameters, on_rank: RankParameters, n_gpus: int
) -> dict[str, float]:
    """Return the bytes that stay through the step, gradients apart."""
    s, w, model = execution.state_bytes, execution.value_bytes, cfg.model
    one_moment = on_rank.matrices if cfg.optim.kind == "muon" else 0
    standing = {"parameters": s * on_rank.stored, "moments of the optimizer": s * (2 * on_rank.stored - one_moment)}
    if _has_buckets(cfg, n_gpus):
        standing["buckets of gradients"] = s * on_rank.stored
    if cfg.parallel.kind == "fsdp":
        # Whole at once: the recurrent block, an outer layer, embedding and head.
        layer = (counts.prelude + counts.coda) / max(1, model.prelude_layers + model.coda_layers)
        standing["gathered weights"] = s * (on_rank.gathered + layer + counts.embedding)
    if execution.autocast:
        # One of each matrix for the backward pass, whatever the number of loops.
        met = matrix_sizes(model)
        chosen = model.recurrent_layers * model.n_experts_per_tok * 3 * model.dim * model.expert_dim
        once = met.outer + met.prepared + met.loop + met.head - (chosen if model.n_experts else 0)
        standing["bf16 copies of weights"] = w * once
        standing["bf16 copies of routed experts"] = w * on_rank.experts
    return standing


def _loss(cfg: MythosConfig, execution: Execution, tokens: float) -> tuple[float, float]:
    """Return the bytes that the cross-entropy saves, and its working memory."""
    V, D, s = cfg.vocab_size, cfg.dim, execution.state_bytes
    chunk = max(D, CHUNK_BYTES // (4 * V))
    if chunk >= tokens:
        return tokens * V * s, tokens * V * s  # log-probabilities, and logits or their gradient
    # The gradients of the head and of its input are made at once; a chunk has logits and log-probabilities.
    return tokens * execution.value_bytes * D + s * V * D, 2 * s * chunk * V


def _update_working(cfg: TrainConfig, execution: Execution, on_rank: RankParameters) -> float:
    """Return the optimizer's working memory. AdamW is fused and has none."""
    if cfg.optim.kind == "adamw":
        return 0
    s = execution.state_bytes
    iterate = 2 if execution.device == "cuda" else s
    matrices = hidden_matrices(cfg.model)
    groups = [(n * min(shape), max(shape), min(shape)) for shape, n in matrices.items()]
    # Every momentum ahead of its step, and every update; of the largest group of one shape all of that, two iterates
    # and two squares of the shorter side.
    rows, columns, square = max(groups, key=lambda group: group[0] * group[1])
    share = on_rank.matrices / sum(n * shape[0] * shape[1] for shape, n in matrices.items())
    return 2 * s * on_rank.matrices + share * rows * (s * columns + 2 * iterate * (columns + square))
