"""Recipes for text and conversations that a CPU trains."""

from open_mythos.tasks import Chat, Shards, Text
from open_mythos.train.config import EvalConfig, OptimConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.variants import sized, small_model


def tiny_text() -> TrainConfig:
    """Bytes of the embedded novel, about 80 s on one CPU thread, at a sampled depth of 4 loops on average."""
    return TrainConfig(
        model=small_model(259, 128, 4, 256, max_seq_len=512, max_loop_iters=4, rope_theta=10000.0),
        data=Text(seq_len=128),
        steps=300,
        batch_size=16,
        dtype="auto",
        optim=OptimConfig("muon", lr=5e-3, weight_decay=0.0, muon_lr=2e-2),
        schedule=ScheduleConfig(warmup_steps=20, shape="linear", cooldown=0.5),
        loops=LoopsConfig("poisson", 4, max_loops=12),
        eval=EvalConfig(every=100, rows=64, loops=(1, 2, 4, 8)),
    )


SMALL_TEXT_DATA = """\
mythos fetch-corpus --out data/corpus.jsonl
mythos train-tokenizer data/corpus.jsonl --vocab-size 2048 --out data/bpe-2048
mythos prepare-data data/corpus.jsonl --tokenizer data/bpe-2048 --held-out 0.03 --out data/small-text"""
"""The commands that make the data of `small-text`."""


def small_text() -> TrainConfig:
    """1.2 million of the 3.7 million tokens of the 11 MB corpus, about 4 minutes on one CPU thread, at a sampled depth
    of 4 loops on average; docs/results/small_text/report.md has the comparison with plain transformers.

    The commands of SMALL_TEXT_DATA make the text, once. `expert_dim=dim` makes the looped block with its injection as
    large as a plain block, so that three plain blocks have the same number of parameters.
    """
    return TrainConfig(
        model=small_model(2048, 192, 6, 192, max_seq_len=512, max_loop_iters=4, rope_theta=10000.0, qk_norm=True),
        data=Shards(("data/small-text",), seq_len=256),
        steps=600,
        batch_size=8,
        dtype="auto",
        optim=OptimConfig("muon", lr=5e-3, weight_decay=0.0, muon_lr=2e-2),
        schedule=ScheduleConfig(warmup_steps=30, shape="linear", cooldown=0.5),
        loops=LoopsConfig("poisson", 4, max_loops=16),
        eval=EvalConfig(every=200, rows=64, loops=(1, 2, 4, 8, 16)),
        log_every=25,
    )


def adaptive_text() -> TrainConfig:
    """39 million parameters with 64 experts on bytes of the embedded novel, always at 8 loops.

    Halting is chosen per call (`exit="kl"`). The loss is after the last loop alone: with losses after earlier ones, or
    sampled depths, a pilot of width 128 was as good at two loops as at eight, and there was nothing to choose. The
    savings of exits, and the tokens that exit, are measured in docs/results/adaptive/report.md.
    """
    others = {"rope_theta": 10000.0, "lora_rank": 8, "halting": "none"}
    return TrainConfig(
        model=sized(259, 512, 8, 4, 1024, 8, 2, 64, 1, 4, 256, latents=(128, 256, 32, 64, 64), **others),
        data=Text(seq_len=512),
        steps=90,
        batch_size=4,
        optim=OptimConfig("muon", lr=4e-3, weight_decay=0.0, muon_lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=8, shape="linear", cooldown=0.5),
        loops=LoopsConfig("fixed", 8),
        log_every=5,
    )


def chat() -> TrainConfig:
    """Fine-tuning on conversations: `mythos train chat --init-from FOLDER --data.paths FILE`.

    Architecture and tokenizer are the folder's; until it is named, those of tiny-text over bytes stand here.
    """
    return TrainConfig(
        model=tiny_text().model,
        data=Chat(),
        steps=200,
        batch_size=8,
        dtype="auto",
        optim=OptimConfig("adamw", lr=3e-4, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=10, shape="linear"),
        loops=LoopsConfig("poisson", 4, max_loops=12),
        eval=EvalConfig(every=50, rows=64),
    )
