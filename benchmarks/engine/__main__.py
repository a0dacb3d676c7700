"""`python -m benchmarks.engine`: measure what is not there yet, and write the report."""

import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import machine
from benchmarks.cases.exits import FOLDER
from benchmarks.engine.fairness import ROWS, Fairness
from benchmarks.engine.modes import Modes
from benchmarks.engine.others import Others
from benchmarks.engine.policies import Policies
from benchmarks.engine.report import write_report
from benchmarks.engine.run import Run
from benchmarks.engine.subjects import SUBJECTS
from benchmarks.results import ROOT, Results, commit, source

ALL_ROWS = (1, 8, 16, 32, 64)
SOME_ROWS = (1, 8, 32)
Case = Policies | Others | Modes | Fairness


@dataclass
class Args:
    """Time the engine against simpler policies, other packages and itself, in turns, and write the report."""

    cases: tuple[str, ...] = ()
    """Beginnings of the names of cases; none: all."""
    out: Path = Path("docs/results/engine")
    """Folder for results.json and figures; the report stands beside it, under the folder's name."""
    trained: Path = FOLDER
    """A model that the recipe `adaptive-text` has made."""
    quick: bool = False
    """Short and few windows: shows that everything runs, and gives no figure to quote."""
    fresh: bool = False
    """Measure again what the folder already holds from the same code."""
    list: bool = False
    """Only name the cases."""
    report: bool = False
    """Only write the report again, from what the folder holds."""


def cases() -> dict[str, Case]:
    """All by name, in the report's order."""
    found: list[Case] = [
        Policies(subject, law, rows) for subject in SUBJECTS.values() for law in subject.laws for rows in ALL_ROWS
    ]
    found += [Others(rows) for rows in SOME_ROWS]
    found += [Modes(SUBJECTS[name], rows) for name in ("heavy", "30m") for rows in SOME_ROWS]
    found += [Fairness(clients) for clients in (ROWS, 2 * ROWS)]
    return {case.name: case for case in found}


def main(args: Args) -> int:
    """The exit status: 1 if a case failed."""
    found, console = cases(), Console()
    if args.list:
        console.print("\n".join(found), highlight=False)
        return 0
    wanted = {name: case for name, case in found.items() if not args.cases or name.startswith(args.cases)}
    if not wanted:
        raise SystemExit(f"--cases {args.cases[0]!r} begins no case; use some of {', '.join(found)}")
    results = Results(args.out)
    if not args.report:
        _run(args, results, wanted, tuple(found), console)
    console.print(f"Wrote {write_report(results.data, args.out)}.", highlight=False)
    return int(any(case["error"] for case in results.data["cases"].values()))


def _run(args: Args, results: Results, wanted: dict[str, Case], order: tuple[str, ...], console: Console) -> None:
    torch.set_num_threads(1)
    described = machine.describe()
    made_by = {"source": source(), "quick": args.quick, **{name: described[name] for name in machine.DECISIVE}}
    todo = [case for name, case in wanted.items() if args.fresh or not results.done(name, made_by=made_by)]
    console.print(f"{len(todo)} cases to measure, {len(wanted) - len(todo)} already there", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), TimeRemainingColumn())
    # Drawn when told to: a thread that draws would count as time of the engine.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        whole, part, name = progress.add_task("all", total=len(todo)), progress.add_task(""), ""

        def tell(what: str, done: int, of: int) -> None:
            progress.update(part, description=f"{name}: {what} {done + 1}/{of}", completed=done, total=of)
            progress.refresh()

        run = Run(str(args.trained), 0.2 if args.quick else 1.0, 2 if args.quick else 5, tell)
        results.data["machine"] = described
        for case in todo:
            name = case.name
            about = {"run": {"seconds": run.seconds, "rounds": run.rounds}, "commit": commit(), "made_by": made_by}
            results.put(name, order, _measure(case, run) | about)
            progress.advance(whole)


def _measure(case: Case, run: Run) -> dict[str, Any]:
    """The case's record; a failure is one, too, and leaves no figure."""
    started, load = time.time(), os.getloadavg()[0]
    record: dict[str, Any] = {"error": None}
    try:
        record |= _plain(case.run(run))
    except Exception as error:
        traceback.print_exc()
        record["error"] = f"{type(error).__name__}: {error}".replace(f"{ROOT}/", "")
    return record | {
        "kind": type(case).__name__,
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "seconds": time.time() - started,
        "load": [load, os.getloadavg()[0]],
    }


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return {name: _plain(each) for name, each in value.items()} if isinstance(value, dict) else value


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, prog="python -m benchmarks.engine", description=__doc__)))
