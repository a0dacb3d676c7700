"""What it costs that a row's bits do not depend on its neighbours."""

from dataclasses import dataclass
from typing import Any

from benchmarks.engine.load import Load
from benchmarks.engine.run import Run
from benchmarks.engine.subjects import Subject, model_of
from benchmarks.stats import Spread, ratios

ON, OFF, AGAIN = "on", "off", "on again"


@dataclass(frozen=True)
class Modes:
    """The engine with `batch_invariant` on and off, geometric depths."""

    subject: Subject
    rows: int

    @property
    def name(self) -> str:
        return f"modes, {self.subject.name}, {self.rows}"

    def run(self, run: Run) -> dict[str, Any]:
        model = model_of(self.subject, run.trained)
        costs = {on: run.costs(self.subject, self.rows, on) for on in (True, False)}
        params = {"n_loops": self.subject.n_loops, **self.subject.rule(self.subject.laws[-1])}
        loads = {
            name: Load(
                model,
                self.subject.prompts(),
                self.rows,
                params,
                costs=costs[name != OFF],
                batch_invariant=name != OFF,
            )
            for name in (ON, OFF, AGAIN)
        }
        rates = {name: [window.rate for window in found] for name, found in run.interleave(loads).items()}
        return {
            "subject": self.subject.name,
            "rows": self.rows,
            "rates": {name: Spread.of(found) for name, found in rates.items()},
            "on_over_off": ratios(rates[ON], rates[OFF]),
            "noise": ratios(rates[AGAIN], rates[ON]),
        }
