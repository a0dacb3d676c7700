"""Bytes that one rank sends in a training step, by kind of exchange. Rings: each of n ranks sends (n - 1) / n of it."""

from open_mythos.accounting import count_parameters
from open_mythos.costs.memory import micro_batches
from open_mythos.costs.saved_activations import Path
from open_mythos.train.config import TrainConfig


def sent_bytes(cfg: TrainConfig, path: Path, n_gpus: int, loops: float, grad_loops: float) -> dict[str, float]:
    """Per rank and step.

    Args:
        loops: of all rows of the step together; `grad_loops` of them have gradient.
    """
    counts, ranks = count_parameters(cfg.model), cfg.parallel.experts
    spread = counts.routed_experts if ranks > 1 else 0
    s, w = path.state_bytes, path.value_bytes

    def ring(values: float, n: float) -> float:
        return values * (n - 1) / n

    sent = {}
    if n_gpus > 1 and cfg.parallel.kind == "ddp":
        sent["all-reduce of gradients"] = 2 * s * ring(counts.total, n_gpus)
    elif n_gpus > 1:
        times = micro_batches(cfg, n_gpus)
        # The recurrent block too is gathered once forward and once backward, however often it loops.
        sent["all-gather of weights"] = 2 * times * s * ring(counts.total - spread, n_gpus)
        sent["reduce-scatter of gradients"] = times * s * ring(counts.total - spread, n_gpus)
    if n_gpus > ranks > 1:
        sent["all-reduce of experts' gradients"] = 2 * s * ring(spread / ranks, n_gpus / ranks)
    if ranks > 1:
        model = cfg.model
        # To the experts in the stream's dtype and back in the products', for each of a token's choices.
        both_ways = model.n_experts_per_tok * model.dim * (s + w) * model.recurrent_layers
        passes = loops + grad_loops * (2 if cfg.checkpoint_loops else 1)
        sent["all-to-all of tokens"] = ring(both_ways, ranks) * passes * cfg.data.seq_len / n_gpus
    return sent
