"""Ouro (ByteDance/Ouro-1.4B, -2.6B and their Thinking models): one stack of layers, looped whole. arXiv 2510.25741."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.convert import published
from open_mythos.convert.published import Place, Places, Values, interleaved


def to_config(values: Mapping[str, Any]) -> MythosConfig:
    """Return the configuration of a published `config.json`.

    Raises:
        TypeError, ValueError: a value is missing or one that this family does not have; the message names it.
    """
    read = Values(values)
    read.only("hidden_act", "silu")
    read.only("tie_word_embeddings", False)
    read.only("use_sliding_window", False)
    read.only("rope_scaling", None)
    read.only("attention_bias", False)
    read.only("attention_dropout", 0.0, 0)
    dim, n_heads, loops = read.int("hidden_size"), read.int("num_attention_heads"), read.int("total_ut_steps")
    read.only("head_dim", dim // n_heads, None)
    return MythosConfig(
        vocab_size=read.int("vocab_size"),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=read.int("num_key_value_heads"),
        max_seq_len=read.int("max_position_embeddings"),
        max_output_tokens=read.int("max_position_embeddings"),
        max_loop_iters=loops,
        trained_loops=loops,
        prelude_layers=0,
        coda_layers=0,
        recurrent_layers=read.int("num_hidden_layers"),
        attn_type="gqa",
        n_experts=0,
        n_shared_experts=0,
        expert_dim=read.int("intermediate_size"),
        act_threshold=read.number("early_exit_threshold"),
        rope_theta=read.number("rope_theta", 1),
        lora_rank=0,
        injection="none",
        loop_embedding=False,
        halting="ouro",
        block_norm="branch",
        state_norm="loop",
        norm_eps=read.number("rms_norm_eps"),
        tie_embeddings=False,
    )


def to_state(tensors: Mapping[str, Tensor], cfg: MythosConfig) -> dict[str, Tensor]:
    """Return the state of a model of configuration `cfg`; see `published.to_state` for what is refused."""
    return published.to_state(tensors, places(cfg))


def places(cfg: MythosConfig) -> Places:
    """Return where each published tensor goes."""
    D, F, K, V = cfg.dim, cfg.expert_dim, cfg.head_dim, cfg.vocab_size
    Q, G = cfg.n_heads * K, cfg.n_kv_heads * K
    found: Places = {
        "model.embed_tokens.weight": Place("embed.weight", (V, D)),
        "model.norm.weight": Place("recurrent.out_norm.weight", (D,)),
        "model.early_exit_gate.weight": Place("recurrent.act.halt.weight", (1, D)),
        "model.early_exit_gate.bias": Place("recurrent.act.halt.bias", (1,)),
        "lm_head.weight": Place("head.weight", (V, D)),
    }
    pairs = partial(interleaved, head_dim=K)
    for i in range(cfg.recurrent_layers):
        theirs = f"model.layers.{i}"
        ours = f"recurrent.block.{i}" if cfg.recurrent_layers > 1 else "recurrent.block"
        found |= {
            f"{theirs}.self_attn.q_proj.weight": Place(f"{ours}.attn.wqkv.weight", (Q, D), 0, pairs),
            f"{theirs}.self_attn.k_proj.weight": Place(f"{ours}.attn.wqkv.weight", (G, D), Q, pairs),
            f"{theirs}.self_attn.v_proj.weight": Place(f"{ours}.attn.wqkv.weight", (G, D), Q + G),
            f"{theirs}.self_attn.o_proj.weight": Place(f"{ours}.attn.wo.weight", (D, Q)),
            f"{theirs}.mlp.gate_proj.weight": Place(f"{ours}.ffn.gate_up.weight", (F, D)),
            f"{theirs}.mlp.up_proj.weight": Place(f"{ours}.ffn.gate_up.weight", (F, D), F),
            f"{theirs}.mlp.down_proj.weight": Place(f"{ours}.ffn.down.weight", (D, F)),
            f"{theirs}.input_layernorm.weight": Place(f"{ours}.attn_norm.weight", (D,)),
            f"{theirs}.input_layernorm_2.weight": Place(f"{ours}.attn_out_norm.weight", (D,)),
            f"{theirs}.post_attention_layernorm.weight": Place(f"{ours}.ffn_norm.weight", (D,)),
            f"{theirs}.post_attention_layernorm_2.weight": Place(f"{ours}.ffn_out_norm.weight", (D,)),
        }
    return found
