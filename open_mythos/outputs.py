"""What a call of the model returns besides logits.

Shapes: B rows, T new tokens, D width, L loops, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from open_mythos.ops.linear import linear


@dataclass
class LoopTrace:
    """One forward pass with everything the loop did. L counts executed loops; a token that exited repeats its state."""

    logits: Tensor
    """(B, T, V)"""
    hidden: Tensor
    """(L, B, T, D), the state after each loop."""
    halt_weight: Tensor
    """(L, B, T), the weight of each loop's state in the output; sums to 1 over L."""
    exit_loop: Tensor
    """(B, T) int64, the last loop each token ran, 0-based; -1 for padding."""


@dataclass
class TrainOutput:
    """What a training step needs of one forward pass. Logits are made when they are first asked for, and then kept."""

    hidden: Tensor
    """(B, T, D), what the head reads: after coda and norm, in the dtype of the head's product."""
    loop_hidden: Tensor | None
    """(L, B, T, D), what the head reads of the state after each loop; only with trace."""
    head: Tensor
    """(V, D), the head's weight in the same dtype: with `hidden`, all that a chunked cross-entropy needs."""
    loops: Tensor
    """(B, T) int64, loops each token ran."""
    ponder_cost: Tensor | None
    """Scalar, mean over tokens of loops plus remainder (Graves 2016); only with halting="act"."""
    router_z_loss: Tensor | None
    """Scalar, mean over routed tokens of logsumexp(router logits)^2 (Zoph et al. 2022); only with experts."""
    tokens_per_expert: Tensor | None
    """(recurrent_layers, n_experts), for `update_expert_bias`; only with experts."""
    n_routed: Tensor | None
    """Scalar, loops that tokens have run: what `router_z_loss` is the mean over, layers apart; only with experts."""

    @cached_property
    def logits(self) -> Tensor:
        """(B, T, V)"""
        return linear(self.hidden, self.head)

    @cached_property
    def loop_logits(self) -> Tensor | None:
        """(L, B, T, V), what coda and head read off the state after each loop; only with trace."""
        return None if self.loop_hidden is None else linear(self.loop_hidden, self.head)
