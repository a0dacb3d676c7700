"""Bytes of one rank at the moments of a training step that can be its highest.

The sizes of weights, gradients and moments are exact; activations are those of costs/saved_activations.py; the working
memory of operators is counted for the largest ones only. docs/results/plan.md compares the sum with measurements.

With fsdp the recurrent block, an outer layer and the embedding are whole at once, in float32, as are their gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from open_mythos.accounting import count_parameters
from open_mythos.costs import saved_activations as saved
from open_mythos.costs.depth_distribution import deepest
from open_mythos.costs.flops import hidden_matrices, matrix_sizes
from open_mythos.costs.saved_activations import SavedBytes
from open_mythos.nn.block import dense_width
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
    """Return the highest moment of a step.

    Args:
        grad_loops: loops with gradient that the rows of a micro-batch have together; None: in the deepest micro-batch
            that the run has to expect.
    """
    return max(_Step(cfg, execution, n_gpus, grad_loops).moments(), key=lambda memory: memory.total)


def rows_at_once(cfg: TrainConfig, n_gpus: int) -> int:
    """Return the rows of a micro-batch on one rank."""
    per_rank = -(-cfg.batch_size // n_gpus)
    return min(per_rank, cfg.parallel.rows or per_rank)


def micro_batches(cfg: TrainConfig, n_gpus: int) -> int:
    """Return the micro-batches of a step on one rank."""
    return -(-cfg.batch_size // (n_gpus * rows_at_once(cfg, n_gpus)))


class _Step:
    """A step on one rank: the bytes that stay through it, and those of each moment."""

    def __init__(self, cfg: TrainConfig, execution: Execution, n_gpus: int, grad_loops: int | None) -> None:
        self.cfg, self.model, self.execution = cfg, cfg.model, execution
        self.s, self.w = execution.state_bytes, execution.value_bytes
        self.counts, self.on_rank = count_parameters(cfg.model), RankParameters.of(cfg, n_gpus)
        rows, self.n_micro_batches = rows_at_once(cfg, n_gpus), micro_batches(cfg, n_gpus)
        self.tokens = cfg.data.seq_len * rows
        if grad_loops is None:
            grad_loops = deepest(cfg.loops, rows, cfg.steps * self.n_micro_batches * n_gpus)
        self.ticks = grad_loops / rows if self.model.recurrent_layers else 0
        self.readouts = max(self.ticks, 1) if cfg.losses.per_loop else 1
        # With ddp gradients are views of the buckets in which they are sent.
        self.has_buckets = cfg.parallel.kind == "ddp" and n_gpus > 1
        self.gradient_bytes = 0 if self.has_buckets else self.s
        self.gradients = {"gradients": self.gradient_bytes * self.on_rank.stored}
        self.standing = self._standing()
        self.loss, self.loss_working = self._loss()

    def _standing(self) -> dict[str, float]:
        """Return the bytes that stay through the step, gradients apart."""
        s, w, model, on_rank = self.s, self.w, self.model, self.on_rank
        one_moment = on_rank.matrices if self.cfg.optim.kind == "muon" else 0
        standing = {"parameters": s * on_rank.stored, "moments of the optimizer": s * (2 * on_rank.stored - one_moment)}
        if self.has_buckets:
            standing["buckets of gradients"] = s * on_rank.stored
        if self.cfg.parallel.kind == "fsdp":
            # Whole at once: the recurrent block, an outer layer, embedding and head.
            layer = (self.counts.prelude + self.counts.coda) / max(1, model.prelude_layers + model.coda_layers)
            standing["gathered weights"] = s * (on_rank.gathered + layer + self.counts.embedding)
        if self.execution.autocast:
            # One of each matrix for the backward pass, whatever the number of loops.
            met = matrix_sizes(model)
            once = met.outer + met.prepared + met.loop + met.head - self.counts.chosen_experts
            standing["bf16 copies of weights"] = w * once
            standing["bf16 copies of routed experts"] = w * on_rank.experts
        return standing

    def _loss(self) -> tuple[float, float]:
        """Return the bytes that the cross-entropy saves, and its working memory."""
        V, D, s, tokens = self.model.vocab_size, self.model.dim, self.s, self.readouts * self.tokens
        chunk = max(D, CHUNK_BYTES // (4 * V))
        if chunk >= tokens:
            return tokens * V * s, tokens * V * s  # log-probabilities, and logits or their gradient
        # The gradients of the head and of its input are made at once; a chunk has logits and log-probabilities.
        return tokens * self.w * D + s * V * D, 2 * s * chunk * V

    def moments(self) -> Iterator[Memory]:
        """Find the moments that can be the highest."""
        cfg, model, s, w, tokens = self.cfg, self.model, self.s, self.w, self.tokens
        loop = saved.one_loop(model, self.execution, cfg.data.seq_len, cfg.parallel.experts) * tokens
        outer = saved.outer_block(model, self.execution, cfg.data.seq_len).total * tokens
        saved_loop, saved_outer, again, again_outer = loop, outer, SavedBytes(), 0.0
        if cfg.checkpoint_loops:
            again, again_outer = loop, outer
            saved_loop = SavedBytes(saved.keys_and_values(model, self.execution), stream=s * model.dim) * tokens
            saved_outer = tokens * s * model.dim
        coda = self.readouts * (model.coda_layers * saved_outer + tokens * saved.before_head(model, self.execution))
        # The states of all loops, and what the coda makes of them.
        coda += (self.readouts - 1) * tokens * 2 * s * model.dim
        prelude = model.prelude_layers * saved_outer + tokens * (8 + saved.around_loop(model, self.execution))

        # Working memory: gradients of gate, up and their product, that product and silu again; states of the stream.
        dense, stream = 5 * w * tokens, 3 * s * model.dim * tokens
        inner = dense_width(model, recurrent=True)
        all_loops = saved_loop * self.ticks
        yield self._moment("the loss", all_loops, prelude + coda, self.loss_working)
        working = dense * dense_width(model, recurrent=False) + stream
        yield self._moment("the backward pass of the coda", all_loops, prelude + coda + again_outer, working)

        # Gradients of copies that autocast made for all loops add up in its dtype; recomputed loops share the experts'.
        each = s if cfg.checkpoint_loops else w
        arrived = self.gradient_bytes * self.counts.coda / self.on_rank.shards
        block = w * self.on_rank.experts + each * (self.on_rank.block - self.on_rank.experts)
        if self.ticks:
            name, inside = "the backward pass of the last loop", all_loops + again
            yield self._moment(name, inside, prelude, dense * inner + stream, arrived)
            # By the turn of the routed experts, the tensors that the shared ones saved are free.
            inside += SavedBytes(feed_forward=-loop.feed_forward)
            yield self._moment(f"{name}'s experts", inside, prelude, stream, arrived + block)
        if self.ticks > 1:
            inside = saved_loop * (self.ticks - 1) + again
            inside += SavedBytes(feed_forward=-loop.feed_forward, routed=-loop.routed)
            # Autograd adds the gradients of two loops into a third tensor, of the largest parameter at a time.
            added = max(w * self.on_rank.experts * 2 / 3, each * 2 * inner * model.dim)
            name = "the backward pass of the last loop but one"
            yield self._moment(name, inside, prelude, stream, arrived + 2 * block + added)
        if self.on_rank.shards > 1:
            # The gradients to reduce are copied into one buffer.
            arrived += s * (self.on_rank.block + self.on_rank.gathered)
            yield self._moment("the reduce-scatter of the recurrent block", SavedBytes(), prelude, stream, arrived)
        yield Memory("the update", self.standing | self.gradients | {"working memory": self._update_working()})

    def _moment(self, name: str, inside: SavedBytes, ends: float, working: float, new: float = 0) -> Memory:
        parts = self.standing | {
            "loops: attention": inside.attention,
            "loops: dense and shared feed-forward": inside.feed_forward,
            "loops: routed experts": inside.routed,
            "loops: states and norms": inside.stream,
            "prelude and coda": ends,
            "cross-entropy": self.loss,
            "working memory": working,
            "new gradients": new,
        }
        # A step begins by freeing the gradients; between micro-batches their sum stays.
        return Memory(name, parts | self.gradients if self.n_micro_batches > 1 else parts)

    def _update_working(self) -> float:
        """Return the optimizer's working memory. AdamW is fused and has none."""
        if self.cfg.optim.kind == "adamw":
            return 0
        s, stored = self.s, self.on_rank.matrices
        iterate = 2 if self.execution.device == "cuda" else s
        matrices = hidden_matrices(self.model)
        groups = [(n * min(shape), max(shape), min(shape)) for shape, n in matrices.items()]
        # Every momentum ahead of its step, and every update; for the largest group of one shape all of that, two
        # iterates and two squares of the shorter side.
        rows, columns, square = max(groups, key=lambda group: group[0] * group[1])
        share = stored / sum(n * shape[0] * shape[1] for shape, n in matrices.items())
        return 2 * s * stored + share * rows * (s * columns + 2 * iterate * (columns + square))
