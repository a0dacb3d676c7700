"""Small dense models of recipes that one CPU thread trains."""

from typing import Any

from open_mythos.config import MythosConfig
from open_mythos.variants import RECIPE


def small_model(vocab_size: int, dim: int, n_heads: int, expert_dim: int, **changes: Any) -> MythosConfig:
    """Return one dense looped block between one layer before and one behind it, with the injection of RECIPE."""
    fields: dict[str, Any] = {"attn_type": "gqa", "n_experts": 0, "prelude_layers": 1, "coda_layers": 1}
    fields |= {"initial_state": "zero", **RECIPE, **changes}
    return MythosConfig(
        vocab_size=vocab_size, dim=dim, n_heads=n_heads, n_kv_heads=n_heads, expert_dim=expert_dim, **fields
    )
