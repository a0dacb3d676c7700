"""The feed-forward of the recurrent block: routed experts, chosen per token, beside shared ones.

Shapes: N tokens, D width, E experts, F expert width, C experts chosen per token.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.nn.cache import View
from open_mythos.nn.experts import StackedExperts
from open_mythos.nn.mlp import Expert
from open_mythos.ops.linear import Linear
from open_mythos.ops.precision import wide_linear


class MoEFFN(nn.Module):
    """sum over the chosen experts of gate * expert(x), plus the shared experts.

    The router's logits plus `router_bias` choose the experts; the gates are the softmax over the chosen logits without
    the bias, so balancing shifts the choice only and never enters the gradient (Wang et al. 2024, arXiv 2408.15664).
    """

    router_bias: Tensor

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.n_experts, self.n_chosen = cfg.n_experts, cfg.n_experts_per_tok
        self.router = Linear(cfg.dim, cfg.n_experts)
        self.register_buffer("router_bias", torch.zeros(cfg.n_experts, dtype=torch.float32))
        self.experts = StackedExperts(cfg.n_experts, cfg.dim, cfg.expert_dim)
        # One SwiGLU as wide as all of them together computes the same sum.
        shared_dim = cfg.n_shared_experts * cfg.expert_dim * cfg.n_experts_per_tok
        self.shared = Expert(cfg.dim, shared_dim) if shared_dim else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoEFFN":
        # The bias moves by 1e-3 a step, which bf16 would round away: it follows the device of a cast, not the dtype.
        bias = self.router_bias
        super()._apply(fn, recurse)
        on_device = self.router_bias.device
        self.router_bias = torch.empty_like(bias, device=on_device) if bias.is_meta else bias.to(on_device)
        return self

    def forward(self, x: Tensor, view: View | None = None, layer: int = 0) -> Tensor:
        """(..., D) -> (..., D). A `view` whose `router_log` is a list gets the router's statistics appended to it.

        Args:
            layer: this layer's place in the view's constants.
        """
        tokens = x.reshape(-1, x.shape[-1])
        logits, chosen = self.route(tokens)
        gates = logits.gather(-1, chosen).softmax(-1)
        weights = None if view is None or view.constants is None else view.constants.experts.get(layer)
        out = self.experts(tokens, chosen, gates.to(x.dtype), weights).to(x.dtype)
        if self.shared is not None:
            out = out + self.shared(tokens)
        if view is not None and view.router_log is not None:
            view.router_log.append(self._statistics(logits, chosen, view))
        return out.reshape(x.shape)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The router's logits (N, E) for tokens (N, D), and the experts that they choose (N, C)."""
        logits = wide_linear(tokens, self.router.weight)
        return logits, (logits + self.router_bias).topk(self.n_chosen, dim=-1).indices

    def _statistics(self, logits: Tensor, chosen: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """(sum of logsumexp(logits)^2, tokens per expert), over tokens that are in the loop and no padding."""
        counted = view.active if view.active is not None else view.valid
        z = logits.logsumexp(-1).square()
        each = torch.ones_like(chosen, dtype=logits.dtype)
        if counted is not None:
            weight = counted.flatten().to(logits.dtype)
            z, each = z * weight, each * weight[:, None]
        load = logits.new_zeros(self.n_experts).scatter_add(0, chosen.flatten(), each.flatten())
        return z.sum(), load
