"""Ready-made configurations: the published sizes under their names, and small ones for a CPU.

The published ones have exactly the parameter counts of open-mythos 0.5.0. Those marked as ours (but 7b, which
continues the published line) follow the recipe with the best evidence: the diagonal injection on a normalised prelude
output, no loop-specific parts, halting chosen per call.
"""

from typing import Any

from open_mythos.config import MythosConfig

RECIPE: dict[str, Any] = {
    "injection": "diagonal",
    "prelude_norm": True,
    "loop_embedding": False,
    "lora_rank": 0,
    "halting": "none",
}
"""What our own variants share: Prairie et al. 2026, arXiv 2604.12946."""


def mythos_1b() -> MythosConfig:
    """1,064,028,034 parameters, 16 loops, 4k context."""
    return MythosConfig(
        dim=2048,
        n_heads=16,
        n_kv_heads=4,
        max_seq_len=4096,
        max_loop_iters=16,
        kv_lora_rank=256,
        q_lora_rank=512,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        n_experts=64,
        expert_dim=2048,
        lora_rank=8,
    )


def mythos_3b() -> MythosConfig:
    """3,041,725,186 parameters, 16 loops, 4k context."""
    return MythosConfig(
        dim=3072,
        n_heads=24,
        n_kv_heads=6,
        max_seq_len=4096,
        max_loop_iters=16,
        kv_lora_rank=384,
        q_lora_rank=768,
        qk_rope_head_dim=32,
        qk_nope_head_dim=96,
        v_head_dim=96,
        n_experts=64,
        expert_dim=4096,
        lora_rank=8,
    )


def mythos_7b() -> MythosConfig:
    """7,197,679,746 parameters, 16 loops, 8k context. Ours: the published README uses the name, and gives no sizes."""
    return MythosConfig(
        dim=3584,
        n_heads=28,
        n_kv_heads=7,
        max_seq_len=8192,
        max_loop_iters=16,
        kv_lora_rank=512,
        q_lora_rank=1024,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_experts=128,
        expert_dim=4608,
        lora_rank=8,
    )


def mythos_10b() -> MythosConfig:
    """9,981,316,994 parameters, 24 loops, 8k context."""
    return MythosConfig(
        dim=4096,
        n_heads=32,
        n_kv_heads=8,
        max_seq_len=8192,
        max_loop_iters=24,
        kv_lora_rank=512,
        q_lora_rank=1024,
        n_experts=128,
        expert_dim=5632,
        lora_rank=16,
    )


def mythos_50b() -> MythosConfig:
    """50,374,247,426 parameters, 32 loops, 8k context."""
    return MythosConfig(
        dim=6144,
        n_heads=48,
        n_kv_heads=8,
        max_seq_len=8192,
        max_loop_iters=32,
        prelude_layers=3,
        coda_layers=3,
        kv_lora_rank=512,
        q_lora_rank=1536,
        n_experts=256,
        n_shared_experts=4,
        expert_dim=9728,
        lora_rank=32,
    )


def mythos_100b() -> MythosConfig:
    """99,545,072,130 parameters, 32 loops, 1M context."""
    return MythosConfig(
        dim=8192,
        n_heads=64,
        n_kv_heads=8,
        max_seq_len=1_000_000,
        max_loop_iters=32,
        prelude_layers=4,
        coda_layers=4,
        kv_lora_rank=512,
        q_lora_rank=2048,
        n_experts=256,
        n_shared_experts=4,
        n_experts_per_tok=8,
        expert_dim=13568,
        rope_theta=1e6,
        lora_rank=64,
        max_output_tokens=131072,
    )


def mythos_500b() -> MythosConfig:
    """497,849,137,154 parameters, 48 loops, 1M context."""
    return MythosConfig(
        vocab_size=100000,
        dim=12288,
        n_heads=96,
        n_kv_heads=16,
        max_seq_len=1_000_000,
        max_loop_iters=48,
        prelude_layers=4,
        coda_layers=4,
        kv_lora_rank=1024,
        q_lora_rank=3072,
        n_experts=512,
        n_shared_experts=8,
        n_experts_per_tok=8,
        expert_dim=23040,
        rope_theta=1e6,
        lora_rank=128,
        max_output_tokens=131072,
    )


