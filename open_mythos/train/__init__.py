"""Training: a TrainConfig says what to do, a Trainer does it."""

from open_mythos.train.config import TrainConfig
from open_mythos.train.trainer import Trainer

__all__ = ["TrainConfig", "Trainer"]
