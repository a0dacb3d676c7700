"""Recipes for pretraining on text prepared as token shards. `mythos plan RECIPE` shows their costs."""

from dataclasses import replace

from open_mythos.tasks import Shards
from open_mythos.train.config import OptimConfig, ParallelConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.variants import VARIANTS, sized, small_model

FINEWEB_EDU = "data/fineweb-edu"
"""Folder that `mythos prepare-data` makes of FineWeb-Edu; `--data.paths` names another."""
GPT_OSS_VOCAB = 201_088
"""Tokens of openai/gpt-oss-20b, special ones included."""
SEQ_LEN = 2048

# Rows of one step: half a million tokens as published, and more for larger models, whose gradient is less noisy.
_ROWS = {"1b": 256, "10b": 512, "50b": 1024, "100b": 2048, "500b": 2048, "1t": 4096}
_TOKENS_PER_PARAMETER = 10
_EXPERT_RANKS = {"10b": 8, "50b": 64, "100b": 128, "500b": 256, "1t": 512}
"""Above 10b one GPU cannot hold the experts of a block beside their gradients."""


def mythos_3b_fineweb_edu() -> TrainConfig:
    """The run of training/3b_fine_web_edu.py of open-mythos: 30 billion tokens, 256 rows of 2,048 a step, AdamW.

    As there: mythos_3b on the vocabulary of gpt-oss-20b, 16 loops with ACT for every row, AdamW at 3e-4 over every
    parameter with decay 0.1, betas (0.9, 0.95), 2,000 steps of warm-up and a cosine to a tenth, gradients clipped at
    norm 1, bf16 over float32 weights, fully sharded, four rows at a time. (Its README mentions Muon and DDP; the
    script has neither.)

    Repaired: rotations survive bf16, ACT's weights sum to one at any depth, every part has gradient from the first
    step, ranks may halt at different loops, the balancing biases move, weights are kept in float32, the embedding has
    room for the special tokens (201,088 instead of 199,998, which makes 3.561 instead of 3.558 billion parameters), and
    a resumed run goes on where it stopped. The rate at step s is that of their step s + 1. Loops are recomputed in the
    backward pass, which changes no result.
    """
    return TrainConfig(
        model=replace(VARIANTS["3b"](), vocab_size=GPT_OSS_VOCAB, max_seq_len=SEQ_LEN),
        data=Shards((FINEWEB_EDU,), seq_len=SEQ_LEN),
        steps=30_000_000_000 // (256 * SEQ_LEN),
        batch_size=256,
        seed=1337,
        dtype="bfloat16",
        optim=OptimConfig("adamw", lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, decay="all", clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=2000, shape="cosine", final_ratio=0.1),
        loops=LoopsConfig("fixed", 16),
        checkpoint_loops=True,
        parallel=ParallelConfig("fsdp", rows=4),
    )


def pretrain(variant: str) -> TrainConfig:
    """A published variant as mythos-3b-fineweb-edu trains 3b: ten tokens per parameter, as 30 billion are for 3b.

    These recipes are ours and have not been run: `mythos plan` starts from them. From 10b on the experts are
    distributed over ranks, and the rate falls with the square root of the width.
    """
    from open_mythos.accounting import count_parameters  # needs torch, which the other recipes do without

    model = VARIANTS[variant]()
    model = replace(model, vocab_size=max(model.vocab_size, GPT_OSS_VOCAB), max_seq_len=SEQ_LEN)

    rows = _ROWS[variant]
    base = mythos_3b_fineweb_edu()
    return replace(
        base,
        model=model,
        steps=_TOKENS_PER_PARAMETER * count_parameters(model).total // (rows * SEQ_LEN),
        batch_size=rows,
        optim=replace(base.optim, lr=min(3e-4, 3e-4 * (3072 / model.dim) ** 0.5)),
        loops=LoopsConfig("fixed", model.max_loop_iters),
        parallel=ParallelConfig("fsdp", experts=_EXPERT_RANKS.get(variant, 1), rows=4 if model.dim < 4096 else 1),
    )


def parcae_style_140m() -> TrainConfig:
    """Parcae's 140M as far as this model can say it: 11.2 billion tokens, 2, 2 and 2 layers, eight loops on average.

    As there: width 768 with 6 heads, normalised queries and keys, rotation base 50,000, vocabulary 32,768, diagonal
    injection on a normalised prelude output, a depth per row with the gradient of the last four loops, Muon and AdamW
    at 8e-3, betas (0.8, 0.95), no warm-up, a linear cool-down over the last half, 256 rows of 2,048 tokens, bf16.

    Different here: no value embeddings (75 of its 144 million parameters) and no linear map before the coda; SwiGLU
    instead of a squared ReLU of four times the width (as many parameters in the loop, half in prelude and coda); depths
    are 1 + Poisson(7) instead of max(1, Poisson(8)); the first state has a variance of 2/5, not 2/5 over the width;
    initial values are ours; Muon's decay of 0.2 falls with the rate and is not cautious, and its update has no variance
    reduction; windows are cut anywhere instead of packed by document.

    Source: Prairie et al. 2026, arXiv 2604.12946, and its code.
    """
    layout = {"prelude_layers": 2, "coda_layers": 2, "recurrent_layers": 2, "qk_norm": True, "initial_state": "normal"}
    return TrainConfig(
        model=small_model(32_768, 768, 6, 2048, max_seq_len=SEQ_LEN, max_loop_iters=8, rope_theta=50_000.0, **layout),
        data=Shards((FINEWEB_EDU,), seq_len=SEQ_LEN),
        steps=11_200_000_000 // (256 * SEQ_LEN),
        batch_size=256,
        dtype="bfloat16",
        optim=OptimConfig(
            "muon", lr=8e-3, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.2, muon_lr=8e-3, adjust_lr="original"
        ),
        schedule=ScheduleConfig(shape="linear", cooldown=0.5),
        loops=LoopsConfig("poisson", 8, backprop_depth=4),
        parallel=ParallelConfig(rows=16),
    )


def ablation_118m() -> TrainConfig:
    """The run `looped_8` of issue 28 of OpenMythos: 117,808,066 parameters, 491.5 million tokens, fixed at eight loops.

    As there: the vocabulary of GPT-2, 16 experts of which two are chosen, ACT without a ponder cost, AdamW at 3e-4
    falling to 3e-5 with decay 0.1 on everything, 500 steps of warm-up, 32 rows of 1,024 tokens, 15,000 steps.
    `--loops.mean 1` is its `baseline_1`. Its `looped_random` draws a step's depth from
    {4, 6, 8, 12, 16}, which no law here does; `--loops.law uniform --loops.mean 8.5 --loops.per batch` draws 1 to 16.

    Repaired: rotations (a cast to bf16 had left their real part alone) and weights in float32 under bf16 arithmetic
    (they were bf16). Different here: the balancing biases move, and initial values are ours. Source: the issue and pull
    requests 27 and 58 of kyegomez/OpenMythos.
    """
    return TrainConfig(
        model=sized(50_257, 768, 12, 4, 1024, 8, 2, 16, 1, 2, 1536, latents=(192, 384, 32, 32, 32), lora_rank=16),
        data=Shards((FINEWEB_EDU,), seq_len=1024),
        steps=15_000,
        batch_size=32,
        dtype="bfloat16",
        optim=OptimConfig("adamw", lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, decay="all", clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=500, shape="cosine", final_ratio=0.1),
        loops=LoopsConfig("fixed", 8),
        checkpoint_loops=True,
    )
