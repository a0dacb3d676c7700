"""Recipes for pointer chasing."""

from open_mythos.config import MythosConfig
from open_mythos.tasks import KHop
from open_mythos.train.config import LossConfig, OptimConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.variants import RECIPE


def tiny_khop() -> TrainConfig:
    """Questions of up to 4 hops with up to 6 loops, each loop trained to be one hop; about 90 s on one CPU thread.

    No prelude: the state after a hop then looks like the symbol's own embedding, so that the hop learned first is the
    one that every later loop can use. The loss after every loop names the hops on the way. What each of the two is
    worth is measured in docs/results/khop/report.md.
    """
    return TrainConfig(
        model=MythosConfig(
            vocab_size=24,
            dim=64,
            n_heads=2,
            n_kv_heads=2,
            max_seq_len=32,
            max_loop_iters=6,
            prelude_layers=0,
            coda_layers=0,
            attn_type="gqa",
            n_experts=0,
            expert_dim=128,
            rope_theta=100.0,
            initial_state="e",
            qk_norm=True,
            **RECIPE,
        ),
        data=KHop(n_symbols=24, long_chain=17, max_distance=4, target="hop"),
        steps=600,
        batch_size=256,
        optim=OptimConfig("muon", lr=5e-3, weight_decay=0.0, muon_lr=2e-2),
        schedule=ScheduleConfig(warmup_steps=20, shape="linear", cooldown=0.5),
        losses=LossConfig(per_loop=True),
        loops=LoopsConfig("uniform", 3.5, per="batch", max_loops=6, ramp_steps=150),
    )
