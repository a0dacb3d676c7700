"""A recipe for text whose easy tokens may leave the loop early."""

from open_mythos.config import MythosConfig
from open_mythos.tasks import Text
from open_mythos.train.config import OptimConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.schedule import ScheduleConfig


def adaptive_text() -> TrainConfig:
    """39 million parameters with 64 experts on bytes of the embedded novel, always at 8 loops.

    Halting is chosen per call (`exit="kl"`). The loss is after the last loop alone: with losses after earlier ones, or
    sampled depths, a pilot of width 128 read two loops as well as eight, and there was nothing to choose. What exits
    save, and which tokens they take, is measured in docs/results/adaptive/report.md.
    """
    return TrainConfig(
        model=MythosConfig(
            vocab_size=259,
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
            rope_theta=10000.0,
            lora_rank=8,
            halting="none",
        ),
        data=Text(seq_len=512),
        steps=90,
        batch_size=4,
        optim=OptimConfig("muon", lr=4e-3, weight_decay=0.0, muon_lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=8, shape="linear", cooldown=0.5),
        loops=LoopsConfig("fixed", 8),
        log_every=5,
    )
