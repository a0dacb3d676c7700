"""One transformer block: attention, then a feed-forward, each around a residual connection."""

from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.nn.attention import GQAttention
from open_mythos.nn.cache import View
from open_mythos.nn.mla import MLAttention
from open_mythos.nn.mlp import Expert
from open_mythos.nn.moe import MoEFFN
from open_mythos.nn.norm import RMSNorm

ATTENTIONS: dict[str, type[GQAttention] | type[MLAttention]] = {"gqa": GQAttention, "mla": MLAttention}


class TransformerBlock(nn.Module):
    """x + attn(norm(x)), then x + ffn(norm(x)); `block_norm="sandwich"` also normalises each sum.

    `recurrent` blocks have the mixture of experts (or one dense SwiGLU of width `expert_dim`), the others a SwiGLU of
    width dim * 4 // 3.
    """

    def __init__(self, cfg: MythosConfig, recurrent: bool = False) -> None:
        super().__init__()
        sandwich = cfg.block_norm == "sandwich"
        self.attn_norm, self.ffn_norm = RMSNorm(cfg.dim), RMSNorm(cfg.dim)
        self.attn_out_norm = RMSNorm(cfg.dim) if sandwich else nn.Identity()
        self.ffn_out_norm = RMSNorm(cfg.dim) if sandwich else nn.Identity()
        self.attn = ATTENTIONS[cfg.attn_type](cfg)
        self.ffn: MoEFFN | Expert
        if recurrent and cfg.n_experts:
            self.ffn = MoEFFN(cfg)
        else:
            self.ffn = Expert(cfg.dim, cfg.expert_dim if recurrent else cfg.dim * 4 // 3)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, view: View, layer: int) -> Tensor:
        """(B, T, D) -> (B, T, D); `layer` names this block's place in the view's store."""
        x = self.attn_out_norm(x + self.dropout(self.attn(self.attn_norm(x), view, layer)))
        u = self.ffn_norm(x)
        y = self.ffn(u, view, layer) if isinstance(self.ffn, MoEFFN) else self.ffn(u)
        return self.ffn_out_norm(x + self.dropout(y))
