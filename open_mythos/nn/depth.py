"""Depth: how many loops each row runs (`LoopPlan`), and the parts that see the index of a loop.

Shapes: B rows, T tokens, D width, R rank.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.checks import check_int
from open_mythos.config import MAX_LOOPS, MythosConfig
from open_mythos.ops.linear import Linear, linear


@dataclass(frozen=True)
class LoopPlan:
    """The depth of each row of a training batch. The trainer draws it; the model only follows.

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


def check_n_loops(n_loops: int | None, cfg: MythosConfig, levels: int | None = None) -> int:
    """Return a call's loops, an int in [1, 4096] and at most a cache's `levels`; None: `levels` or `max_loop_iters`."""
    if n_loops is None:
        if levels is not None:
            return levels
        return cfg.max_loop_iters if cfg.recurrent_layers else 1
    if not cfg.recurrent_layers:
        raise ValueError(f"n_loops={n_loops!r}, but recurrent_layers=0 makes a plain transformer; leave n_loops out")
    check_int("n_loops", n_loops, 1, MAX_LOOPS, "use n_loops=8, or leave n_loops out for the model's own")
    if cfg.trained_loops and n_loops > cfg.trained_loops and not torch.compiler.is_compiling():
        warnings.warn(
            f"n_loops={n_loops} is beyond the {cfg.trained_loops} loops that this model was trained for, where answers "
            "usually become worse",
            stacklevel=3,
        )
    if levels is not None and n_loops > levels:
        raise ValueError(
            f"n_loops={n_loops} is deeper than the cache, which has {levels} levels; "
            f"make it with make_cache(..., n_loops={n_loops})"
        )
    return n_loops


def check_plan(plan: LoopPlan, input_ids: Tensor, cfg: MythosConfig, trace: bool, others: dict[str, Any]) -> None:
    """Refuse a plan that does not fit the batch or the halting, or one beside `others`, arguments that exclude it."""
    if not isinstance(plan, LoopPlan):
        raise TypeError(f"plan={plan!r} must be a LoopPlan; use plan=LoopPlan(depths=(8,) * batch_size)")
    for name, given in others.items():
        if given is not None:
            raise ValueError(f"{name}={given!r} does not go with plan=, which is for training; leave {name} out")
    if len(plan.depths) != input_ids.shape[0]:
        raise ValueError(f"plan.depths has {len(plan.depths)} depths for {input_ids.shape[0]} rows; give one per row")
    if trace and cfg.halting == "act":
        raise ValueError(
            "trace=True with plan= gives the logits of every loop's state, but halting='act' reads out a weighted sum "
            "of states and may end the loop early; use halting='none' or leave trace out"
        )
    deepest = max(plan.depths)
    if trace and min(plan.depths) != deepest:
        raise ValueError(
            f"plan.depths goes from {min(plan.depths)} to {deepest}, but trace=True needs one depth for all rows; give "
            "every row the same depth or leave trace out"
        )
    if cfg.halting == "act" and plan.n_grad is not None and plan.n_grad < deepest:
        raise ValueError(
            f"plan.n_grad={plan.n_grad} is below the plan's {deepest} loops, but halting='act' learns from every loop; "
            "use n_grad=None or halting='none'"
        )


def loop_index_embedding(h: Tensor, loop_index: Tensor | int, loop_dim: int, theta: float = 10000.0) -> Tensor:
    """Add the sines, then cosines, of loop_index * theta^(-2i/loop_dim) to the first `loop_dim` channels of h.

    Args:
        h: (B, T, D).
        loop_index: (B,) int64, or one int for every row.
    """
    index = torch.as_tensor(loop_index, device=h.device).expand(h.shape[0])
    return (h + loop_embeddings(index, h, loop_dim, theta)[:, None]).to(h.dtype)


def loop_embeddings(index: Tensor, h: Tensor, loop_dim: int, theta: float = 10000.0) -> Tensor:
    """Return what `loop_index_embedding` adds at each index: (N,) -> (N, D), in at least float32."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    # The frequencies of the sinusoidal position encoding (Vaswani et al. 2017), with the loop in place of the position.
    frequency = theta ** (-torch.arange(0, loop_dim, 2, device=h.device, dtype=dtype) / loop_dim)
    angle = index[:, None].to(dtype) * frequency
    waves = torch.cat((angle.sin(), angle.cos()), dim=-1)[:, :loop_dim]
    return nn.functional.pad(waves, (0, h.shape[-1] - loop_dim))


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
        """Map x (B, T, D) to (B, T, D); `loop_index` is (B,) int64, or one int for every row."""
        last = self.scale.num_embeddings - 1
        if isinstance(loop_index, int):
            scale = self.scale.weight[min(loop_index, last)]
        else:
            scale = self.scale(loop_index.clamp(max=last))[:, None]
        return linear(self.down(x) * scale, self.B.T)
