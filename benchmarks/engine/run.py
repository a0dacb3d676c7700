"""How cases are run: how long, in what order, and what is measured once for all."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.engine.load import Load, Window, pool
from benchmarks.engine.subjects import Subject, model_of
from open_mythos.engine.calibration import measure_costs
from open_mythos.engine.engine import Engine
from open_mythos.engine.readout_policy import Curve, StepCosts


class Different(Exception):
    """Policies that should agree do not: there is no figure."""


@dataclass
class Run:
    """One run of the harness."""

    trained: str
    """Folder of the trained model."""
    seconds: float
    """Of a window."""
    rounds: int
    tell: Callable[[str, int, int], None]
    """Told what is going on: (what, parts done, parts in all)."""

    def costs(self, subject: Subject, rows: int, batch_invariant: bool = True) -> StepCosts:
        """What an engine of so many rows measures at its start; the engines of a case share it."""
        self.tell("measuring costs", 0, 1)
        model = model_of(subject, self.trained)
        unknown = StepCosts(Curve({1: 1.0}), Curve({1: 1.0}))
        return measure_costs(Engine(model, config=pool(model, rows, batch_invariant), costs=unknown).runner)

    def interleave(self, loads: dict[str, Load]) -> dict[str, list[Window]]:
        """Windows of every load, one of each in a round; each round begins with another one, the first is dropped."""
        windows: dict[str, list[Window]] = {name: [] for name in loads}
        names = list(loads)
        for i in range(self.rounds + 1):
            for j in range(len(names)):
                self.tell("warm-up" if i == 0 else "timing", i * len(names) + j, (self.rounds + 1) * len(names))
                name = names[(i + j) % len(names)]
                window = loads[name].window(self.seconds)
                if i:
                    windows[name].append(window)
        return windows
