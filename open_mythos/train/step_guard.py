"""Steps that are left out: those whose loss or gradient is not finite, and on request those with a spike in either."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from open_mythos.checks import PositiveFloat, PositiveInt, check_section

WINDOW = 128
"""Steps that a spike is measured against, and half of them are needed first. Source: OLMo-core's SkipStep."""
GROWTH_STEPS = 2000
"""Good steps after which the scale of a float16 loss doubles, as in torch's GradScaler."""

STATE = ("skipped", "scale", "_in_a_row", "_good", "_losses", "_norms")


@dataclass(frozen=True)
class GuardConfig:
    """A step that is not taken leaves parameters, moments and the optimizers' counters as they were."""

    spike_sigmas: PositiveFloat | None = None
    """Also leave out steps whose loss or gradient norm is above the mean of the last 128 by so many standard
    deviations; None: only such as are not finite. Not for runs whose loss jumps by design, as with ramp_steps."""
    max_skips: PositiveInt = 10
    """Steps left out in a row after which the run ends with an error."""

    def __post_init__(self) -> None:
        check_section(self, "guard.")


class StepGuard:
    """Decides from numbers that are equal on all processes, so that they decide the same."""

    def __init__(self, cfg: GuardConfig, scaled: bool = False) -> None:
        """Args: scaled: whether the loss is multiplied, so that float16 gradients do not vanish."""
        self.cfg, self.scaled = cfg, scaled
        self.skipped = 0
        """Steps left out so far."""
        self.scale = 2.0**16 if scaled else 1.0
        self._in_a_row = self._good = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def allows(self, step: int, loss: float, norm: float) -> bool:
        """Return whether to take the step.

        Raises:
            FloatingPointError: `max_skips` steps in a row were left out.
        """
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and not self._sticks_out(loss, norm):
            self._losses.append(loss)
            self._norms.append(norm)
            self._in_a_row, self._good = 0, self._good + 1
            if self.scaled and self._good % GROWTH_STEPS == 0:
                self.scale *= 2
            return True
        self.skipped += 1
        self._good = 0
        if self.scaled and not finite and self.scale > 1:
            self.scale /= 2  # most likely the scale's fault
            return False
        self._in_a_row += 1
        if self._in_a_row >= self.cfg.max_skips:
            raise FloatingPointError(
                f"train/loss={loss}, train/grad_norm={norm} at step {step}, and {self._in_a_row} steps in a row were "
                "left out; lower optim.lr or lengthen schedule.warmup_steps, and go on from a checkpoint before that"
            )
        return False

    def _sticks_out(self, loss: float, norm: float) -> bool:
        if self.cfg.spike_sigmas is None or len(self._losses) < WINDOW // 2:
            return False
        return any(
            value > statistics.fmean(past) + self.cfg.spike_sigmas * statistics.stdev(past)
            for value, past in ((loss, self._losses), (norm, self._norms))
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold, as JSON."""
        return {name: list(x) if isinstance(x := getattr(self, name), deque) else x for name in STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        for name in STATE:
            setattr(self, name, deque(state[name], WINDOW) if isinstance(state[name], list) else state[name])
