"""The commands that ask what loops are good for."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from open_mythos.cli.train import EXIT_INTERRUPTED

HOME = Path("runs/exp")


@dataclass
class ExpArgs:
    """Run an experiment and write its report. `mythos exp list` tells what there is."""

    name: Annotated[str, tyro.conf.Positional]
    quick: bool = False
    """Minutes instead of the whole protocol: to see it work, not for a claim."""
    seeds: tuple[int, ...] | None = None
    """Left out: the experiment's own; the quick form takes the first of them."""
    out: Path | None = None
    """Folder of the report; left out: runs/exp/NAME/report, or runs/exp/NAME-quick/report."""
    runs: Path | None = None
    """Folder of the runs themselves, which are not repeated; left out: runs/exp/NAME, or runs/exp/NAME-quick."""
    threads: int = 1


def exp(rest: list[str]) -> None:
    """run a published experiment, or list them"""
    args = tyro.cli(ExpArgs, prog="mythos exp", args=rest)
    from open_mythos.checks import check_choice, check_int
    from open_mythos.experiments.lab import NAMES, Lab, load, perform
    from open_mythos.train.trainer import Interrupted

    if args.name == "list":
        _list()
        return
    check_choice("name", args.name, (*NAMES, "list"))
    check_int("threads", args.threads, 1)
    folder = args.runs or HOME / (args.name + "-quick" * args.quick)
    seeds = args.seeds or load(args.name).seeds[: 1 if args.quick else None]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))} names a seed twice; name each once")
    out = args.out or folder / "report"
    lab = Lab(folder, args.quick, seeds, args.threads)
    try:
        report = perform(args.name, lab, out, f"mythos exp {shlex.join(rest)}")
    except Interrupted:
        print("mythos exp: stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    print(f"{report.finding}\nThe report is {out / 'report.html'} (also .md and .json, and the figures).")


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    from open_mythos.experiments.lab import NAMES, load

    table = Table("name", "asks", "takes, quick / whole", "last found here", show_lines=True)
    for name in NAMES:
        experiment = load(name)
        # What was found last on this machine, the whole before the quick form; a source tree also has the record.
        places = [HOME / name / "report", Path("docs/results") / name, HOME / f"{name}-quick" / "report"]
        found = next((p / "report.json" for p in places if (p / "report.json").exists()), None)
        last = "not run yet" if found is None else json.loads(found.read_text(encoding="utf-8"))["finding"]
        table.add_row(name, experiment.question, " / ".join(experiment.cost), last)
    Console().print(table)
