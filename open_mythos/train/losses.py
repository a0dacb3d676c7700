"""The training loss as named parts: what each part is, what it weighs, and their sum."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.checks import check_number
from open_mythos.model import TrainOutput
from open_mythos.train.data import IGNORE


@dataclass(frozen=True)
class LossConfig:
    """Where the cross-entropy is taken, and weights of the auxiliary losses; 0 leaves a part out."""

    per_loop: bool = False
    """Cross-entropy after every loop, averaged, not only after the last (deep supervision).

    Needs loops.per="batch" and halting="none"."""
    ponder: float = 0.0
    """Weight of the ponder cost (loops used plus remainder, mean over tokens); needs halting="act"."""
    router_z: float = 0.0
    """Weight of the router z-loss, the mean of logsumexp(router logits)^2; needs experts."""

    def __post_init__(self) -> None:
        check_number("losses.ponder", self.ponder, 0)
        check_number("losses.router_z", self.router_z, 0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats over the positions that have a label.

    Args:
        logits: (..., V); computed in at least float32.
        labels: (...) int64, IGNORE where there is no loss.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE)


def total_loss(out: TrainOutput, labels: Tensor, cfg: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum to minimise, and its unweighted parts by name (detached scalars)."""
    logits = out.logits if out.loop_logits is None else out.loop_logits
    parts = {"ce": cross_entropy(logits, labels.expand(logits.shape[:-1]))}
    total = parts["ce"]
    for name, weight, value in (
        ("ponder", cfg.ponder, out.ponder_cost),
        ("router_z", cfg.router_z, out.router_z_loss),
    ):
        if value is None:
            continue
        parts[name] = value
        if weight:
            total = total + weight * value
    return total, {name: value.detach() for name, value in parts.items()}
