"""Recipes for language modelling."""

from open_mythos.config import MythosConfig
from open_mythos.tasks import Shards, Text
from open_mythos.train.config import EvalConfig, OptimConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.variants import RECIPE


def tiny_text() -> TrainConfig:
    """Bytes of the embedded novel, about 80 s on one CPU thread, at a sampled depth of 4 loops on average."""
    return TrainConfig(
        model=MythosConfig(
            vocab_size=259,
            dim=128,
            n_heads=4,
            n_kv_heads=4,
            max_seq_len=512,
            max_loop_iters=4,
            prelude_layers=1,
            coda_layers=1,
            attn_type="gqa",
            n_experts=0,
            expert_dim=256,
            rope_theta=10000.0,
            initial_state="zero",
            **RECIPE,
        ),
        data=Text(seq_len=128),
        steps=300,
        batch_size=16,
        optim=OptimConfig("muon", lr=5e-3, weight_decay=0.0, muon_lr=2e-2),
        schedule=ScheduleConfig(warmup_steps=20, shape="linear", cooldown=0.5),
        loops=LoopsConfig("poisson", 4, max_loops=12),
        eval=EvalConfig(every=100, rows=64, loops=(1, 2, 4, 8)),
    )


SMALL_TEXT_DATA = """\
mythos fetch-corpus --out data/corpus.jsonl
mythos train-tokenizer data/corpus.jsonl --vocab-size 2048 --out data/bpe-2048
mythos prepare-data data/corpus.jsonl --tokenizer data/bpe-2048 --held-out 0.03 --out data/small-text"""
"""The commands that make what `small-text` trains on."""


def small_text() -> TrainConfig:
    """1.2 million of the 3.7 million tokens of the 11 MB corpus, about 4 minutes on one CPU thread, at a sampled depth
    of 4 loops on average; docs/results/small_text/report.md has the comparison with plain transformers.

    The commands of SMALL_TEXT_DATA make the text, once. `expert_dim=dim` makes the looped block with its injection as
    large as a plain block, so that three plain blocks have the same number of parameters.
    """
    return TrainConfig(
        model=MythosConfig(
            vocab_size=2048,
            dim=192,
            n_heads=6,
            n_kv_heads=6,
            max_seq_len=512,
            max_loop_iters=4,
            prelude_layers=1,
            coda_layers=1,
            attn_type="gqa",
            n_experts=0,
            expert_dim=192,
            rope_theta=10000.0,
            qk_norm=True,
            initial_state="zero",
            **RECIPE,
        ),
        data=Shards(("data/small-text",), seq_len=256),
        steps=600,
        batch_size=8,
        optim=OptimConfig("muon", lr=5e-3, weight_decay=0.0, muon_lr=2e-2),
        schedule=ScheduleConfig(warmup_steps=30, shape="linear", cooldown=0.5),
        loops=LoopsConfig("poisson", 4, max_loops=16),
        eval=EvalConfig(every=200, rows=64, loops=(1, 2, 4, 8, 16)),
        log_every=25,
    )
