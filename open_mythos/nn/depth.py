"""What tells one loop from another: how many each row runs (`LoopPlan`), and the parts that see the loop's index.

Shapes: B rows, T tokens, D width, R rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.checks import check_int
from open_mythos.config import MAX_LOOPS
from open_mythos.ops.experts import ExpertWeights
from open_mythos.ops.linear import Linear, linear


@dataclass(frozen=True)
class LoopPlan:
    """How deep each row of a training batch goes. The trainer draws it; the model only follows.

    Rows are right-aligned: with T = max(depths), a row of depth d joins at tick T - d. So every row is inside the
    window of the last `n_grad` ticks, and a row that has not joined costs nothing.

    Raises:
        TypeError, ValueError: a depth or `n_grad` is not an int in [1, 4096], or there is no row.
    """

    depths: tuple[int, ...]
    n_grad: int | None = None
    """Back-propagate through the last `n_grad` ticks; None: through all of them."""
    n_ticks: int | None = None
    """Ticks to run, with no rows in the first if no row is as deep: the largest depth of all processes that share the
    experts, which have to call them equally often. None: max(depths), and less if every token has exited before."""

    def __post_init__(self) -> None:
        if not self.depths:
            raise ValueError("depths=() must name one depth for each row of the batch; use depths=(8,) * batch_size")
        for depth in self.depths:
            check_int("depths", depth, 1, MAX_LOOPS, "use depths=(8,) * batch_size")
        if self.n_grad is not None:
            check_int("n_grad", self.n_grad, 1, MAX_LOOPS, "use n_grad=None for all")
        if self.n_ticks is not None:
            check_int("n_ticks", self.n_ticks, max(self.depths), MAX_LOOPS, "use n_ticks=None for max(depths)")


def loop_index_embedding(h: Tensor, loop_index: Tensor | int, loop_dim: int, theta: float = 10000.0) -> Tensor:
    """h plus the sines, then cosines, of loop_index * theta^(-2i/loop_dim) in its first `loop_dim` channels.

    Args:
        h: (B, T, D).
        loop_index: (B,) int64, or one int for every row.
    """
    index = torch.as_tensor(loop_index, device=h.device).expand(h.shape[0])
    return (h + loop_waves(index, h, loop_dim, theta)[:, None]).to(h.dtype)


def loop_waves(index: Tensor, h: Tensor, loop_dim: int, theta: float = 10000.0) -> Tensor:
    """What `loop_index_embedding` adds at each index: (N,) -> (N, D), in at least float32."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    frequency = theta ** (-torch.arange(0, loop_dim, 2, device=h.device, dtype=dtype) / loop_dim)
    angle = index[:, None].to(dtype) * frequency
    waves = torch.cat((angle.sin(), angle.cos()), dim=-1)[:, :loop_dim]
    return nn.functional.pad(waves, (0, h.shape[-1] - loop_dim))


@dataclass(frozen=True)
class LoopConstants:
    """What the loops of a call share, made once for all of them."""

    waves: Tensor | None
    """(max_loop_iters, D), the loop embeddings."""
    decay: Any
    """(D,), what the injection's `get_A` gives; None for one without a decay."""
    experts: dict[int, ExpertWeights]
    """Under autocast the routed experts in its dtype, by layer, so that not every loop keeps a copy of its own."""


class LoRAAdapter(nn.Module):
    """The depth LoRA: (down(x) * scale[loop]) @ B, one low-rank map whose R directions each loop weighs differently.

    Loops beyond the last row of `scale` use that row. B starts at zero, so a fresh model has no adapter.
    Source: Bae et al. 2024, arXiv 2410.20672.
    """

    def __init__(self, dim: int, rank: int, max_loops: int) -> None:
        super().__init__()
        self.down = Linear(dim, rank)
        self.scale = nn.Embedding(max_loops, rank)
        self.B = nn.Parameter(torch.empty(rank, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor, loop_index: Tensor | int) -> Tensor:
        """x (B, T, D), loop_index (B,) int64 or one int -> (B, T, D)."""
        last = self.scale.num_embeddings - 1
        if isinstance(loop_index, int):
            scale = self.scale.weight[min(loop_index, last)]
        else:
            scale = self.scale(loop_index.clamp(max=last))[:, None]
        return linear(self.down(x) * scale, self.B.T)
