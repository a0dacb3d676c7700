"""The command `mythos exp`, which runs, lists and shows the experiments."""

import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from open_mythos import experiments
from open_mythos.checks import PositiveInt, check_choice
from open_mythos.cli.train import EXIT_INTERRUPTED

HOME = Path("runs/exp")


@dataclass
class Exp:
    """Run an experiment and write its report. `mythos exp list` has a line for each experiment; `mythos exp show NAME`
    has the protocol, the arms and the finding of one."""

    name: Annotated[str, tyro.conf.Positional]
    """An experiment, or list, or show."""
    shown: Annotated[str, tyro.conf.Positional] = ""
    """The experiment to show."""
    quick: bool = False
    """Minutes instead of the whole protocol: to see it work, not for a claim."""
    seeds: tuple[int, ...] | None = None
    """Left out: the experiment's own; the quick form takes the first of them."""
    out: Path | None = None
    """Folder of the report; left out: runs/exp/NAME/report, or runs/exp/NAME-quick/report."""
    runs: Path | None = None
    """Folder of the runs themselves, which are not repeated; left out: runs/exp/NAME, or runs/exp/NAME-quick."""
    threads: PositiveInt = 1

    def __post_init__(self) -> None:
        check_choice("name", self.name, (*experiments.EXPERIMENTS, "list", "show"))
        if self.name == "show":
            check_choice("shown", self.shown, [*experiments.EXPERIMENTS])
        elif self.shown:
            raise ValueError(f"{self.shown!r} follows {self.name}; leave it out, or use show {self.shown}")
        seeds = self.seeds or ()
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"--seeds {' '.join(map(str, seeds))} names a seed twice; name each once")

    def run(self, rest: list[str]) -> None:
        """run a published experiment, or list them"""
        if self.name == "list":
            return _list()
        if self.name == "show":
            return _show(self.shown)
        from open_mythos.experiments.study import Lab, load, perform
        from open_mythos.train.trainer import Interrupted

        folder = self.runs or HOME / (self.name + "-quick" * self.quick)
        experiment, out = load(self.name), self.out or folder / "report"
        time = experiment.cost[0 if self.quick else 1]
        print(f"{experiment.title}: about {time} on one CPU core as measured.", flush=True)
        seeds = self.seeds or experiment.seeds[: 1 if self.quick else None]
        lab = Lab(folder, self.quick, seeds, self.threads)
        try:
            report = perform(self.name, lab, out, f"mythos exp {shlex.join(rest)}")
        except Interrupted:
            print("mythos exp: stopped; the same command goes on from here", file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED) from None
        print(f"{report.finding}\nThe report is {out / 'report.html'} (also .md and .json, and the figures).")


def _list() -> None:
    """Print one line for each experiment, cut to the terminal's width, with 80 characters of its finding."""
    from rich.console import Console

    from open_mythos.experiments.study import load

    console = Console(highlight=False)
    for name in experiments.EXPERIMENTS:
        experiment = load(name)
        finding = textwrap.shorten(_found(name)[0], 80, placeholder=" ...")
        line = f"{name:12s}{' / '.join(experiment.cost):16s} {experiment.question} {finding}"
        console.print(line, no_wrap=True, overflow="ellipsis", markup=False)
    console.print("\nname, time of the quick form / the whole, question, finding", soft_wrap=True)
    console.print("Protocol, arms and finding of one: mythos exp show NAME", soft_wrap=True)


def _show(name: str) -> None:
    """Print the question, cost, arms, finding and protocol of one experiment."""
    from rich.console import Console

    from open_mythos.experiments.study import load

    experiment, (finding, place) = load(name), _found(name)
    titles, console = experiment.titles, Console(highlight=False)
    for text in (
        experiment.title,
        f"Question: {experiment.question}",
        f"Takes: {experiment.cost[0]} in the quick form, {experiment.cost[1]} in all, on one CPU core",
        f"Seeds: {' '.join(map(str, experiment.seeds))}",
        "Arms: " + "; ".join(f"{arm} ({titles[arm]})" if arm in titles else arm for arm in experiment.arms(False)),
        f"Finding: {finding}" + (f" ({place})" if place else ""),
        experiment.text("Protocol"),
    ):
        console.print(f"{text}\n", markup=False)
    console.print(f"Run it: mythos exp {name} --quick\n", markup=False, soft_wrap=True)


def _found(name: str) -> tuple[str, Path | None]:
    """Return the last finding on this machine, rather of the whole than the quick form, and where its report is."""
    from open_mythos.experiments.study import MAX_RESULT_BYTES
    from open_mythos.files import read_json

    # A source tree also has the record.
    for folder in (HOME / name / "report", Path("docs/results") / name, HOME / f"{name}-quick" / "report"):
        if (folder / "report.json").exists():
            report = read_json(folder / "report.json", MAX_RESULT_BYTES)
            if not isinstance(finding := report.get("finding") if isinstance(report, dict) else None, str):
                raise ValueError(f"{folder / 'report.json'} has no finding; run mythos exp {name} again, or remove it")
            return finding, folder
    return "not run yet", None
