"""Ready-made configurations: the published sizes under their names, and small ones for a CPU.

1b, 3b, 10b, 50b, 100b, 500b and 1t are published, and have exactly the parameter counts of open-mythos 0.5.0. The
published README names 7b too, without sizes: those here continue the line. The others are ours, and follow the recipe
with the best evidence: the diagonal injection on a normalised prelude output, no loop-specific parts, halting chosen
per call. The two smallest have a vocabulary of bytes, and train in seconds (200k) or minutes (3m) on one core; 30m runs
on a laptop, 120m is the size of a first run on one GPU, and 8b_fine has many narrow experts.
"""

from collections.abc import Callable
from typing import Any

from open_mythos.config import MythosConfig

RECIPE: dict[str, Any] = {
    "injection": "diagonal",
    "prelude_norm": True,
    "loop_embedding": False,
    "lora_rank": 0,
    "halting": "none",
}
"""Fields that our own variants share: Prairie et al. 2026, arXiv 2604.12946."""

# fmt: off
_SIZE_FIELDS = (
    "vocab_size", "dim", "n_heads", "n_kv_heads", "max_seq_len", "max_loop_iters", "prelude_layers",
    "n_experts", "n_shared_experts", "n_experts_per_tok", "expert_dim",
)
_SIZES: dict[str, tuple[int, ...]] = {
    "200k":    (       259,    64,    4,  4,       256,   8,    1,      8,     1,      2,        64),
    "3m":      (       259,   256,    8,  4,       512,   8,    1,      8,     1,      2,       176),
    "30m":     (     8_192,   512,    8,  4,     1_024,   8,    2,     32,     1,      4,       384),
    "120m":    (    32_768,   768,   12,  4,     2_048,   8,    2,     48,     1,      4,       640),
    "1b":      (    32_000,  2048,   16,  4,     4_096,  16,    2,     64,     2,      4,      2048),
    "3b":      (    32_000,  3072,   24,  6,     4_096,  16,    2,     64,     2,      4,      4096),
    "7b":      (    32_000,  3584,   28,  7,     8_192,  16,    2,    128,     2,      4,      4608),
    "8b_fine": (    32_000,  4096,   32,  8,     8_192,  16,    2,    384,     1,      8,      1536),
    "10b":     (    32_000,  4096,   32,  8,     8_192,  24,    2,    128,     2,      4,      5632),
    "50b":     (    32_000,  6144,   48,  8,     8_192,  32,    3,    256,     4,      4,      9728),
    "100b":    (    32_000,  8192,   64,  8, 1_000_000,  32,    4,    256,     4,      8,     13568),
    "500b":    (   100_000, 12288,   96, 16, 1_000_000,  48,    4,    512,     8,      8,     23040),
    "1t":      (   100_000, 16384,  128, 16, 1_000_000,  64,    6,    512,     8,      8,     34560),
}
"""The `_SIZE_FIELDS` of every variant; its coda has as many layers as its prelude."""

_LATENT_FIELDS = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
_LATENTS: dict[str, tuple[int, ...]] = {
    "30m":     ( 128,   256,  32,  32,   64),
    "120m":    ( 192,   384,  32,  32,   64),
    "1b":      ( 256,   512,  32,  64,   64),
    "3b":      ( 384,   768,  32,  96,   96),
    "7b":      ( 512,  1024,  64, 128,  128),
    "8b_fine": ( 512,  1024,  64, 128,  128),
    "10b":     ( 512,  1024,  64, 128,  128),
    "50b":     ( 512,  1536,  64, 128,  128),
    "100b":    ( 512,  2048,  64, 128,  128),
    "500b":    (1024,  3072,  64, 128,  128),
    "1t":      (1024,  4096,  64, 128,  128),
}
"""Ranks and head widths of multi-head latent attention; a variant without a row has grouped-query attention."""

_OTHERS: dict[str, dict[str, Any]] = {
    "200k": RECIPE, "3m": RECIPE, "30m": RECIPE, "120m": RECIPE, "8b_fine": RECIPE,
    "1b": {"lora_rank": 8}, "3b": {"lora_rank": 8}, "7b": {"lora_rank": 8}, "10b": {"lora_rank": 16},
    "50b": {"lora_rank": 32},
    "100b": {"lora_rank": 64, "rope_theta": 1e6, "max_output_tokens": 131_072},
    "500b": {"lora_rank": 128, "rope_theta": 1e6, "max_output_tokens": 131_072},
    "1t": {"lora_rank": 256, "rope_theta": 2e6, "max_output_tokens": 131_072},
}

PARAMETERS = {
    "200k": 226_496, "3m": 2_601_728, "30m": 33_428_352, "120m": 119_784_768,
    "1b": 1_064_028_034, "3b": 3_041_725_186, "7b": 7_197_679_746, "8b_fine": 7_985_741_312, "10b": 9_981_316_994,
    "50b": 50_374_247_426, "100b": 99_545_072_130, "500b": 497_849_137_154, "1t": 999_326_352_386,
}
"""The number of parameters of each variant."""
# fmt: on


def sized(*sizes: int, latents: tuple[int, ...] = (), **others: Any) -> MythosConfig:
    """Return the configuration of a row of sizes and one of latents, as in the tables above; `others`: any fields."""
    fields: dict[str, Any] = dict(zip(_SIZE_FIELDS, sizes, strict=True)) | {"attn_type": "mla" if latents else "gqa"}
    fields |= dict(zip(_LATENT_FIELDS, latents, strict=True)) if latents else {}
    return MythosConfig(**{**fields, "coda_layers": fields["prelude_layers"], **others})


def small_model(vocab_size: int, dim: int, n_heads: int, expert_dim: int, **changes: Any) -> MythosConfig:
    """Return one dense looped block between one layer before and one behind it, with the injection of RECIPE."""
    fields: dict[str, Any] = {"attn_type": "gqa", "n_experts": 0, "prelude_layers": 1, "coda_layers": 1}
    fields |= {"n_heads": n_heads, "n_kv_heads": n_heads, "initial_state": "zero", **RECIPE, **changes}
    return MythosConfig(vocab_size=vocab_size, dim=dim, expert_dim=expert_dim, **fields)


def _variant(name: str) -> Callable[[], MythosConfig]:
    def make() -> MythosConfig:
        return sized(*_SIZES[name], latents=_LATENTS.get(name, ()), **_OTHERS[name])

    make.__name__ = make.__qualname__ = f"mythos_{name}"
    shape = "{max_loop_iters} loops, {max_seq_len:,} tokens".format(
        **dict(zip(_SIZE_FIELDS, _SIZES[name], strict=True))
    )
    make.__doc__ = f"Return the configuration of {PARAMETERS[name]:,} parameters, {shape}."
    return make


VARIANTS = {name: _variant(name) for name in _SIZES}
"""Every variant by its short name, as the command line takes it."""

mythos_200k, mythos_3m, mythos_30m, mythos_120m = (VARIANTS[name] for name in ("200k", "3m", "30m", "120m"))
mythos_1b, mythos_3b, mythos_7b, mythos_8b_fine = (VARIANTS[name] for name in ("1b", "3b", "7b", "8b_fine"))
mythos_10b, mythos_50b, mythos_100b = (VARIANTS[name] for name in ("10b", "50b", "100b"))
mythos_500b, mythos_1t = VARIANTS["500b"], VARIANTS["1t"]
