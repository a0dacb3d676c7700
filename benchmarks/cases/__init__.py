"""The table of cases."""

from typing import Protocol

from benchmarks import models
from benchmarks.bench import Bench, Budget
from benchmarks.cases.pair import Pair
from benchmarks.job import Job
from benchmarks.results import Outcome


class Case(Protocol):
    """Anything with a name, a line for the report, how it is measured, and a way to run."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def protocol(self) -> str: ...
    def run(self, bench: Bench) -> Outcome: ...


SMALL = {"gqa": models.SMALL_GQA, "mla": models.SMALL_MLA}

_CASES: list[Case] = [
    Pair(
        "train_addition",
        "training step, addition model (a)",
        Job("ours", "train", models.ADDITION, rows=128, tokens=20, n_loops=4),
    ),
    *(
        Pair(
            f"train_small_{kind}",
            f"training step, small model (b) {kind}, eager",
            Job("ours", "train", model, rows=2, tokens=16, n_loops=4),
        )
        for kind, model in SMALL.items()
    ),
    Pair(
        "forward_mid",
        "forward pass, mid model (c)",
        Job("ours", "forward", models.MID, rows=4, tokens=512, n_loops=8),
    ),
    Pair(
        "train_mid",
        "training step, mid model (c)",
        Job("ours", "train", models.MID, rows=4, tokens=512, n_loops=8),
        budget=Budget(150.0),
    ),
]

CASES: dict[str, Case] = {case.name: case for case in _CASES}
