"""Recipes for synthetic tasks: pointer chasing and multi-digit addition."""

from open_mythos.tasks import Addition, KHop
from open_mythos.train.config import EvalConfig, LossConfig, OptimConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.variants import sized, small_model


def tiny_khop() -> TrainConfig:
    """Questions of up to 4 hops with up to 6 loops, each loop trained to be one hop; about 90 s on one CPU thread.

    No prelude: the state after a hop then looks like the symbol's own embedding, so that the hop learned first is the
    one that every later loop can use. The loss after every loop names the hops on the way. The effect of both is
    measured in docs/results/khop/report.md.
    """
    layout = {"prelude_layers": 0, "coda_layers": 0, "initial_state": "e", "qk_norm": True}
    return TrainConfig(
        model=small_model(24, 64, 2, 128, max_seq_len=32, max_loop_iters=6, rope_theta=100.0, **layout),
        data=KHop(n_symbols=24, long_chain=17, max_distance=4, target="hop"),
        steps=600,
        batch_size=256,
        optim=OptimConfig("muon", lr=5e-3, weight_decay=0.0, muon_lr=2e-2),
        schedule=ScheduleConfig(warmup_steps=20, shape="linear", cooldown=0.5),
        losses=LossConfig(per_loop=True),
        loops=LoopsConfig("uniform", 3.5, per="batch", max_loops=6, ramp_steps=150),
    )


def tiny_addition() -> TrainConfig:
    """2- and 3-digit addition in minutes on one CPU thread, at a sampled depth so that more loops do no harm."""
    return TrainConfig(
        model=small_model(16, 128, 4, 256, max_seq_len=32, max_loop_iters=4, rope_theta=100.0),
        data=Addition(2, 3),
        steps=1000,
        batch_size=128,
        # At twice these rates seed 0 is quicker, but seed 1 stood still from step 200 to 560 and was given up there.
        optim=OptimConfig("muon", lr=2.5e-3, weight_decay=0.0, muon_lr=5e-3),
        schedule=ScheduleConfig(warmup_steps=20, shape="linear", cooldown=0.5),
        loops=LoopsConfig("poisson", 4, max_loops=12),
        eval=EvalConfig(every=100, rows=512, loops=(1, 4, 8, 32)),
    )


def addition_dgx() -> TrainConfig:
    """The published addition experiment: 3,386,658 parameters, 2 to 5 digits, 30,000 steps at a fixed depth of 4.

    As there: plain AdamW over every parameter, ACT without a ponder cost, and router biases that never move (0.5.0
    has no code that moves them).
    """
    return TrainConfig(
        model=sized(16, 256, 8, 2, 32, 4, 1, 4, 1, 2, 512, lora_rank=8),
        data=Addition(2, 5),
        steps=30_000,
        batch_size=128,
        optim=OptimConfig("adamw", lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, decay="all", clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=2000, shape="cosine", final_ratio=1e-5 / 3e-4),
        loops=LoopsConfig("fixed", 4),
        expert_bias_rate=0.0,
        eval=EvalConfig(every=1000, rows=512, loops=(4,)),
        log_every=50,
    )
