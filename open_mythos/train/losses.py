"""The training loss as named parts: what each part is, what it weighs, and their sum."""

from dataclasses import dataclass

from torch import Tensor

from open_mythos.checks import check_number
from open_mythos.outputs import TrainOutput
from open_mythos.train.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class LossConfig:
    """Where the cross-entropy is taken, and weights of the auxiliary losses; 0 leaves a part out."""

    per_loop: bool = False
    """Cross-entropy after every loop, averaged, not only after the last (deep supervision).

    Needs loops.per="batch" and halting="none"."""
    ponder: float = 0.0
    """Weight of the ponder cost (loops used plus remainder, mean over tokens); needs halting="act"."""
    router_z: float = 0.0
    """Weight of the router z-loss, the mean of logsumexp(router logits)^2 over what is routed; needs experts. Where
    tokens exit early the sum is divided by the loops they were to run."""

    def __post_init__(self) -> None:
        check_number("losses.ponder", self.ponder, 0)
        check_number("losses.router_z", self.router_z, 0)


@dataclass(frozen=True)
class Share:
    """What the rows of one call are of a step's batch, so that the losses of all calls add up to that of the batch."""

    labels: float = 1.0
    """Of the labelled tokens."""
    tokens: float = 1.0
    per_loop: float | None = None
    """1 / the loops that the tokens of the batch were to run; None: the call is the batch."""


def total_loss(
    out: TrainOutput, labels: Tensor, cfg: LossConfig, share: Share | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum to minimise, and its unweighted parts by name (detached scalars)."""
    share = share or Share()
    hidden = out.hidden if out.loop_hidden is None else out.loop_hidden
    if share.labels:
        ce = linear_cross_entropy(hidden, out.head, labels.expand(hidden.shape[:-1])) * share.labels
    else:
        ce = (hidden.sum() + out.head.sum()) * 0  # a mean over no label would be 0 / 0
    parts, total = {"ce": ce}, ce
    for name, weight, value in (
        ("ponder", cfg.ponder, out.ponder_cost),
        ("router_z", cfg.router_z, out.router_z_loss),
    ):
        if value is None:
            continue
        if name == "ponder":
            value = value * share.tokens
        elif share.per_loop is not None and out.n_routed is not None:
            value = value * (out.n_routed * share.per_loop)
        parts[name] = value
        if weight:
            total = total + weight * value
    return total, {name: value.detach() for name, value in parts.items()}
