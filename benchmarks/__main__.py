"""`python -m benchmarks`: run cases, keep what they found, and write the report."""

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
from benchmarks.bench import Bench, Settings
from benchmarks.cases import CASES, Case
from benchmarks.report import write_report
from benchmarks.results import Results, commit, plain, source


@dataclass
class Args:
    """Time this package against its peers and the machine's limits, each pair in turns, and write the report."""

    cases: tuple[str, ...] = ()
    """Names of cases, with spaces or commas between; none: all."""
    out: Path = Path("docs/results/performance")
    """Folder for results.json and figures; the report stands beside it, under the folder's name."""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    """Threads of each worker; one worker computes at a time."""
    quick: bool = False
    """Few repetitions: shows that everything runs, and gives no figure to quote."""
    fresh: bool = False
    """Measure again what the folder already holds from the same code."""
    list: bool = False
    """Only name the cases."""
    report: bool = False
    """Only write the report again, from what the folder holds."""


def main(args: Args) -> int:
    """The exit status: 1 if a case failed."""
    console = Console()
    args = replace(args, cases=tuple(name for given in args.cases for name in given.split(",")))
    if args.list:
        for case in CASES.values():
            console.print(f"{case.name:28} {case.title}", highlight=False)
        return 0
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        raise SystemExit(f"--cases {unknown[0]} is no case; use some of {', '.join(CASES)}")
    if sys.platform != "linux":
        raise SystemExit("benchmarks read memory and load from /proc; run them on Linux")
    if args.threads < 1:
        raise SystemExit(f"--threads {args.threads} must be at least 1; use --threads 1")
    results = Results(args.out)
    if not args.report:
        run(args, results, console)
    console.print(f"Wrote {write_report(results, args.out)}.", highlight=False)
    return int(any(case["error"] for case in results.data["cases"].values()))


def run(args: Args, results: Results, console: Console) -> None:
    """Measure what is not there yet."""
    # Workers and weights of gigabytes are then cleared away, as after ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = Settings(args.device, args.threads, args.quick)
    described = machine.describe()
    made_by = {"source": source(), **asdict(settings), **{name: described[name] for name in machine.DECISIVE}}
    wanted = [CASES[name] for name in args.cases or CASES]
    todo = [case for case in wanted if args.fresh or not results.done(case.name, **planned(case), made_by=made_by)]
    console.print(f"{len(todo)} cases to measure, {len(wanted) - len(todo)} already there", highlight=False)
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
            results.put(name, tuple(CASES), planned(case) | found | {"commit": commit(), "made_by": made_by})
            progress.advance(whole)
            progress.console.print(_line(name, found), highlight=False)


def planned(case: Case) -> dict[str, Any]:
    """What a record says of the case itself; a case that was changed is measured again."""
    return {"title": case.title, "protocol": case.protocol}


def measure(case: Case, bench: Bench) -> dict[str, Any]:
    """The case's record; a failure is one, too, and leaves no figure."""
    started, load = time.time(), machine.load()
    record: dict[str, Any] = {"error": None}
    try:
        record |= plain(case.run(bench))
    except Exception as error:
        traceback.print_exc()
        record["error"] = f"{type(error).__name__}: {error}"
    return record | {
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "seconds": time.time() - started,
        "load": [load, machine.load()],
    }


def _line(name: str, found: dict[str, Any]) -> str:
    if found["error"]:
        return f"{name:28} no figure: {found['error']}"
    figures = ", ".join(f"{row['value']:.3g} {row['unit']}" for row in found["rows"])
    return f"{name:28} {figures}   ({found['seconds']:.0f} s)"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
