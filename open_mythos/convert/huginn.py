"""Huginn (tomg-group-umd/huginn-0125): prelude, a core that takes the prelude's output in every loop, coda.

Source: Geiping et al. 2025, arXiv 2502.05171.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.convert import published
from open_mythos.convert.published import Place, Places, Values


def to_config(values: Mapping[str, Any]) -> MythosConfig:
    """Return the configuration of a published `config.json`.

    Raises:
        TypeError, ValueError: a value is missing or one that this family does not have; the message names it.
    """
    read = Values(values)
    for name, value in (
        ("block_class_name", "SandwichBlock"),
        ("mlp_class_name", "GatedMLP"),
        ("nonlin_name", "SiLU"),
        ("norm_class_name", "RMSNorm_llama"),
        ("injection_type", "linear"),
        ("state_init", "like-init"),
        ("tie_embeddings", True),
        ("qk_bias", True),
        ("bias", False),
    ):
        read.only(name, value)
    dim, n_heads, width = read.int("n_embd"), read.int("n_heads"), read.int("intermediate_size")
    read.only("head_dim", dim // n_heads, None)
    read.only("num_key_value_heads", n_heads, None)
    scales = Values(read.values.get("init_values") or {})
    embed_scale = scales.number("embed_scale")
    return MythosConfig(
        vocab_size=read.int("padded_vocab_size"),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        max_seq_len=read.int("block_size"),
        max_output_tokens=read.int("block_size"),
        max_loop_iters=read.int("mean_recurrence"),
        prelude_layers=read.int("n_layers_in_prelude"),
        recurrent_layers=read.int("n_layers_in_recurrent_block"),
        coda_layers=read.int("n_layers_in_coda"),
        attn_type="gqa",
        n_experts=0,
        n_shared_experts=0,
        expert_dim=width,
        dense_dim=width,
        rope_theta=read.number("rope_base", 1),
        lora_rank=0,
        injection="linear",
        initial_state="truncated",
        state_std=scales.number("std") * embed_scale,
        loop_embedding=False,
        halting="none",
        block_norm="sandwich",
        state_norm="coda",
        norm_eps=read.number("norm_eps"),
        embed_scale=embed_scale,
        qk_bias=True,
    )


def to_state(tensors: Mapping[str, Tensor], cfg: MythosConfig) -> dict[str, Tensor]:
    """Return the state of a model of configuration `cfg`; see `published.to_state` for what is refused."""
    return published.to_state(tensors, places(cfg))


def places(cfg: MythosConfig) -> Places:
    """Return where each published tensor goes. The head repeats the embedding, and the angles are computed here."""
    D, F, H, K, V = cfg.dim, cfg.expert_dim, cfg.n_heads, cfg.head_dim, cfg.vocab_size
    found: Places = {
        "transformer.wte.weight": Place("embed.weight", (V, D)),
        "transformer.adapter.weight": Place("recurrent.injection.adapter.weight", (D, 2 * D)),
        "transformer.ln_f.weight": Place("norm.weight", (D,)),
        "lm_head.weight": None,
        "freqs_cis": None,
    }
    core = "recurrent.block.{}" if cfg.recurrent_layers > 1 else "recurrent.block"
    for theirs, ours, n_layers in (
        ("prelude", "prelude.{}", cfg.prelude_layers),
        ("core_block", core, cfg.recurrent_layers),
        ("coda", "coda.{}", cfg.coda_layers),
    ):
        for i in range(n_layers):
            source, target = f"transformer.{theirs}.{i}", ours.format(i)
            found |= {
                f"{source}.norm_1.weight": Place(f"{target}.attn_norm.weight", (D,)),
                f"{source}.norm_2.weight": Place(f"{target}.attn_out_norm.weight", (D,)),
                f"{source}.norm_3.weight": Place(f"{target}.ffn_norm.weight", (D,)),
                f"{source}.norm_4.weight": Place(f"{target}.ffn_out_norm.weight", (D,)),
                f"{source}.attn.Wqkv.weight": Place(f"{target}.attn.wqkv.weight", (3 * D, D)),
                f"{source}.attn.qk_bias": Place(f"{target}.attn.qk_bias", (2, 1, H, K), 0, _by_head),
                f"{source}.attn.proj.weight": Place(f"{target}.attn.wo.weight", (D, D)),
                f"{source}.mlp.fc.weight": Place(f"{target}.ffn.gate_up.weight", (2 * F, D)),
                f"{source}.mlp.proj.weight": Place(f"{target}.ffn.down.weight", (D, F)),
            }
    return found


def _by_head(bias: Tensor) -> Tensor:
    return bias.flatten(0, 2)