def mythos_1t() -> MythosConfig:
    """999,326,352,386 parameters, 64 loops, 1M context."""
    return MythosConfig(
        vocab_size=100000,
        dim=16384,
        n_heads=128,
        n_kv_heads=16,
        max_seq_len=1_000_000,
        max_loop_iters=64,
        prelude_layers=6,
        coda_layers=6,
        kv_lora_rank=1024,
        q_lora_rank=4096,
        n_experts=512,
        n_shared_experts=8,
        n_experts_per_tok=8,
        expert_dim=34560,
        rope_theta=2e6,
        lora_rank=256,
        max_output_tokens=131072,
    )


def mythos_8b_fine() -> MythosConfig:
    """About 8 billion parameters in 384 narrow experts, 8 per token and one shared: 9.5 % of them active. Ours."""
    return MythosConfig(
        dim=4096,
        n_heads=32,
        n_kv_heads=8,
        max_seq_len=8192,
        max_loop_iters=16,
        kv_lora_rank=512,
        q_lora_rank=1024,
        n_experts=384,
        n_shared_experts=1,
        n_experts_per_tok=8,
        expert_dim=1536,
        **RECIPE,
    )


def mythos_200k() -> MythosConfig:
    """About 0.2 million parameters over bytes: trains in seconds on one core. Ours."""
    return MythosConfig(
        vocab_size=259,
        dim=64,
        n_heads=4,
        n_kv_heads=4,
        max_seq_len=256,
        max_loop_iters=8,
        prelude_layers=1,
        coda_layers=1,
        attn_type="gqa",
        n_experts=8,
        n_shared_experts=1,
        n_experts_per_tok=2,
        expert_dim=64,
        **RECIPE,
    )


def mythos_3m() -> MythosConfig:
    """About 3 million parameters over bytes: trains in minutes on one core. Ours."""
    return MythosConfig(
        vocab_size=259,
        dim=256,
        n_heads=8,
        n_kv_heads=4,
        max_seq_len=512,
        max_loop_iters=8,
        prelude_layers=1,
        coda_layers=1,
        attn_type="gqa",
        n_experts=8,
        n_shared_experts=1,
        n_experts_per_tok=2,
        expert_dim=176,
        **RECIPE,
    )


def mythos_30m() -> MythosConfig:
    """About 30 million parameters, 8k vocabulary: runs on a laptop. Ours."""
    return MythosConfig(
        vocab_size=8192,
        dim=512,
        n_heads=8,
        n_kv_heads=4,
        max_seq_len=1024,
        max_loop_iters=8,
        prelude_layers=2,
        coda_layers=2,
        kv_lora_rank=128,
        q_lora_rank=256,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=64,
        n_experts=32,
        n_shared_experts=1,
        n_experts_per_tok=4,
        expert_dim=384,
        **RECIPE,
    )


def mythos_120m() -> MythosConfig:
    """About 120 million parameters, 32k vocabulary: the size of a first run on one GPU. Ours."""
    return MythosConfig(
        vocab_size=32768,
        dim=768,
        n_heads=12,
        n_kv_heads=4,
        max_seq_len=2048,
        max_loop_iters=8,
        prelude_layers=2,
        coda_layers=2,
        kv_lora_rank=192,
        q_lora_rank=384,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=64,
        n_experts=48,
        n_shared_experts=1,
        n_experts_per_tok=4,
        expert_dim=640,
        **RECIPE,
    )


VARIANTS = {
    function.__name__.removeprefix("mythos_"): function
    for function in (
        mythos_200k,
        mythos_3m,
        mythos_30m,
        mythos_120m,
        mythos_1b,
        mythos_3b,
        mythos_7b,
        mythos_8b_fine,
        mythos_10b,
        mythos_50b,
        mythos_100b,
        mythos_500b,
        mythos_1t,
    )
}
"""Every variant by its short name, as the command line takes it."""
