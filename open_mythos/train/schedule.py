"""Learning rate over a run, as a factor of the peak: linear warm-up, then one of three ways down."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from open_mythos.checks import check_choice, check_int, check_number

Shape = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class ScheduleConfig:
    """Warm-up, plateau, cool-down. A run shorter than its warm-up ends inside it."""

    warmup_steps: int = 0
    """Steps over which the rate rises linearly; step 0 already has 1 / warmup_steps of the peak."""
    shape: Shape = "cosine"
    """Form of the cool-down; "constant" has none."""
    cooldown: float = 1.0
    """Share of the steps after warm-up that cool down; the steps before it stay at the peak."""
    final_ratio: float = 0.0
    """Rate at the end of the run over the peak rate."""

    def __post_init__(self) -> None:
        check_int("schedule.warmup_steps", self.warmup_steps, 0)
        check_choice("schedule.shape", self.shape, get_args(Shape))
        check_number("schedule.cooldown", self.cooldown, 0, 1, above=True)
        check_number("schedule.final_ratio", self.final_ratio, 0, 1)

    def factor(self, step: int, n_steps: int) -> float:
        """Factor of the peak rate at 0-based `step` of `n_steps`.

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
