"""Bytes that one rank sends in a training step, by kind of exchange. Rings: each of n ranks sends (n - 1) / n of it."""

from open_mythos.accounting import count_parameters
from open_mythos.plan.kept import Path
from open_mythos.plan.memory import micro_batches
from open_mythos.train.config import TrainConfig


def sent_bytes(cfg: TrainConfig, path: Path, n_gpus: int, loops: float, grad_loops: float) -> dict[str, float]:
    """Per rank and step.

    Args:
        loops: of all rows of the step together; `grad_loops` of them have gradient.
    """
    counts, ranks = count_parameters(cfg.model), cfg.parallel.experts
    rest, experts = counts.total - counts.routed_experts, counts.routed_experts / ranks

    def ring(values: float, n: float) -> float:
        return values * (n - 1) / n

    # Experts that are spread over `ranks` have n_gpus / ranks copies to agree with.
    once = ring(rest, n_gpus) + ring(experts, n_gpus / ranks)
    sent = {}
    if n_gpus > 1 and cfg.parallel.kind == "ddp":
        sent["all-reduce of gradients"] = 2 * path.state_bytes * once
    elif n_gpus > 1:
        times = micro_batches(cfg, n_gpus)
        # The recurrent block too is gathered once forward and once backward, however often it loops.
        sent["all-gather of weights"] = 2 * times * path.value_bytes * once
        sent["reduce-scatter of gradients"] = times * path.state_bytes * once
    if ranks > 1:
        model = cfg.model
        # To the experts and back, for each of a token's choices.
        both_ways = 2 * model.n_experts_per_tok * model.dim * path.value_bytes * model.recurrent_layers
        passes = loops + grad_loops * (2 if cfg.checkpoint_loops else 1)
        sent["all-to-all of tokens"] = ring(both_ways, ranks) * passes * cfg.data.seq_len / n_gpus
    return sent
