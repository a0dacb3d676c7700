"""The models that cases are measured on, by the fields of MythosConfig that 0.5.0 knows too."""

import dataclasses
from dataclasses import replace
from typing import Any

from open_mythos.config import MythosConfig
from open_mythos.recipes.synthetic import addition_dgx
from open_mythos.recipes.text import adaptive_text
from open_mythos.variants import RECIPE, mythos_1b, mythos_1t, mythos_3m, mythos_30m, mythos_100b, sized

N_PUBLISHED = 23
"""Fields of MythosConfig that 0.5.0 has, the first ones."""


def published(cfg: MythosConfig) -> dict[str, Any]:
    """Return the fields that 0.5.0 knows; the others must be at their defaults, which are its mathematics."""
    names = [f.name for f in dataclasses.fields(cfg)]
    changed = [name for name in names[N_PUBLISHED:] if getattr(cfg, name) != getattr(MythosConfig(), name)]
    if changed:
        raise ValueError(f"{changed[0]}={getattr(cfg, changed[0])!r} does not exist in 0.5.0; leave it at its default")
    return {name: getattr(cfg, name) for name in names[:N_PUBLISHED]}


ADDITION = published(addition_dgx().model)

_USAGE = sized(1000, 256, 8, 2, 128, 4, 1, 8, 1, 2, 64, lora_rank=8)
"""The usage example of 0.5.0's README."""
_LATENTS = {"kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
SMALL_GQA = published(_USAGE)
SMALL_MLA = published(replace(_USAGE, attn_type="mla", n_kv_heads=8, **_LATENTS))

_DEFAULT = MythosConfig()
_REST = {"rope_theta": _DEFAULT.rope_theta, "halting": _DEFAULT.halting}
MID = published(replace(adaptive_text().model, vocab_size=8192, **_REST))
"""39.2M parameters; 87.1 MFLOP per token at 8 loops."""

_OTHER = sized(1024, 320, 5, 5, 512, 6, 2, 6, 1, 2, 224, coda_layers=1, lora_rank=4)
_HEADS = {"kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64}
OTHER = {"gqa": published(_OTHER), "mla": published(replace(_OTHER, attn_type="mla", **_HEADS))}
"""Sizes that no fast path was made for: (d)."""

_LAYOUT = {"max_loop_iters": 16, "prelude_layers": 1, "coda_layers": 1, "n_experts": 16, "expert_dim": 512}
LOOP_HEAVY: dict[str, Any] = {**MID, "vocab_size": 1024, **_LAYOUT}
"""20.8M parameters, nearly all of the work in the loop: 236.1 MFLOP per token at 16 loops."""


def as_published(cfg: MythosConfig) -> dict[str, Any]:
    """Return a variant of ours in its shape, with the injection, halting and depth LoRA of 0.5.0 in place of ours."""
    return published(replace(cfg, **{name: getattr(_DEFAULT, name) for name in RECIPE}))


THREE_M, THIRTY_M = as_published(mythos_3m()), as_published(mythos_30m())
ONE_B, ONE_T, HUNDRED_B = published(mythos_1b()), published(mythos_1t()), published(mythos_100b())


def _transformer(model: dict[str, Any], name: str, n_layers: int, kv_heads: int, **fields: Any) -> dict[str, Any]:
    """Return the fields of a model of transformers with the sizes of one of ours."""
    sizes = {"vocab_size": model["vocab_size"], "hidden_size": model["dim"], "num_attention_heads": model["n_heads"]}
    common = {"max_position_embeddings": model["max_seq_len"], "tie_word_embeddings": True, **sizes}
    return {"class": name, **common, "num_hidden_layers": n_layers, "num_key_value_heads": kv_heads, **fields}


_BLOCKS = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
_DEEPSEEK = {"n_routed_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": MID["expert_dim"]}
_DEEPSEEK |= {"n_shared_experts": 4, "n_group": 1, "topk_group": 1, "num_mtp_layers": 0}
_DEEPSEEK |= {"first_k_dense_replace": 4, "intermediate_size": 512 * 4 // 3, **{name: MID[name] for name in _BLOCKS}}
_QWEN = {"moe_intermediate_size": MID["expert_dim"], "num_experts_per_tok": 8, "num_local_experts": 64, "head_dim": 64}
TRANSFORMERS = {
    # The blocks of MID, unrolled: 4 dense layers, and 8 with experts.
    "deepseek_v3": _transformer(MID, "DeepseekV3", 12, 8, **_DEEPSEEK),
    "qwen3_moe": _transformer(MID, "Qwen3Moe", 10, 4, norm_topk_prob=True, **_QWEN),
    "llama": _transformer(MID, "Llama", 12, 4, intermediate_size=1624),
}
"""Models of transformers, each of about as many FLOPs per token as MID at 8 loops."""
PLAIN = _transformer(LOOP_HEAVY, "Llama", 18, 4, intermediate_size=3736)
"""LOOP_HEAVY unrolled into as many layers as it runs at 16 loops, dense, as wide as makes the FLOPs per token equal."""
