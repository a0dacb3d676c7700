"""The models that cases are measured on, by the fields of MythosConfig that 0.5.0 knows too."""

import dataclasses
from typing import Any

from open_mythos.config import MythosConfig
from open_mythos.recipes.synthetic import addition_dgx
from open_mythos.variants import RECIPE, mythos_1b, mythos_1t, mythos_3m, mythos_30m, mythos_100b

N_PUBLISHED = 23
"""Fields of MythosConfig that 0.5.0 has, the first ones."""


def published(cfg: MythosConfig) -> dict[str, Any]:
    """The fields that 0.5.0 knows; the others have to be at their defaults, which are its mathematics."""
    names = [f.name for f in dataclasses.fields(cfg)]
    default = MythosConfig()
    changed = [name for name in names[N_PUBLISHED:] if getattr(cfg, name) != getattr(default, name)]
    if changed:
        raise ValueError(f"{changed[0]}={getattr(cfg, changed[0])!r} does not exist in 0.5.0; leave it at its default")
    return {name: getattr(cfg, name) for name in names[:N_PUBLISHED]}


ADDITION = published(addition_dgx().model)

# The usage example of 0.5.0's README.
_USAGE: dict[str, Any] = {
    "vocab_size": 1000,
    "dim": 256,
    "n_heads": 8,
    "max_seq_len": 128,
    "max_loop_iters": 4,
    "prelude_layers": 1,
    "coda_layers": 1,
    "n_experts": 8,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 64,
    "lora_rank": 8,
}
SMALL_GQA = published(MythosConfig(**_USAGE, attn_type="gqa", n_kv_heads=2))
SMALL_MLA = published(
    MythosConfig(
        **_USAGE,
        attn_type="mla",
        n_kv_heads=8,
        kv_lora_rank=32,
        q_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
)

MID = published(
    MythosConfig(
        vocab_size=8192,
        dim=512,
        n_heads=8,
        n_kv_heads=4,
        max_seq_len=1024,
        max_loop_iters=8,
        attn_type="mla",
        kv_lora_rank=128,
        q_lora_rank=256,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        n_experts=64,
        n_shared_experts=1,
        n_experts_per_tok=4,
        expert_dim=256,
        lora_rank=8,
    )
)
"""39.2M parameters; 87.1 MFLOP per token at 8 loops."""

LOOP_HEAVY: dict[str, Any] = {
    **MID,
    "vocab_size": 1024,
    "max_loop_iters": 16,
    "prelude_layers": 1,
    "coda_layers": 1,
    "n_experts": 16,
    "expert_dim": 512,
}
"""20.8M parameters, nearly all of the work in the loop: 236.1 MFLOP per token at 16 loops."""


def as_published(cfg: MythosConfig) -> dict[str, Any]:
    """A variant of ours in its shape, with the injection, halting and depth LoRA of 0.5.0 in place of our own."""
    default = MythosConfig()
    return published(dataclasses.replace(cfg, **{name: getattr(default, name) for name in RECIPE}))


THREE_M, THIRTY_M = as_published(mythos_3m()), as_published(mythos_30m())
ONE_B, ONE_T, HUNDRED_B = published(mythos_1b()), published(mythos_1t()), published(mythos_100b())

# Models of transformers, each of about as many FLOPs per token as MID at 8 loops.
_COMMON: dict[str, Any] = {
    "vocab_size": MID["vocab_size"],
    "hidden_size": MID["dim"],
    "max_position_embeddings": MID["max_seq_len"],
    "tie_word_embeddings": True,
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    # The blocks of MID, unrolled: 4 dense layers, and 8 with experts.
    "deepseek_v3": {
        **_COMMON,
        "class": "DeepseekV3",
        "num_hidden_layers": 12,
        "first_k_dense_replace": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "kv_lora_rank": 128,
        "q_lora_rank": 256,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "intermediate_size": 512 * 4 // 3,
        "moe_intermediate_size": 256,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "n_shared_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_mtp_layers": 0,
    },
    "qwen3_moe": {
        **_COMMON,
        "class": "Qwen3Moe",
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "moe_intermediate_size": 256,
        "num_local_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "llama": {
        **_COMMON,
        "class": "Llama",
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1624,
    },
}
PLAIN: dict[str, Any] = {
    "class": "Llama",
    "vocab_size": LOOP_HEAVY["vocab_size"],
    "hidden_size": LOOP_HEAVY["dim"],
    "max_position_embeddings": LOOP_HEAVY["max_seq_len"],
    "tie_word_embeddings": True,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 3736,
}
"""LOOP_HEAVY unrolled into as many layers as it runs at 16 loops, dense, as wide as makes the FLOPs per token equal."""
