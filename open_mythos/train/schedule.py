"""Learning rate over a run, as a factor of the peak: linear warm-up, then one of three ways down."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from open_mythos.checks import NonNegativeInt, Range, check_section


@dataclass(frozen=True)
class ScheduleConfig:
    """Warm-up, plateau, cool-down. A run shorter than its warm-up ends inside it."""

    warmup_steps: NonNegativeInt = 0
    """Steps over which the rate rises linearly; step 0 already has 1 / warmup_steps of the peak."""
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """Form of the cool-down; "constant" has none."""
    cooldown: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Share of the steps after warm-up that cool down; the steps before it stay at the peak."""
    final_ratio: Annotated[float, Range(0, 1)] = 0.0
    """Rate at the end of the run over the peak rate."""

    def __post_init__(self) -> None:
        check_section(self, "schedule.")

    def factor(self, step: int, n_steps: int) -> float:
        """Return the factor of the peak rate at 0-based `step` of `n_steps`.

        The value `final_ratio` belongs to step `n_steps`, one past the last, so no step is spent at a rate of 0.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        cooldown_steps = (n_steps - self.warmup_steps) * self.cooldown
        if self.shape == "constant" or step <= n_steps - cooldown_steps:
            return 1.0
        left = (n_steps - step) / cooldown_steps
        if self.shape == "cosine":
            left = 0.5 * (1 - math.cos(math.pi * left))
        return self.final_ratio + (1 - self.final_ratio) * left
