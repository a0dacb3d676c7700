"""Recipes for pointer chasing."""

from open_mythos.config import MythosConfig
from open_mythos.train.config import TrainConfig
from open_mythos.train.loops import LoopsConfig
from open_mythos.train.optim import OptimConfig
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.train.tasks import KHop


def tiny_khop() -> TrainConfig:
    """Questions of up to 4 hops with up to 6 loops; the depth rises by one loop at a time."""
    return TrainConfig(
        model=MythosConfig(
            vocab_size=24,
            dim=64,
            n_heads=2,
            n_kv_heads=2,
            max_seq_len=32,
            max_loop_iters=6,
            prelude_layers=1,
            coda_layers=0,
            attn_type="gqa",
            n_experts=0,
            expert_dim=128,
            lora_rank=0,
            rope_theta=100.0,
            injection="diagonal",
            initial_state="e",
            loop_embedding=False,
            halting="none",
            prelude_norm=True,
            qk_norm=True,
        ),
        data=KHop(n_symbols=24, long_chain=17, max_distance=4),
        steps=600,
        batch_size=256,
        optim=OptimConfig("muon", lr=5e-3, weight_decay=0.0, muon_lr=2e-2),
        schedule=ScheduleConfig(warmup_steps=20, shape="linear", cooldown=0.5),
        loops=LoopsConfig("uniform", 3.5, per="batch", max_loops=6, ramp_steps=240),
    )
