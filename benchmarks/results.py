"""What a run leaves: one JSON file, from which the report is made."""

import hashlib
import json
import os
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.stats import Spread

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Row:
    """One line of the report."""

    id: str
    """What the reach is looked up by."""
    what: str
    value: float
    """A ratio, or another figure with a unit of its own."""
    unit: str = "x"
    peer: str = ""
    """The peer's side in words: its median time, or its bytes."""
    ours: str = ""
    spread: Spread | None = None
    """Of the paired ratios."""
    noise: Spread | None = None
    """Of the same command against itself."""
    wall: float | None = None
    """The same ratio in wall time, where `value` is not."""
    peer_share: str = ""
    """Of the machine's limit."""
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
    """What figures are drawn from."""


class Results:
    """The file `results.json` of a folder, written after every case."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.json"
        self.data: dict[str, Any] = {"machine": {}, "cases": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())

    def done(self, name: str, **made: Any) -> bool:
        """Whether the case is there, without an error, with these entries: the same code measured in the same way."""
        case = self.data["cases"].get(name)
        return case is not None and case["error"] is None and made.items() <= case.items()

    def put(self, name: str, order: tuple[str, ...], case: dict[str, Any]) -> None:
        """Add or replace a case; the file holds cases in this order."""
        cases = {**self.data["cases"], name: case}
        self.data["cases"] = {name: cases.pop(name) for name in order if name in cases} | cases
        self.write()

    def write(self) -> None:
        """Complete or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self.path)


def plain(outcome: Outcome) -> dict[str, Any]:
    """As JSON has it."""
    return asdict(outcome)


def commit() -> str:
    """The commit that is checked out."""
    return _git("rev-parse", "--short=10", "HEAD").strip() or "unknown"


def source() -> str:
    """A name for the package's code as it is on disk: its tree in git, and a hash of what differs from that.

    A commit that leaves the package alone, such as one of results, leaves results valid.
    """
    tree = _git("rev-parse", "--short=10", "HEAD:open_mythos").strip() or "unknown"
    changes = _git("diff", "HEAD", "--", "open_mythos") + _git("status", "--porcelain", "--", "open_mythos")
    return f"{tree}-changed-{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else tree


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout
