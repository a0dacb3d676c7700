"""A case, the record that it makes, and the file of all records."""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.client import ROOT
from benchmarks.harness import FULL, Bench, Budget
from benchmarks.job import Job
from benchmarks.stats import Spread


@dataclass(frozen=True)
class Reach:
    """A bound that the value of a row is to reach."""

    value: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Return whether a value reaches the bound."""
        return value <= self.value if self.at_most else value >= self.value

    def text(self, unit: str) -> str:
        """Write the bound with its unit."""
        number = f"{self.value:.0%}" if unit == "share" else f"{self.value:.3g}{'' if unit == 'x' else ' ' + unit}"
        return f"{'<=' if self.at_most else '>='} {number}"


@dataclass
class Row:
    """One line of the report."""

    id: str
    """The case's name, and a suffix where the case has several rows."""
    what: str
    value: float
    """A ratio, or another figure with a unit of its own."""
    unit: str = "x"
    peer: str = ""
    """The peer's side in words: its median time, or its bytes."""
    ours: str = ""
    spread: Spread | None = None
    """Spread of the paired ratios."""
    noise: Spread | None = None
    """Spread of the same command against itself."""
    wall: float | None = None
    """The same ratio in wall time, where `value` is not."""
    peer_share: str = ""
    """Share of the machine's limit."""
    ours_share: str = ""


@dataclass
class Outcome:
    """What a case found."""

    rows: list[Row] = field(default_factory=list)
    sides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By side: parameters, Spread of every clock, peak bytes."""
    gate: dict[str, Any] | None = None
    limits: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)
    """Data of figures and of the tables that only some cases have."""


@dataclass(frozen=True)
class Case:
    """One comparison. Its protocol is the docstring of `measure`."""

    name: str
    title: str
    """A line for the report."""
    measure: Callable[["Case", Bench], Outcome]
    job: Job
    reach: Mapping[str, Reach] = field(default_factory=dict)
    """Bounds by the part of a row's id that follows the case's name: "" is the case's own row."""
    ours: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the job that only our side has."""
    budget: Budget = FULL
    second_worker: bool = True
    """Compare ours with a second process of ours; otherwise, where two do not fit, with its own next call."""
    memory: bool = True
    """Measure the peak memory of both sides too."""
    side: str = "ours"
    """The module of `benchmarks.sides` that runs the job for this package."""
    page: str = "performance"
    """The page of docs/results that reports the case."""

    @property
    def protocol(self) -> str:
        """How the case is measured."""
        from benchmarks.tasks import TASKS

        job, task = self.job, TASKS.get(self.job.task)
        shape = "one token of {} rows after {} tokens" if job.task == "decode" else "{} x {} tokens"
        new = f", {job.new_tokens} new tokens" if job.task == "generate" else ""
        work = f"{job.task}, {shape.format(job.rows, job.tokens)}{new}, {job.n_loops} loops."
        work = f"{work} {task.__doc__}" if task else work
        itself = "a second process of ours" if self.second_worker else "the same process called again"
        text = (self.measure.__doc__ or "").format(job=job, case=self, work=work, self_spread=itself)
        return " ".join(text.split())


class Results:
    """The file of one machine's results, written after every case."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = self.path.read_text() if self.path.exists() else '{"machine": {}, "cases": {}}'
        self.data: dict[str, Any] = json.loads(text)

    def done(self, name: str, **made: Any) -> bool:
        """Return whether the case is there, without an error, with these entries: the same code, measured equally."""
        case = self.data["cases"].get(name)
        return case is not None and case["error"] is None and made.items() <= case.items()

    def put(self, name: str, order: tuple[str, ...], case: dict[str, Any]) -> None:
        """Add or replace a case, and write the file, complete or not at all; it has cases in this order."""
        cases = {**self.data["cases"], name: case}
        self.data["cases"] = {name: cases.pop(name) for name in order if name in cases} | cases
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self.path)


def plain(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as JSON has it."""
    return json.loads(json.dumps(asdict(outcome)))


def commit(folder: str | Path = ROOT) -> str:
    """Name the commit that is checked out."""
    return _git(folder, "rev-parse", "--short=10", "HEAD").strip() or "unknown"


def source() -> str:
    """Name the package's code as it is on disk: its tree in git, and a hash of what differs from that.

    A commit that leaves the package alone, such as one of results, leaves results valid.
    """
    tree = _git(ROOT, "rev-parse", "--short=10", "HEAD:open_mythos").strip() or "unknown"
    changes = _git(ROOT, "diff", "HEAD", "--", "open_mythos") + _git(ROOT, "status", "--porcelain", "--", "open_mythos")
    return f"{tree}-changed-{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else tree


def _git(folder: str | Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False).stdout
