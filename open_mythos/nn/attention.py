"""Grouped-query attention, and the softmax product that both attentions share.

Shapes: B rows, T query tokens, S key tokens, H query heads, G key/value heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import MythosConfig, check_grouped_heads
from open_mythos.nn.layer_costs import Execution, LayerCosts
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.rope import apply_rope
from open_mythos.nn.view import View
from open_mythos.ops.causal_attention import CausalAttention, prefers_float32, takes_blocks
from open_mythos.ops.linear import Linear
from open_mythos.ops.precision import no_autocast


def attend(q: Tensor, k: Tensor, v: Tensor, view: View, scale: float, dropout: float = 0.0) -> Tensor:
    """Attend, softmax(scale * q k^T) v under the view's mask.

    q (B, T, H, K), k (B, S, G, K), v (B, S, G, W) -> (B, T, H, W).
    """
    if view.is_square and not dropout and takes_blocks(q):
        return CausalAttention.apply(q, k, v, scale, view.starts)
    if prefers_float32(q):
        with no_autocast(q):
            out = attend(q.float(), k.float(), v.float(), view, scale, dropout)
        return out.to(torch.get_autocast_dtype(q.device.type))
    width = v.shape[-1]
    # Values as wide as the keys keep torch on its fused kernels; the zeros are cut off again.
    v = F.pad(v, (0, k.shape[-1] - width)) if width < k.shape[-1] else v
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=view.mask,
        is_causal=view.is_causal,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    out = out.transpose(1, 2)
    return out if out.shape[-1] == width else out[..., :width]


class Attention(nn.Module):
    """Base class of attentions, with the defaults of one that caches rotated keys and values of `head_dim` channels.

    Made from a `MythosConfig` alone. An attention may also have a static `check(cfg)`, which refuses fields that do not
    fit it, and a static `costs(cfg)`; without the latter its costs are measured.
    """

    @staticmethod
    def rope_dim(cfg: MythosConfig) -> int:
        """Return the channels of one head that the rotary embedding turns."""
        return cfg.head_dim

    @staticmethod
    def cache_shapes(cfg: MythosConfig) -> list[tuple[int, ...]]:
        """Return the shapes per token of the cached tensors: keys, values."""
        return [(cfg.n_kv_heads, cfg.head_dim)] * 2


class GQAttention(Attention):
    """Causal attention; H / G query heads share a key/value head. Source: Ainslie et al. 2023, arXiv 2305.13245."""

    check = staticmethod(check_grouped_heads)

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        self.qk_norm, self.dropout = cfg.qk_norm, cfg.dropout
        kv_width = cfg.n_kv_heads * cfg.head_dim
        self.wqkv = Linear(cfg.dim, cfg.n_heads * cfg.head_dim, kv_width, kv_width)
        self.wo = Linear(cfg.n_heads * cfg.head_dim, cfg.dim)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(cfg.head_dim, cfg.norm_eps) for _ in range(2))
        # Of queries, then keys, head by head. Source: Geiping et al. 2025, arXiv 2502.05171.
        n_biased = cfg.n_heads + cfg.n_kv_heads
        self.qk_bias = nn.Parameter(torch.empty(n_biased, cfg.head_dim)) if cfg.qk_bias else None

    def reset_parameters(self) -> None:
        if self.qk_bias is not None:
            nn.init.zeros_(self.qk_bias)

    @staticmethod
    def costs(cfg: MythosConfig) -> LayerCosts:
        """Return the maps of queries, keys, values and output, and the bytes saved for their gradients."""
        D, H, G, K = cfg.dim, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim

        def saved(execution: Execution, T: int) -> float:
            w, stat, blocks = execution.value_bytes, execution.state_bytes, execution.attends_in_blocks(T)
            copies = execution.attends_in_float32(T, K)
            a = stat if copies else w
            q, k, projected = a * H * K, a * G * K, w * (H + 2 * G) * K
            # Torch's kernel takes v as a view, which keeps the whole projection alive; the others take a copy.
            v = k if blocks or copies else projected
            out = q + (w * H * K if copies else 0)
            norms = 0
            if cfg.qk_norm:
                norms = (projected if blocks or copies else 0) + stat * (H + G)
            # The layer's input, q, k, v, the output, and the logarithms of the softmax's sums.
            return w * D + q + k + v + out + stat * H + norms

        maps = (D, D, G * K, G * K), (D, D)
        vectors = (2 * K if cfg.qk_norm else 0) + ((H + G) * K if cfg.qk_bias else 0)
        return LayerCosts(maps, saved, vectors, (H, K, K))

    def forward(self, x: Tensor, view: View, layer: int) -> Tensor:
        """Attend, (B, T, D) -> (B, T, D); `layer` is this layer's place in the view's store."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        if self.qk_bias is not None:
            qk, v = heads.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), dim=2)
            heads = torch.cat((qk + self.qk_bias, v), dim=2)
        if self.qk_norm:
            q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)
            q, k = apply_rope(self.q_norm(q), *view.rope), apply_rope(self.k_norm(k), *view.rope)
        else:
            # Queries and keys stand side by side, so one rotation turns both.
            qk, v = heads.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), dim=2)
            q, k = apply_rope(qk, *view.rope).split((self.n_heads, self.n_kv_heads), dim=2)
        if view.tokens is not None:
            return self.wo(view.tokens.attend(layer, q, (k, v), self.head_dim**-0.5).flatten(-2))
        k, v = view.store.write(layer, (k, v), view)
        dropout = self.dropout if self.training else 0.0
        return self.wo(attend(q, k, v, view, self.head_dim**-0.5, dropout).flatten(-2))
