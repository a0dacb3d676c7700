"""A recipe for conversations."""

from open_mythos.recipes.text import tiny_text
from open_mythos.tasks import Chat
from open_mythos.train.config import EvalConfig, OptimConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.schedule import ScheduleConfig


def chat() -> TrainConfig:
    """Fine-tuning on conversations: `mythos train chat --init-from FOLDER --data.paths FILE`.

    Architecture and tokenizer are the folder's; the ones here, those of tiny-text over bytes, stand in until it is
    named.
    """
    return TrainConfig(
        model=tiny_text().model,
        data=Chat(),
        steps=200,
        batch_size=8,
        optim=OptimConfig("adamw", lr=3e-4, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=10, shape="linear"),
        loops=LoopsConfig("poisson", 4, max_loops=12),
        eval=EvalConfig(every=50, rows=64),
    )
