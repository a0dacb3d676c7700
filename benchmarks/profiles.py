"""Where our time goes, by torch's operators: python -m benchmarks.profiles CASE... [--out FILE].

For the cases that compare a task with 0.5.0. The profiler itself slows small operators down: its shares mean more than
its times.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from benchmarks.case import Case, commit
from benchmarks.cases import CASES
from benchmarks.cases.pairs import pair
from benchmarks.page import table
from benchmarks.sides import ours
from benchmarks.tasks import TASKS

RUNS, WARM_UP, SHOWN = 5, 5, 12
PRODUCTS = ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::bmm", "aten::mv", "aten::addmv_")


@dataclass
class Args:
    """Profile tasks of ours."""

    cases: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Names of cases, as `python -m benchmarks --list` gives them."""
    out: Path = Path("docs/results/performance/profiles.md")


def profile_of(case: Case) -> str:
    """Write a Markdown section with the operators that take longest."""
    job = replace(case.job, **case.ours)
    task: Any = TASKS[job.task]
    task = task(job, ours, ours.make(job))
    for _ in range(WARM_UP):
        task.run(task.fresh())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(RUNS):
            task.run(task.fresh())
    # A graph that torch.compile made appears as one entry with the kernels that it fused.
    found = [e for e in profiler.key_averages() if e.self_cpu_time_total]
    total = sum(e.self_cpu_time_total for e in found)
    calls = sum(e.count for e in found if e.key.startswith(("aten::", "mkldnn::"))) / RUNS
    products = sum(e.self_cpu_time_total for e in found if e.key in PRODUCTS) / total
    rows = []
    for e in sorted(found, key=lambda e: -e.self_cpu_time_total)[:SHOWN]:
        ms = e.self_cpu_time_total / RUNS / 1e3
        share = f"{e.self_cpu_time_total / total:.1%}"
        rows.append((f"`{e.key[:60]}`", f"{e.count / RUNS:,.0f}", f"{ms:.2f}", share))
    summary = f"{total / RUNS / 1e3:.1f} ms in {calls:,.0f} calls of operators; matrix products take {products:.0%}."
    title = f"## {case.title} (`{case.name}`)"
    return "\n".join([title, "", summary, "", *table(("operator", "calls", "ms", "share"), rows)]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Profile the cases that are named, and write the page."""
    args = tyro.cli(Args, args=arguments)
    torch.set_num_threads(1)
    pairs = {name: case for name, case in CASES.items() if case.measure is pair}
    if not args.cases or set(args.cases) - set(pairs):
        raise SystemExit(f"cases={args.cases} must name some of {', '.join(pairs)}")
    command = f"python -m benchmarks.profiles {' '.join(args.cases)}"
    title = f"# Profiles\n\nBy `{command}` at commit {commit()}, one thread.\n"
    args.out.write_text("\n".join([title, *(profile_of(pairs[name]) for name in args.cases)]), "utf-8")
    print(f"Wrote {args.out}.")


if __name__ == "__main__":
    main()
