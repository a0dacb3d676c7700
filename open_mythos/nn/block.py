"""One transformer block: attention, then a feed-forward, each around a residual connection."""

from torch import Tensor, nn

from open_mythos.config import ATTENTIONS, FEED_FORWARDS, MythosConfig
from open_mythos.nn.attention import GQAttention
from open_mythos.nn.inputs import make_view
from open_mythos.nn.layer_costs import LayerCosts, measured
from open_mythos.nn.mla import MLAttention
from open_mythos.nn.mlp import Expert
from open_mythos.nn.moe import MoEFFN
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.view import View

# ATTENTIONS: a class made from a configuration; see nn/attention.py. FEED_FORWARDS: a class made from the model's width
# and a hidden width, x (..., D) -> (..., D). docs/extending.md shows one of each.
ATTENTIONS.update(gqa=GQAttention, mla=MLAttention)
FEED_FORWARDS.update(swiglu=Expert)


class TransformerBlock(nn.Module):
    """x + attn(norm(x)), then x + ffn(norm(x)), with the norms where `block_norm` places them.

    pre: as above. sandwich (Huginn, arXiv 2502.05171): also on each sum. branch (Ouro, arXiv 2510.25741): also on
    what is added. post (OLMo 2, arXiv 2501.00656): on what is added alone.

    `recurrent` blocks have the mixture of experts, or without experts one dense feed-forward of width `expert_dim`; the
    others have a dense one of width `dense_dim`.
    """

    def __init__(self, cfg: MythosConfig, recurrent: bool = False) -> None:
        super().__init__()
        before, behind = cfg.block_norm != "post", cfg.block_norm != "pre"
        self.normalises_sum = cfg.block_norm == "sandwich"
        self.attn_norm, self.ffn_norm = _norm(cfg, before), _norm(cfg, before)
        self.attn_out_norm, self.ffn_out_norm = _norm(cfg, behind), _norm(cfg, behind)
        self.attn = ATTENTIONS[cfg.attn_type](cfg)
        self.ffn: nn.Module
        if recurrent and cfg.n_experts:
            self.ffn = MoEFFN(cfg)
        else:
            self.ffn = FEED_FORWARDS[cfg.feed_forward](cfg.dim, dense_width(cfg, recurrent))
        self.dropout = nn.Dropout(cfg.dropout) if cfg.dropout else nn.Identity()

    def forward(self, x: Tensor, view: View, layer: int) -> Tensor:
        """Apply the block, (B, T, D) -> (B, T, D); `layer` is its place in the view's store."""
        x = self._add(x, self.attn(self.attn_norm(x), view, layer), self.attn_out_norm)
        u = self.ffn_norm(x)
        y = self.ffn(u, view, layer) if isinstance(self.ffn, MoEFFN) else self.ffn(u)
        return self._add(x, y, self.ffn_out_norm)

    def _add(self, x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        return norm(x + self.dropout(y)) if self.normalises_sum else x + self.dropout(norm(y))


def _norm(cfg: MythosConfig, wanted: bool) -> nn.Module:
    return RMSNorm(cfg.dim, cfg.norm_eps) if wanted else nn.Identity()


def dense_width(cfg: MythosConfig, recurrent: bool) -> int:
    """Return the hidden width of a block's dense feed-forward, or beside routed experts that of the shared ones."""
    if recurrent and cfg.n_experts:
        return cfg.n_shared_experts * cfg.n_experts_per_tok * cfg.expert_dim
    return cfg.expert_dim if recurrent else cfg.dense_dim or cfg.dim * 4 // 3


def attention_costs(cfg: MythosConfig) -> LayerCosts:
    """Return the costs of one attention layer."""
    kind = ATTENTIONS[cfg.attn_type]
    # A subclass may have parameters that its parent's formulas do not count.
    if "costs" in vars(kind):
        return kind.costs(cfg)

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        shape = x.shape[0], x.shape[1]
        return layer(x, make_view(shape, kind.rope_dim(cfg), cfg.rope_theta, x.dtype, x.device), 0)

    return measured(lambda: kind(cfg), run, cfg.dim, (cfg.n_heads, cfg.head_dim, cfg.head_dim))


def feed_forward_costs(cfg: MythosConfig, recurrent: bool) -> LayerCosts:
    """Return the costs of a block's dense feed-forward, or beside routed experts those of the shared ones."""
    width = dense_width(cfg, recurrent)
    if not width:
        return LayerCosts((), lambda execution, T: 0)
    kind = Expert if recurrent and cfg.n_experts else FEED_FORWARDS[cfg.feed_forward]
    if "costs" in vars(kind):
        return kind.costs(cfg.dim, width)
    return measured(lambda: kind(cfg.dim, width), lambda layer, x: layer(x), cfg.dim, (0, 0, 0))
