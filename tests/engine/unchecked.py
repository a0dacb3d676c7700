"""Configurations that no engine accepts, for tests of the scheduler alone: pages of any size."""

from dataclasses import dataclass

from open_mythos.engine.config import EngineConfig


@dataclass(frozen=True)
class Unchecked(EngineConfig):
    """An `EngineConfig` whose values are not checked."""

    def __post_init__(self) -> None:
        pass
