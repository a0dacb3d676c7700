"""The training loss as named parts: what each part is, what it weighs, and their sum."""

from dataclasses import dataclass

from torch import Tensor

from open_mythos.model import TrainOutput
from open_mythos.train.config import LossConfig
from open_mythos.train.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class Share:
    """Shares of a step's batch that one call has, so that the losses of all calls add up to that of the batch."""

    labels: float = 1.0
    """Share of the batch's labelled tokens."""
    tokens: float = 1.0
    per_loop: float | None = None
    """1 / the loops that the tokens of the batch were to run; None: the call is the batch."""


def total_loss(
    out: TrainOutput, labels: Tensor, cfg: LossConfig, share: Share | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum to minimise, and its unweighted parts by name (detached scalars)."""
    share = share or Share()
    hidden = out.hidden if out.loop_hidden is None else out.loop_hidden
    if share.labels:
        ce = linear_cross_entropy(hidden, out.head, labels.expand(hidden.shape[:-1])) * share.labels
    else:
        ce = (hidden.sum() + out.head.sum()) * 0  # a mean over no label would be 0 / 0
    parts, total = {"ce": ce}, ce
    if out.ponder_cost is not None:
        parts["ponder"] = out.ponder_cost * share.tokens
    if (z := out.router_z_loss) is not None:
        is_part = share.per_loop is not None and out.n_routed is not None
        parts["router_z"] = z * (out.n_routed * share.per_loop) if is_part else z
    for name, weight in (("ponder", cfg.ponder), ("router_z", cfg.router_z)):
        if weight and name in parts:
            total = total + weight * parts[name]
    return total, {name: value.detach() for name, value in parts.items()}
