"""Multi-head latent attention: one latent and one rotary key per token are cached, whatever the number of heads.

Shapes: B rows, T query tokens, S key tokens, H heads, R latent width, N and P unrotated and rotated key width, W value.
Source: DeepSeek-AI 2024, arXiv 2405.04434, section 2.1.
"""

import dataclasses

import torch
from torch import Tensor

from open_mythos.config import MythosConfig, check_latent_heads
from open_mythos.nn.attention import Attention, attend
from open_mythos.nn.layer_costs import Execution, LayerCosts
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.rope import apply_rope
from open_mythos.nn.view import View
from open_mythos.ops.linear import Linear, linear_by_head


class MLAttention(Attention):
    """Causal attention through low-rank queries, keys and values.

    Many query tokens expand the latents into keys and values per head. Few of them (decode) instead fold `kv_up` into
    the query and the output and attend in the latent: the same mathematics, and the past is never expanded.
    """

    check = staticmethod(check_latent_heads)

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.n_heads, self.rank, self.dropout = cfg.n_heads, cfg.kv_lora_rank, cfg.dropout
        self.nope, self.rope, self.v_dim = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        self.scale = (self.nope + self.rope) ** -0.5
        self.down = Linear(cfg.dim, cfg.q_lora_rank, self.rank, self.rope)
        self.q_norm = RMSNorm(cfg.q_lora_rank)
        self.q_up = Linear(cfg.q_lora_rank, cfg.n_heads * (self.nope + self.rope))
        self.kv_norm = RMSNorm(self.rank)
        self.kv_up = Linear(self.rank, cfg.n_heads * (self.nope + self.v_dim))
        self.wo = Linear(cfg.n_heads * self.v_dim, cfg.dim)

    @staticmethod
    def rope_dim(cfg: MythosConfig) -> int:
        return cfg.qk_rope_head_dim

    @staticmethod
    def cache_shapes(cfg: MythosConfig) -> list[tuple[int, ...]]:
        """Return the shape per token of the cached tensor: the normed latent, then the rotated key of all heads."""
        return [(cfg.kv_lora_rank + cfg.qk_rope_head_dim,)]

    @staticmethod
    def costs(cfg: MythosConfig) -> LayerCosts:
        """Return the maps down to the latents, up to the heads and to the output, and the bytes saved for gradients."""
        D, H, Q, R, P = cfg.dim, cfg.n_heads, cfg.q_lora_rank, cfg.kv_lora_rank, cfg.qk_rope_head_dim
        N, W = cfg.qk_nope_head_dim, cfg.v_head_dim
        K = N + P

        def saved(execution: Execution, T: int) -> float:
            w, stat = execution.value_bytes, execution.state_bytes
            copies = execution.attends_in_float32(T, K)
            a = stat if copies else w
            # The latents twice, before the norms, which read views of them, and after.
            latents = 2 * w * (Q + R + P) + 2 * stat
            if execution.attends_in_blocks(T):
                v = out = w * H * W
            elif W < K:
                # v is padded to the keys' width; cutting the padding off the result makes a copy.
                v, out = a * H * K, H * (a * K + w * W)
            elif copies:
                v, out = a * H * W, (a + w) * H * W
            else:
                v, out = w * H * (N + W), w * H * W
            # The layer's input, the latents, q and k, v, the output, and the logarithms of the softmax's sums.
            return w * D + latents + 2 * a * H * K + v + out + stat * H

        maps = (D, Q, R, P), (Q, H * K), (R, H * (N + W)), (H * W, D)
        return LayerCosts(maps, saved, Q + R, (H, K, W), decode_heads=(H, R + P, R))

    def forward(self, x: Tensor, view: View, layer: int) -> Tensor:
        """Attend, (B, T, D) -> (B, T, D); `layer` is this layer's place in the view's store."""
        # 1. Down to the latents of queries and of keys and values, and to the one rotary key that all heads share.
        low, latent, k_rope = self.down.split(x)
        q_nope, q_rope = self.q_up(self.q_norm(low)).unflatten(-1, (self.n_heads, -1)).split((self.nope, self.rope), -1)
        # 2. Turn the queries' rotary part and the shared key together, the key as one more head.
        turned = apply_rope(torch.cat((q_rope, k_rope[:, :, None]), dim=2), *view.rope)
        q_rope, k_rope = turned[:, :, :-1], turned[:, :, -1]
        # 3. All that is cached of a token: its normed latent and its turned key.
        new = torch.cat((self.kv_norm(latent), k_rope), dim=-1)
        if view.tokens is not None:
            # The rows of an engine are single queries, for which attending in the latent takes fewer products.
            q = torch.cat((self._latent_query(q_nope), q_rope.flatten(0, 1)), dim=-1)[:, None]
            out = view.tokens.attend(layer, q, (new,), self.scale)
            return self.wo(self._values(out.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(-2))
        (kept,) = view.store.write(layer, (new,), view)
        # 4. Attend. A causal square expands: it has no past whose expansion could be saved, and needs no mask.
        absorb = not view.is_square and self._absorbing_is_cheaper(x.shape[1])
        attend_here = self._absorbed if absorb else self._expanded
        return self.wo(attend_here(q_nope, q_rope, kept, view).flatten(-2))

    def _absorbing_is_cheaper(self, n_queries: int) -> bool:
        """Compare multiplications per key and head: attend in the latent, or expand it once for all queries."""
        return n_queries * (2 * self.rank - self.nope - self.v_dim) < self.rank * (self.nope + self.v_dim)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, kept: Tensor, view: View) -> Tensor:
        """Attend to keys and values per head, made from the latents of all slots: -> (B, T, H, W)."""
        latent, k_rope = kept.split((self.rank, self.rope), -1)
        k_nope, v = self.kv_up(latent).unflatten(-1, (self.n_heads, -1)).split((self.nope, self.v_dim), -1)
        # The shared rotary key is joined to the key of every head.
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, self.n_heads, -1)), dim=-1)
        return self._attend(torch.cat((q_nope, q_rope), dim=-1), k, v, view)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, kept: Tensor, view: View) -> Tensor:
        """Attend to the latents themselves: -> (B, T, H, W).

        q . (up_k latent) = (up_k^T q) . latent, so `kv_up` moves from every key to the query, and likewise from every
        value to the output.
        """
        B, T, H = q_nope.shape[:3]
        q = torch.cat((self._latent_query(q_nope), q_rope.flatten(0, 1)), dim=-1).view(B, T * H, 1, -1)
        # All heads attend to the same keys, so H heads of T queries are one head of T * H queries: nothing is repeated
        # per head. The keys serve as values too, which saves a copy of the past; what their rotated part adds is cut
        # off by `_values`.
        k = kept[:, :, None]
        return self._values(self._attend(q, k, k, _per_head(view, H)).reshape(B * T, H, -1)).unflatten(0, (B, T))

    def _latent_query(self, q_nope: Tensor) -> Tensor:
        """Return the queries for the latents, by one product for each head: (B, T, H, N) -> (B T, H, R)."""
        # The first N of a head's rows in `kv_up` make its key, the others its value.
        up_k = self.kv_up.weight.unflatten(0, (self.n_heads, -1))[:, : self.nope]
        return linear_by_head(q_nope.flatten(0, 1), up_k.mT)

    def _values(self, out: Tensor) -> Tensor:
        """Turn weighted sums of latents and rotated keys into values: (B T, H, R + P) -> (B T, H, W)."""
        up_v = self.kv_up.weight.unflatten(0, (self.n_heads, -1))[:, self.nope :]
        return linear_by_head(out[..., : self.rank], up_v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
        return attend(q, k, v, view, self.scale, self.dropout if self.training else 0.0)


def _per_head(view: View, n_heads: int) -> View:
    """Return the view with its mask repeated for queries laid out as (T, H)."""
    if view.mask is None and not view.is_causal:
        return view
    T = view.positions.shape[1]
    mask = view.mask
    if view.is_causal:
        mask = torch.ones(T, T, dtype=torch.bool, device=view.positions.device).tril()[None, None]
    if mask is not None:
        mask = mask.repeat_interleave(n_heads, dim=2)
    return dataclasses.replace(view, mask=mask, starts=None)
