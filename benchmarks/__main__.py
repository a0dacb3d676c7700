"""`python -m benchmarks`: run cases, store what they found, and write the pages."""

import fnmatch
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import machine
from benchmarks.case import Case, Results, commit, plain, source
from benchmarks.cases import CASES, PAGES, engine, exits, pairs
from benchmarks.client import ROOT
from benchmarks.harness import Bench, Settings
from benchmarks.report import write_report

AGAINST = (pairs.pair, exits.exits, engine.policies)
"""Measures of one timed task, which another checkout can run too."""


@dataclass
class Args:
    """Time this package against its peers and the machine's limits, each pair in turns, and write the pages."""

    cases: tuple[str, ...] = ()
    """Names of cases, with spaces or commas between, or patterns such as 'engine_*'; none: all."""
    out: Path = Path("docs/results")
    """Folder of the pages; each has a folder of its name beside it, with each machine's results, tables and figures."""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    """Threads of each worker; one worker computes at a time."""
    against: Path | None = None
    """Folder of another checkout of this package: time its side of the cases against this one, on a page `against`."""
    quick: bool = False
    """Few repetitions: shows that everything runs, and gives no figure to quote."""
    fresh: bool = False
    """Measure again what the folder already has from the same code."""
    list: bool = False
    """Only name the cases."""
    report: bool = False
    """Only write the pages again, from what the folder has."""


def main(args: Args) -> int:
    """Return the exit status: 1 if a case failed."""
    console = Console()
    chosen = _chosen(args)
    if args.list:
        for case in chosen:
            console.print(f"{case.name:28} {case.title}", highlight=False)
        return 0
    if sys.platform != "linux":
        raise SystemExit("benchmarks read memory and load from /proc; run them on Linux")
    if args.threads < 1:
        raise SystemExit(f"--threads {args.threads} must be at least 1; use --threads 1")
    failed = False
    for page in ("against",) if args.against else PAGES:
        results = Results(args.out / page / f"{machine.file_name(machine.describe()['cpu'])}.json")
        cases = [case for case in chosen if args.against or case.page == page]
        if cases and not args.report:
            run(args, cases, results, console)
        if cases and (args.out / page).is_dir():
            console.print(f"Wrote {write_report(args.out / page)}.", highlight=False)
            failed |= any(case["error"] for case in results.data["cases"].values())
    return int(failed)


def _chosen(args: Args) -> list[Case]:
    """Find the cases that are asked for."""
    patterns = ",".join(args.cases or ["*"]).split(",")
    for pattern in patterns:
        if not fnmatch.filter(CASES, pattern):
            raise SystemExit(f"--cases {pattern} is no case; use some of {', '.join(CASES)}")
    found = [case for name, case in CASES.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if args.against is None:
        return found
    if not (args.against / "open_mythos" / "__init__.py").exists():
        raise SystemExit(f"--against {args.against} has no open_mythos in it; use the root of a checkout")
    usable = [case for case in found if case.measure in AGAINST]
    if args.cases and len(usable) < len(found):
        other = next(case.name for case in found if case not in usable)
        raise SystemExit(f"--cases {other} has no side of another checkout; leave it out, or leave out --against")
    return [replace(case, measure=pairs.checkout) for case in usable]


def run(args: Args, cases: list[Case], results: Results, console: Console) -> None:
    """Measure what is not there yet."""
    # Workers and weights of gigabytes are then cleared away, as after ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    against = str(args.against.resolve()) if args.against else ""
    settings = Settings(args.device, args.threads, args.quick, against)
    described = machine.describe()
    decisive = {name: described[name] for name in ("cpu", "python", "torch", "environment")}
    # No absolute path goes into a record.
    made_by = {"source": source(), **asdict(settings), **decisive, "against": commit(against) if against else ""}
    # A case that was changed is measured again.
    planned = {case.name: {"title": case.title, "protocol": case.protocol, "made_by": made_by} for case in cases}
    todo = [case for case in cases if args.fresh or not results.done(case.name, **planned[case.name])]
    console.print(f"{len(todo)} cases to measure, {len(cases) - len(todo)} already there", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        whole = progress.add_task("all", total=len(todo))
        part = progress.add_task("")
        name = ""

        def tell(what: str, done: int, of: int) -> None:
            progress.update(part, description=f"{name}: {what} {done + 1}/{of}", completed=done, total=of)

        bench = Bench(settings, tell)
        if todo:
            results.data["machine"] = described | {"limits": machine.limits(bench)}
        for case in todo:
            name = case.name
            found = measure(case, bench)
            results.put(name, tuple(CASES), planned[name] | found | {"commit": commit()})
            progress.advance(whole)
            figures = ", ".join(f"{row['value']:.3g} {row['unit']}" for row in found.get("rows", ()))
            said = f"no figure: {found['error']}" if found["error"] else f"{figures}   ({found['seconds']:.0f} s)"
            progress.console.print(f"{name:28} {said}", highlight=False)


def measure(case: Case, bench: Bench) -> dict[str, Any]:
    """Return the case's record; a failure is one, too, and leaves no figure."""
    started, load = time.time(), machine.load()
    record: dict[str, Any] = {"error": None}
    try:
        record |= plain(case.measure(case, bench))
    except Exception as error:
        traceback.print_exc()
        record["error"] = f"{type(error).__name__}: {error}".replace(f"{ROOT}/", "")
    return record | {
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "seconds": time.time() - started,
        "load": [load, machine.load()],
    }


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
