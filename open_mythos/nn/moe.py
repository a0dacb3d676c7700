"""The feed-forward of the recurrent block: routed experts, chosen per token, beside shared ones.

Shapes: N tokens, D width, E experts, F expert width, C experts chosen per token.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.nn.cache import View
from open_mythos.nn.mlp import Expert
from open_mythos.nn.numerics import wide_linear


class StackedExperts(nn.Module):
    """E SwiGLU experts in two stacked parameters, applied to tokens that are sorted by expert."""

    def __init__(self, n_experts: int, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(n_experts, dim, expert_dim))
        nn.init.normal_(self.gate_up, std=0.02)
        nn.init.normal_(self.down, std=0.02)

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """x (N * C, D), first the tokens of expert 0, then those of expert 1, ...; tokens_per_expert (E,)."""
        gate, up = grouped_linear(x, self.gate_up, tokens_per_expert).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, self.down, tokens_per_expert)


def grouped_linear(x: Tensor, weight: Tensor, rows_per_group: Tensor) -> Tensor:
    """x_g @ weight_g^T for consecutive groups of rows: x (M, in), weight (E, out, in), rows_per_group (E,) -> (M, out).

    One grouped product where torch has it: float32, bf16 and fp16 with rows of a multiple of 16 bytes, on CPU and CUDA.
    Anything else (float64, odd widths, MPS) takes a loop over the groups, which waits for the counts on a GPU.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    if aligned and x.dtype != torch.float64 and x.device.type in ("cpu", "cuda"):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=rows_per_group.cumsum(0).to(torch.int32))
    # unbind, not weight[i]: indexing a stacked parameter makes a gradient of its full size for every group.
    groups = x.split(rows_per_group.tolist())
    return torch.cat([rows @ w.T for rows, w in zip(groups, weight.unbind(0), strict=True)])


class MoEFFN(nn.Module):
    """sum over the chosen experts of gate * expert(x), plus the shared experts.

    The router's logits plus `router_bias` choose the experts; the gates are the softmax over the chosen logits without
    the bias, so balancing shifts the choice only and never enters the gradient (Wang et al. 2024, arXiv 2408.15664).
    """

    router_bias: Tensor

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.n_experts, self.n_chosen = cfg.n_experts, cfg.n_experts_per_tok
        self.router = nn.Linear(cfg.dim, cfg.n_experts, bias=False)
        self.register_buffer("router_bias", torch.zeros(cfg.n_experts, dtype=torch.float32))
        self.experts = StackedExperts(cfg.n_experts, cfg.dim, cfg.expert_dim)
        # One SwiGLU as wide as all of them together computes the same sum.
        shared_dim = cfg.n_shared_experts * cfg.expert_dim * cfg.n_experts_per_tok
        self.shared = Expert(cfg.dim, shared_dim) if shared_dim else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoEFFN":
        # The bias moves by 1e-3 a step, which bf16 would round away: it follows the device of a cast, not the dtype.
        bias = self.router_bias
        super()._apply(fn, recurse)
        if not bias.is_meta:
            self.router_bias = bias.to(self.router_bias.device)
        return self

    def forward(self, x: Tensor, view: View | None = None) -> Tensor:
        """(..., D) -> (..., D). A `view` whose `router_log` is a list gets the router's statistics appended to it."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = wide_linear(tokens, self.router.weight)
        chosen = (logits + self.router_bias).topk(self.n_chosen, dim=-1).indices
        gates = logits.gather(-1, chosen).softmax(-1)
        out = self._routed(tokens, chosen, gates.to(x.dtype))
        if self.shared is not None:
            out = out + self.shared(tokens)
        if view is not None and view.router_log is not None:
            view.router_log.append(self._statistics(logits, chosen, view))
        return out.reshape(x.shape)

    def _routed(self, tokens: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        counts = torch.zeros(self.n_experts, dtype=torch.int64, device=tokens.device)
        counts = counts.scatter_add(0, chosen.flatten(), torch.ones_like(order))
        y = self.experts(tokens[order // self.n_chosen], counts)
        # Back to token order, so that the sum over a token's experts does not depend on the other tokens.
        y = torch.zeros_like(y).index_copy(0, order, y).unflatten(0, (-1, self.n_chosen))
        return (y * gates[..., None]).sum(1).to(tokens.dtype)

    def _statistics(self, logits: Tensor, chosen: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """(sum of logsumexp(logits)^2, tokens per expert), over tokens that are in the loop and no padding."""
        counted = view.active if view.active is not None else view.valid
        weight = logits.new_ones(logits.shape[0]) if counted is None else counted.flatten().to(logits.dtype)
        load = logits.new_zeros(self.n_experts).scatter_add(
            0, chosen.flatten(), weight.repeat_interleave(self.n_chosen)
        )
        return (logits.logsumexp(-1).square() * weight).sum(), load
