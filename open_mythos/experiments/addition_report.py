"""What the addition runs say: tables beside the published ones, two figures, verdicts that follow from intervals."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_mythos.reports.document import Figure, Part, Report, Table
from open_mythos.reports.figures import Curve, stacked
from open_mythos.reports.stats import against, interval, shown

Result = dict[str, Any]

PUBLISHED = {
    2: (0.38, 0.53, 1.00, 0.98, 0.91, 0.62),
    3: (0.19, 0.50, 1.00, 0.98, 0.91, 0.65),
    4: (0.09, 0.16, 1.00, 0.94, 0.75, 0.45),
}
"""Exact match by digits at 1, 2, 4, 8, 16, 32 loops: one model for 2 to 5 digits, dim 256, mean of 4 seeds."""
PUBLISHED_COSINES = {
    2: (0.711, 0.961, 0.985, 0.993, 0.999, 0.9995, 0.9995),
    3: (0.726, 0.967, 0.986, 0.992, 0.999, 0.9996, 0.9996),
    4: (0.745, 0.957, 0.977, 0.986, 0.998, 0.9992, 0.999),
}
"""Of the states after loops t and t - 1, by digits at the t of COSINES_AT."""
COSINES_AT = (1, 2, 3, 4, 8, 16, 32)
GOAL = 0.99
COLLAPSE = 0.1
"""A fall of exact match, surely larger than this, is called a collapse."""


def report(results: Result) -> Report:
    """The report of `addition`."""
    return Report(_finding(results), [*_answers(results), *_tables(results), *_details(results)])


def cells(results: Result, arm: str, digits: int) -> np.ndarray:
    """(seeds, loops) exact match."""
    return np.array([run["accuracy"][str(digits)] for run in results["runs"][arm]])


def trained_on(results: Result, arm: str) -> list[int]:
    """The numbers of digits that an arm was trained on."""
    return [int(d) for d in results["runs"][arm][0]["accuracy"]]


def deep_cells(results: Result, arm: str) -> np.ndarray:
    """(seeds, cells): every number of digits at 4 loops and more."""
    first = results["loops"].index(4)
    return np.concatenate([cells(results, arm, d)[:, first:] for d in trained_on(results, arm)], axis=1)


def holds(results: Result, arm: str) -> str:
    """Whether every cell at 4 loops and more reaches the goal in the mean over seeds."""
    values = deep_cells(results, arm)
    word = "hold" if values.mean(0).min() >= GOAL else "do not hold"
    return (
        f"the cells at 4 to {results['loops'][-1]} loops {word} {GOAL} (lowest {values.mean(0).min():.3f} in the mean "
        f"of {_seeds(len(values))}, {values.min():.3f} in a single run)"
    )


def fall(results: Result, arm: str) -> tuple[str, str]:
    """What exact match does from 4 loops to the most, as a word and in numbers, on 2 and 3 digits together."""
    four, most = (np.mean([cells(results, arm, d)[:, i] for d in (2, 3)], axis=0) for i in (_at(results, 4), -1))
    numbers = f"{shown(four)} at 4 loops, {shown(most)} at {results['loops'][-1]}"
    if four.mean() < 0.5:
        return "has not learned the task", numbers
    mean, low, high = interval(four - most)
    if math.isnan(low):
        return f"changes by {-mean:+.3f} in its one run", numbers
    if low > 0:
        return ("collapses" if low > COLLAPSE else "falls"), numbers
    if high < 0:
        return "rises", numbers
    if max(-low, high) < COLLAPSE:
        return "stays", numbers
    fell = int((four - most > COLLAPSE).sum())
    return f"falls by more than {COLLAPSE} in {fell} of {_seeds(len(four))}, too mixed for an interval to tell", numbers


def click(run: Result) -> int | None:
    """Steps at the first evaluation in training that reaches the goal at 4 loops."""
    return next((step for step, accuracy in run["curve"] if accuracy >= GOAL), None)


def _finding(results: Result) -> str:
    (fixed, fixed_numbers), (published, published_numbers) = (fall(results, arm) for arm in ("fixed", "published"))
    held = holds(results, "sampled")
    return (
        f"Trained at sampled depth, {held}. Its twin at fixed depth 4 {fixed}: {fixed_numbers}. The published "
        f"architecture and protocol at this size {published}: {published_numbers}."
    )


def _answers(results: Result) -> list[Part]:
    title = {name: arm["title"] for name, arm in results["arms"].items()}
    low = [
        [f"{loops}", f"{d}", f"{PUBLISHED[d][i]:.2f}", shown(values), against(values, PUBLISHED[d][i])]
        for i, loops in enumerate(results["loops"][:2])
        for d in (2, 3)
        for values in [cells(results, "sampled", d)[:, i].tolist()]
    ]
    words = [[title[arm], *fall(results, arm)] for arm in results["runs"]]
    return [
        "## What it says",
        Figure("loops", "Exact match by loops; bands are 95 % intervals over seeds", lambda p: _draw_loops(results, p)),
        f"A cell is the exact match on {results['rows']} fresh problems of one number of digits. *Falls* and *rises* "
        "stand where the 95 % interval of the change over seeds leaves out 0, *collapses* where all of it is beyond "
        f"{COLLAPSE}, *stays* where it has 0 and nothing beyond {COLLAPSE}; on 2 and 3 digits "
        "together. (An interval of Student's t may reach beyond 1.)",
        Table(["arm", "beyond 4 loops it", "exact match"], words),
        "\n".join(f"- {title[arm].capitalize()}: {holds(results, arm)}." for arm in results["runs"]),
        f"With fewer loops than the mean of training, {title['sampled']} against the published figure:",
        Table(["loops", "digits", "published", title["sampled"], "it is"], low),
    ]


def _tables(results: Result) -> list[Part]:
    """Exact match and cosines, ours beside the published."""
    parts: list[Part] = [
        "## Beside the published table",
        "The published figures are of one model of twice the width (dim 256, 3.4 million parameters) for 2 to 5 "
        "digits, 30,000 steps, the mean of 4 seeds, 500 problems per cell; ours with 95 % intervals over seeds. "
        "5 digits were not run here.",
    ]
    for d in PUBLISHED:
        names = [arm for arm in results["runs"] if d in trained_on(results, arm)]
        rows = [
            [str(loops), f"{PUBLISHED[d][i]:.2f}", *(shown(cells(results, arm, d)[:, i].tolist()) for arm in names)]
            for i, loops in enumerate(results["loops"])
        ]
        parts += [f"### {d} digits", Table(["loops", "published", *_titles(results, names)], rows)]
    parts += [
        "## Does the state come to rest?",
        "Mean cosine of the states after loops t and t - 1 where the answer is predicted, "
        f"{results['cosine_rows']} problems, no token halted; the state before the first loop is the prelude's output "
        "in the published architecture, and zero, which has no direction, in ours.",
    ]
    for d in PUBLISHED_COSINES:
        names = [arm for arm in results["runs"] if d in trained_on(results, arm)]
        rows = [
            [str(t), f"{PUBLISHED_COSINES[d][i]:.4g}", *(_cosine(results, arm, d, t) for arm in names)]
            for i, t in enumerate(COSINES_AT)
        ]
        parts += [f"### {d} digits, cosines", Table(["t", "published", *_titles(results, names)], rows)]
    return parts


def _details(results: Result) -> list[Part]:
    rows, costs = [], []
    for arm, runs in results["runs"].items():
        for run in runs:
            values = np.array([run["accuracy"][str(d)] for d in trained_on(results, arm)])
            deep = values[:, _at(results, 4) :]
            rows.append(
                [
                    results["arms"][arm]["title"], str(run["seed"]), str(click(run) or "never"),
                    " / ".join(f"{x:.3f}" for x in deep[:, 0]), " / ".join(f"{x:.3f}" for x in deep[:, -1]),
                    f"{deep.min():.3f}", f"{run['cpu_s']:.0f}",
                ]
            )  # fmt: skip
        cfg = runs[0]["asked"]["config"]
        loops = f"{cfg['loops']['law']}, mean {cfg['loops']['mean']:g}"
        costs.append(
            [
                results["arms"][arm]["title"], f"{results['arms'][arm]['parameters']:,}", f"{cfg['steps']:,}", loops,
                cfg["model"]["injection"], cfg["model"]["halting"], cfg["optim"]["kind"],
                f"{np.mean([run['cpu_s'] for run in runs]):.0f}",
            ]
        )  # fmt: skip
    used = [
        f"{results['arms'][arm]['title']}: {used[_at(results, 4)]:.2f} of 4 loops, {used[-1]:.2f} of "
        f"{results['loops'][-1]}"
        for arm, runs in results["runs"].items()
        if runs[0]["asked"]["config"]["model"]["halting"] != "none"
        for used in [np.mean([run["used"]["3"] for run in runs], axis=0)]
    ]
    return [
        "## When it clicks",
        Figure("training", "Exact match at 4 loops over training, each seed", lambda p: _draw_training(results, p)),
        f"*Clicks* is the first evaluation in training (512 problems of all its numbers of digits, 4 loops) at {GOAL} "
        "or more; exact match by number of digits, from 2.",
        Table(
            ["arm", "seed", "clicks at step", "at 4 loops", f"at {results['loops'][-1]}", "lowest from 4", "CPU s"],
            rows,
        ),
        "## The arms",
        Table(["arm", "parameters", "steps", "depth", "injection", "halting", "optimizer", "CPU s"], costs),
        f"Loops that a token of a 3-digit answer really runs under ACT: {'; '.join(used)}.",
        _seen(results),
    ]


def _seen(results: Result) -> str:
    """How much of what is asked was met in training."""
    cfg = results["runs"]["sampled"][0]["asked"]["config"]
    draws = cfg["steps"] * cfg["batch_size"] / 2
    shares = {d: -math.expm1(-draws / (9 * 10 ** (d - 1)) ** 2) for d in (2, 3)}
    return (
        f"Problems are drawn anew, not held out: of the 8,100 of 2 digits {_seeds(cfg['steps'], 'step')} show "
        f"{shares[2]:.0%}, of the 810,000 of 3 digits {shares[3]:.1%}. So 3 digits ask for the rule, 2 could be known "
        "by heart; the published protocol draws alike."
    )


def _draw_loops(results: Result, path: Path) -> None:
    loops, names = results["loops"], list(results["runs"])
    panels: dict[str, list[Curve]] = {}
    for d in PUBLISHED:
        curves = [Curve(loops, PUBLISHED[d], "as published, dim 256", color=None)]
        for i, arm in enumerate(names):
            if d in trained_on(results, arm):
                mean, low, high = zip(*(interval(column) for column in cells(results, arm, d).T), strict=True)
                curves.append(Curve(loops, mean, results["arms"][arm]["title"], i, low, high))
        panels[f"{d} digits"] = curves
    stacked(panels, path, ("loops", "exact match"), loops)


def _draw_training(results: Result, path: Path) -> None:
    panels = {}
    for arm, runs in results["runs"].items():
        curves = [
            Curve([step for step, _ in run["curve"]], [share for _, share in run["curve"]], f"seed {run['seed']}", i)
            for i, run in enumerate(runs)
        ]
        last = runs[0]["curve"][-1][0]
        panels[results["arms"][arm]["title"]] = [Curve((0, last), (GOAL, GOAL), str(GOAL), color=None), *curves]
    stacked(panels, path, ("steps", "exact match at 4 loops"))


def _at(results: Result, loops: int) -> int:
    return results["loops"].index(loops)


def _titles(results: Result, names: Sequence[str]) -> list[str]:
    return [results["arms"][name]["title"] for name in names]


def _cosine(results: Result, arm: str, digits: int, t: int) -> str:
    values = [run["cosine"][str(digits)][t - 1] for run in results["runs"][arm]]
    return "none" if None in values else shown(values, ".4f")


def _seeds(n: int, what: str = "seed") -> str:
    return f"{n:,} {what}{'s' * (n > 1)}"
