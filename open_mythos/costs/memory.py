"""Bytes that one rank holds at the moments of a training step that can be its highest.

The sizes of weights, gradients and moments are exact; activations are those of costs/saved_activations.py; what an
operator needs for itself while it runs is counted for the largest operators only. docs/results/plan.md compares it
with measurement.

With fsdp the recurrent block, an outer layer and the embedding are whole at once, in float32, as are their gradients.
"""

from dataclasses import dataclass

from open_mythos.accounting import Parameters, count_parameters
from open_mythos.config import MythosConfig
from open_mythos.costs.depth_distribution import deepest
from open_mythos.costs.flops import hidden_matrices, weights_met
from open_mythos.costs.saved_activations import (
    Kept,
    Path,
    around_loop,
    before_head,
    keys_and_values,
    one_loop,
    outer_block,
)
from open_mythos.train.config import TrainConfig
from open_mythos.train.cross_entropy import CHUNK_BYTES


@dataclass(frozen=True)
class Held:
    """Parameters on one rank, by how they are treated."""

    all: float
    """What it keeps, with the moments of the optimizer; with fsdp its share."""
    matrices: float
    """Of these, hidden matrices, which Muon takes."""
    block: float
    """The recurrent block with the routed experts that this rank computes."""
    experts: float
    """These."""
    unit: float
    """What fsdp gathers of the recurrent block: experts that are spread over ranks are not gathered."""
    shards: int
    """Ranks that share what fsdp divides; 1 with ddp."""

    @classmethod
    def of(cls, cfg: TrainConfig, n_gpus: int) -> "Held":
        counts, ranks = count_parameters(cfg.model), cfg.parallel.experts
        shards = n_gpus if cfg.parallel.kind == "fsdp" else 1
        matrices = sum(n * rows * columns for (rows, columns), n in hidden_matrices(cfg.model).items())
        spread = counts.routed_experts if ranks > 1 else 0
        core, experts = counts.core + counts.loop + counts.other_loops, counts.routed_experts / ranks
        return cls(
            # Ranks that hold the same spread experts all hold them whole.
            all=(counts.total - spread) / shards + spread / ranks,
            matrices=(matrices - spread) / shards + spread / ranks,
            block=core + experts,
            experts=experts,
            unit=core + counts.routed_experts - spread,
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


def peak(cfg: TrainConfig, path: Path, n_gpus: int = 1, grad_loops: int | None = None) -> Memory:
    """The highest moment of those that can be.

    Args:
        grad_loops: loops with gradient that the rows of a micro-batch have together; None: in the deepest micro-batch
            that the run has to expect.
    """
    return max(_moments(cfg, path, n_gpus, grad_loops), key=lambda memory: memory.total)


def rows_at_once(cfg: TrainConfig, n_gpus: int) -> int:
    """Rows of a micro-batch on one rank."""
    per_rank = -(-cfg.batch_size // n_gpus)
    return min(per_rank, cfg.parallel.rows or per_rank)


def micro_batches(cfg: TrainConfig, n_gpus: int) -> int:
    """Of a step, on one rank."""
    return -(-cfg.batch_size // (n_gpus * rows_at_once(cfg, n_gpus)))


def _moments(cfg: TrainConfig, path: Path, n_gpus: int, grad_loops: int | None) -> list[Memory]:
    model, T, s = cfg.model, cfg.data.seq_len, path.state_bytes
    rows, counts, held = rows_at_once(cfg, n_gpus), count_parameters(cfg.model), Held.of(cfg, n_gpus)
    tokens = T * rows
    if grad_loops is None:
        draws = cfg.steps * micro_batches(cfg, n_gpus) * n_gpus
        grad_loops = deepest(cfg.loops, rows, draws)
    ticks = grad_loops / rows if model.recurrent_layers else 0
    readouts = max(ticks, 1) if cfg.losses.per_loop else 1
    standing = _standing(cfg, path, counts, held, n_gpus)
    # With ddp gradients are views of the buckets in which they are sent.
    own = 0 if _has_buckets(cfg, n_gpus) else s
    gradients = {"gradients": own * held.all}

    loop, outer = one_loop(model, path, T, cfg.parallel.experts) * tokens, outer_block(model, path, T) * tokens
    kept_loop, kept_outer, again, again_outer = loop, outer.total, Kept(), 0.0
    if cfg.checkpoint_loops:
        again, again_outer = loop, outer.total
        kept_loop = Kept(keys_and_values(model, path), stream=s * model.dim) * tokens
        kept_outer = tokens * s * model.dim
    coda = readouts * (model.coda_layers * kept_outer + tokens * before_head(model, path).total)
    coda += (readouts - 1) * tokens * 2 * s * model.dim  # each loop's state, and what is read off it, side by side
    prelude = model.prelude_layers * kept_outer + tokens * (8 + around_loop(model, path).total)
    loss, loss_working = _loss(model, path, readouts * tokens)

    def moment(name: str, loops: float, again: Kept, ends: float, working: float, new: float = 0) -> Memory:
        inside = kept_loop * loops + again
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
    dense = 5 * path.value_bytes * tokens
    stream = 3 * s * model.dim * tokens
    found = [
        moment("the loss", ticks, Kept(), prelude + coda, loss_working),
        moment(
            "the backward pass of the coda",
            ticks,
            Kept(),
            prelude + coda + again_outer,
            dense * (model.dim * 4 // 3) + stream,
        ),
    ]
    # Gradients of copies that autocast made for all loops add up in its dtype; recomputed loops share the experts'.
    w = path.value_bytes
    each = s if cfg.checkpoint_loops else w
    arrived, block = own * counts.coda / held.shards, w * held.experts + each * (held.block - held.experts)
    # Autograd adds the gradients of two loops into a third tensor, of the largest parameter at a time.
    inner = shared_width(model) if model.n_experts else model.expert_dim
    added = max(w * held.experts * 2 / 3, each * 2 * inner * model.dim)
    if ticks:
        name = "the backward pass of the last loop"
        found.append(moment(name, ticks, again, prelude, dense * inner + stream, arrived))
        # By the turn of the routed experts, what the shared one kept is free.
        again += Kept(feed_forward=-loop.feed_forward)
        found.append(moment(f"{name}'s experts", ticks, again, prelude, stream, arrived + block))
    if ticks > 1:
        again += Kept(routed=-loop.routed)
        name = "the backward pass of the last loop but one"
        found.append(moment(name, ticks - 1, again, prelude, stream, arrived + 2 * block + added))
    if held.shards > 1:
        # What is reduced is laid out anew.
        name = "the reduce-scatter of the recurrent block"
        found.append(moment(name, 0, Kept(), prelude, stream, arrived + s * (held.block + held.unit)))
    update = {"working memory": _update_working(cfg, path, held)}
    return [*found, Memory("the update", standing | gradients | update)]


def _has_buckets(cfg: TrainConfig, n_gpus: int) -> bool:
    return cfg.parallel.kind == "ddp" and n_gpus > 1


def _standing(cfg: TrainConfig, path: Path, counts: Parameters, held: Held, n_gpus: int) -> dict[str, float]:
    """What is there all the time, but for gradients."""
    s, w, model = path.state_bytes, path.value_bytes, cfg.model
    one_moment = held.matrices if cfg.optim.kind == "muon" else 0
    standing = {"parameters": s * held.all, "moments of the optimizer": s * (2 * held.all - one_moment)}
    if _has_buckets(cfg, n_gpus):
        standing["buckets of gradients"] = s * held.all
    if cfg.parallel.kind == "fsdp":
        # Whole at once: the recurrent block, an outer layer, embedding and head.
        layer = (counts.prelude + counts.coda) / max(1, model.prelude_layers + model.coda_layers)
        standing["gathered weights"] = s * (held.unit + layer + counts.embedding)
    if path.autocast:
        # One of each matrix for the backward pass, whatever the number of loops.
        met = weights_met(model)
        chosen = model.recurrent_layers * model.n_experts_per_tok * 3 * model.dim * model.expert_dim
        once = met.outer + met.prepared + met.loop + met.head - (chosen if model.n_experts else 0)
        standing["bf16 copies of weights"] = w * once
        standing["bf16 copies of routed experts"] = w * held.experts
    return standing


def shared_width(cfg: MythosConfig) -> int:
    """Hidden width of the shared experts together."""
    return cfg.n_shared_experts * cfg.n_experts_per_tok * cfg.expert_dim


def _loss(cfg: MythosConfig, path: Path, tokens: float) -> tuple[float, float]:
    """What the cross-entropy keeps, and what it needs besides while it runs."""
    V, D, s = cfg.vocab_size, cfg.dim, path.state_bytes
    chunk = max(D, CHUNK_BYTES // (4 * V))
    if chunk >= tokens:
        return tokens * V * s, tokens * V * s  # log-probabilities, and logits or their gradient
    # The gradients by what the head reads and by the head are made at once; a chunk has logits and log-probabilities.
    return tokens * path.value_bytes * D + s * V * D, 2 * s * chunk * V


def _update_working(cfg: TrainConfig, path: Path, held: Held) -> float:
    """What the optimizer makes for itself. AdamW's is fused and makes nothing."""
    if cfg.optim.kind == "adamw":
        return 0
    s = path.state_bytes
    iterate = 2 if path.device == "cuda" else s
    matrices = hidden_matrices(cfg.model)
    groups = [(n * min(shape), max(shape), min(shape)) for shape, n in matrices.items()]
    # Every momentum ahead of its step, and every update; of the largest group of one shape all of that, two iterates
    # and two squares of the shorter side.
    rows, columns, square = max(groups, key=lambda group: group[0] * group[1])
    share = held.matrices / sum(n * shape[0] * shape[1] for shape, n in matrices.items())
    return 2 * s * held.matrices + share * rows * (s * columns + 2 * iterate * (columns + square))
