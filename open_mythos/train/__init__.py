"""Training: a TrainConfig says what to do, a Trainer does it."""

from typing import TYPE_CHECKING, Any

from open_mythos.train.config import TrainConfig

if TYPE_CHECKING:
    from open_mythos.train.trainer import Trainer as Trainer

__all__ = ["TrainConfig", "Trainer"]


def __getattr__(name: str) -> Any:
    # A configuration can be read and checked without torch, which the trainer imports.
    if name == "Trainer":
        from open_mythos.train.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
