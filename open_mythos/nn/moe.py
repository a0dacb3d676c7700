"""The feed-forward of the recurrent block: routed experts, chosen per token, beside shared ones.

Shapes: N tokens, D width, E experts, F expert width, C experts chosen per token.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from open_mythos.config import MythosConfig
from open_mythos.nn.mlp import Expert
from open_mythos.nn.token_dispatch import dispatch_and_combine
from open_mythos.nn.view import View
from open_mythos.ops.experts import StoredExperts, routed_experts
from open_mythos.ops.linear import Linear, autocasts
from open_mythos.ops.precision import as_dtype, float32_linear


class MoEFFN(nn.Module):
    """Mixture of experts: the sum over the chosen experts of gate * expert(x), plus the shared experts.

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
        """Compute (..., D) -> (..., D), and append the router's statistics to the view's `router_log`, if it has one.

        Args:
            layer: this layer's place in the view's constants.
        """
        # 1. Choose. Routing sees one token at a time, so rows and positions are one axis.
        tokens = x.reshape(-1, x.shape[-1])
        logits, chosen = self.route(tokens)
        # 2. Gates: the softmax over the chosen logits alone, without the bias that helped to choose.
        gates = logits.gather(-1, chosen).softmax(-1)
        # 3. The routed experts; under autocast their cast weights come from the call's constants.
        weights = None if view is None or view.constants is None else view.constants.experts.get(layer)
        out = as_dtype(self.experts(tokens, chosen, as_dtype(gates, x.dtype), weights), x.dtype)
        # 4. The shared experts, which every token goes through.
        if self.shared is not None:
            out = out + self.shared(tokens)
        if view is not None and view.router_log is not None:
            view.router_log.append(self._statistics(logits, chosen, view))
        return out.reshape(x.shape)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the router's logits (N, E) for tokens (N, D), and the experts that they choose (N, C)."""
        logits = float32_linear(tokens, self.router.weight)
        return logits, (logits + self.router_bias).topk(self.n_chosen, dim=-1).indices

    def _statistics(self, logits: Tensor, chosen: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the sum of logsumexp(logits)^2 and the tokens per expert, without padding and exited tokens."""
        # `active` leaves out padding and exited tokens. If it is None, no token has exited and `valid` has the padding.
        counted = view.active if view.active is not None else view.valid
        z = logits.logsumexp(-1).square()
        each = torch.ones_like(chosen, dtype=logits.dtype)
        if counted is not None:
            weight = counted.flatten().to(logits.dtype)
            z, each = z * weight, each * weight[:, None]
        load = logits.new_zeros(self.n_experts).scatter_add(0, chosen.flatten(), each.flatten())
        return z.sum(), load


class StackedExperts(nn.Module):
    """The routed experts: sum over a token's chosen experts of gate * down(silu(g) * u), with g, u = gate_up(x)."""

    def __init__(self, n_experts: int, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(n_experts, dim, expert_dim))
        nn.init.normal_(self.gate_up, std=0.02)
        nn.init.normal_(self.down, std=0.02)
        self.group: ProcessGroup | None = None
        """Processes that own E / size experts each, in the order of their ranks; None: this one owns all."""

    def spread_over(self, group: ProcessGroup) -> None:
        """Store this process's experts only, and let every call send tokens to the process of their experts."""
        mine = slice(group.rank() * (n := len(self.gate_up) // group.size()), (group.rank() + 1) * n)
        self.gate_up, self.down = (nn.Parameter(p.detach()[mine].clone()) for p in (self.gate_up, self.down))
        self.group = group

    def weights(self, x: Tensor) -> StoredExperts:
        """Return the parameters in the dtype of products with x: under autocast these are copies."""
        if not autocasts(x):
            return self.gate_up, self.down
        dtype = torch.get_autocast_dtype(x.device.type)
        return self.gate_up.to(dtype), self.down.to(dtype)

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor, weights: StoredExperts | None = None) -> Tensor:
        """Compute x (N, D), chosen (N, C) int64, gates (N, C) -> (N, D) in x.dtype, or in autocast's.

        Args:
            weights: the result of `weights(x)`, for calls that share it; None: made here.
        """
        weights = weights or self.weights(x)
        if autocasts(x):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, gates = x.to(dtype), gates.to(dtype)
        if self.group is not None:
            # The experts of other processes are reached over the network.
            return dispatch_and_combine(
                x, chosen, gates, len(self.gate_up), self.group, partial(routed_experts, weights=weights)
            )
        return routed_experts(x, chosen, gates, weights)


def check_load(tokens_per_expert: Tensor, cfg: MythosConfig) -> None:
    """Refuse counts without a row for each block of the core and a column for each expert."""
    if not isinstance(tokens_per_expert, Tensor):
        raise TypeError(
            f"tokens_per_expert must be a tensor, not {type(tokens_per_expert).__name__}; pass that of a TrainOutput"
        )
    shape = (cfg.recurrent_layers, cfg.n_experts)
    if tuple(tokens_per_expert.shape) != shape:
        raise ValueError(
            f"tokens_per_expert has shape {tuple(tokens_per_expert.shape)}, but (recurrent_layers, n_experts) is "
            f"{shape}; pass that of a TrainOutput"
        )
