"""What the bracket experiment's numbers say."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from open_mythos.experiments.study import Result
from open_mythos.reports.document import Figure, Part, Report, Table
from open_mythos.reports.figures import Curve, stacked
from open_mythos.reports.stats import against, interval, rank_correlation, shown

READ_AT = (1, 2, 3, 4, 6, 8, 12, 16)
ARMS = {"sampled": "sampled depth", "fixed": "fixed depth 4"}
PLAIN = {"deep": "plain, 5 blocks", "small": "plain, 2 blocks"}
TASKS = {"parity": "parity of 8 bits", "addition": "addition", "brackets": "brackets that break"}
DEEPEST = 6
LEARNED = 0.5
"""Share right at the last loop, mean over seeds, below which a task's settling says nothing."""


def report(results: Result) -> Report:
    """Accuracy by nesting and loops, correlations, and the tasks of the mixed model."""
    runs = results["runs"]
    found = correlations(runs["sampled"])
    at_place, null = found["given place"], found["null"]
    said = direction(at_place)
    finding = (
        f"Rank correlation of the loop that settles a broken string with its nesting, at equal length and place of the "
        f"break: {shown(at_place, '+.2f')}: {said}. {_tasks_differ(runs['mixed'])}"
    )
    loops = results["loops"]
    parts: list[Part] = [
        Figure(
            "brackets",
            f"Broken strings of {results['length']} brackets by nesting: share of rows right, mean and 95 % interval.",
            lambda path: _by_nesting(runs, loops, path),
        ),
        f"## Does nesting need loops?\n\nOver broken strings that settle within {loops} loops. The null "
        "control puts the kind of the first bracket in the place of nesting; it comes to "
        f"{shown(null, '+.2f')} ({_null(null)}).",
        Table(
            ("rank correlation with the settling loop", *ARMS.values()),
            [
                (title, *(shown(correlations(runs[arm])[key], "+.2f") for arm in ARMS))
                for key, title in {
                    "raw": "nesting",
                    "given place": "nesting, place of the break fixed",
                    "place": "place of the break, nesting fixed",
                    "null": "first bracket's kind, place fixed (null control)",
                }.items()
            ],
        ),
        "Mean loop at which broken strings settle, and the share that never does, by nesting (sampled depth):",
        Table(("nesting", "settles at loop", "never settles"), _settling(runs["sampled"])),
        "## Accuracy on broken strings by nesting",
        Table(
            ("nesting", *(f"{ARMS[a]}, {n} loops" for a in ARMS for n in (1, 4, 16)), *PLAIN.values()),
            [(str(d), *_accuracies(runs, d)) for d in _depths(runs["sampled"])],
        ),
        f"Mean over nestings, less sampled depth at {loops} loops: {_less_sampled(runs, loops)}.",
        f"Parameters: {', '.join(f'{name} {n:,}' for name, n in results['parameters'].items())}. Balanced strings are "
        f"right {shown(_balanced(runs['sampled'], 0), '.2f')} of the time after 1 loop and "
        f"{shown(_balanced(runs['sampled'], -1), '.2f')} after {loops}: what is said without looking is right there.",
        "## One model, three tasks",
        Figure("mixed", "The mixed model: share of rows right.", lambda path: _by_task(runs["mixed"], loops, path)),
        Table(
            ("task", "settles at loop", "never settles", f"right at {loops} loops"),
            [
                (
                    TASKS[name],
                    shown([settling_loop(run["tasks"][name]["settled"]) for run in runs["mixed"]], ".2f"),
                    shown([_never(run["tasks"][name]["settled"]) for run in runs["mixed"]], ".2f"),
                    shown([run["tasks"][name]["right"][-1] for run in runs["mixed"]], ".2f"),
                )
                for name in TASKS
            ],
        ),
        Table(
            ("settling loop, within each seed", "difference"),
            [(f"{TASKS[a]} less {TASKS[b]}", shown(d, "+.2f")) for (a, b), d in _differences(runs["mixed"])],
        ),
    ]
    return Report(finding, parts)


def correlations(runs: list[Result]) -> dict[str, list[float]]:
    """By seed, over broken rows that settle."""
    found: dict[str, list[float]] = {"raw": [], "given place": [], "place": [], "null": []}
    for run in runs:
        rows = {name: np.array(values) for name, values in run["rows"].items()}
        which = (rows["place"] >= 0) & (rows["settled"] > 0)
        loop, nested, place, kind = (rows[name][which].tolist() for name in ("settled", "nesting", "place", "kind"))
        found["raw"].append(rank_correlation(loop, nested))
        found["given place"].append(rank_correlation(loop, nested, place))
        found["place"].append(rank_correlation(loop, place, nested))
        found["null"].append(rank_correlation(loop, kind, place))
    return found


def direction(correlation: Sequence[float]) -> str:
    """What the interval over seeds says of a correlation."""
    none = int(np.isnan(correlation).sum())
    if none:
        return f"no correlation can be had where all settle at one loop, as in {none} of {len(correlation)} seeds"
    words = {
        "above": "what is nested deeper settles later",
        "below": "what is nested deeper settles earlier",
        "not told apart from": "no order that the seeds agree on",
    }
    return words.get(against(correlation, 0), "one seed, so no interval")


def _null(values: Sequence[float]) -> str:
    if np.isnan(values).any():
        return "not to be had in each seed"
    words = {"not told apart from": "as it should", "one seed, so not told apart from": "one seed, so no interval"}
    return words.get(against(values, 0), "it should be 0: the rest is in doubt")


def settling_loop(counts: Sequence[int]) -> float:
    """Mean over the rows that settle; `counts` has those that never do first. NaN where none does."""
    settles = np.array(counts[1:])
    return float(settles @ np.arange(1, len(counts)) / settles.sum()) if settles.sum() else float("nan")


def _never(counts: Sequence[int]) -> float:
    return counts[0] / sum(counts)


def _learned(runs: list[Result]) -> list[str]:
    return [name for name in TASKS if np.mean([run["tasks"][name]["right"][-1] for run in runs]) >= LEARNED]


def _differences(runs: list[Result]) -> list[tuple[tuple[str, str], list[float]]]:
    """By pair of tasks that were learned, by seed."""

    def of(run: Result, name: str) -> float:
        return settling_loop(run["tasks"][name]["settled"])

    return [((a, b), [of(run, a) - of(run, b) for run in runs]) for a, b in itertools.combinations(_learned(runs), 2)]


def _tasks_differ(runs: list[Result]) -> str:
    learned = _learned(runs)
    if len(learned) < 2:
        return "One model of three tasks did not learn two of them, so their loops cannot be compared."
    means = ", ".join(
        f"{TASKS[name]} {shown([settling_loop(run['tasks'][name]['settled']) for run in runs], '.1f')}"
        for name in learned
    )
    sides = [against(d, 0) for _, d in _differences(runs)]
    apart = sum(side in ("above", "below") for side in sides)
    verdict = "one seed, so no interval" if len(runs) < 2 else f"{apart} of {len(sides)} pairs of tasks differ"
    left_out = "".join(f"; {TASKS[name]} was not learned" for name in TASKS if name not in learned)
    return f"In one model of three tasks rows settle after this many loops: {means}; {verdict}{left_out}."


def _depths(runs: list[Result]) -> list[int]:
    """Nestings of the figure and the tables. A few strings have others, as the bracket that was replaced counts too."""
    depths = set.intersection(*(set(map(int, run["right"]["broken"])) for run in runs))
    return sorted(depths & set(range(1, DEEPEST + 1)))


def _shares(runs: list[Result], depth: int, loops: int) -> list[float]:
    """By seed: share of broken strings of a nesting that is right; a plain model is the same at any loops."""
    found = [run["right"]["broken"][str(depth)] for run in runs]
    return [shares[min(loops, len(shares)) - 1] for shares in found]


def _accuracies(runs: Result, depth: int) -> list[str]:
    looped = [shown(_shares(runs[arm], depth, n), ".2f") for arm in ARMS for n in (1, 4, 16)]
    return looped + [shown(_shares(runs[arm], depth, 1), ".2f") for arm in PLAIN]


def _less_sampled(runs: Result, loops: int) -> str:
    """What the plain twins, and the one at fixed depth, read more of the broken strings, within each seed."""
    depths = _depths(runs["sampled"])

    def mean(arm: str) -> np.ndarray:
        return np.mean([_shares(runs[arm], depth, loops) for depth in depths], axis=0)

    gaps = {title: mean(arm) - mean("sampled") for arm, title in ({"fixed": ARMS["fixed"]} | PLAIN).items()}
    return "; ".join(f"{title} {shown(gap.tolist(), '+.3f')}, {against(gap, 0)} 0" for title, gap in gaps.items())


def _balanced(runs: list[Result], loop: int) -> list[float]:
    """By seed: mean over nestings."""
    return [float(np.mean([shares[loop] for shares in run["right"]["balanced"].values()])) for run in runs]


def _settling(runs: list[Result]) -> list[tuple[str, str, str]]:
    lines = []
    for depth in _depths(runs):
        loops, never = [], []
        for run in runs:
            rows = {name: np.array(values) for name, values in run["rows"].items()}
            counts = np.bincount(rows["settled"][(rows["place"] >= 0) & (rows["nesting"] == depth)], minlength=2)
            loops.append(settling_loop(counts.tolist()))
            never.append(_never(counts.tolist()))
        lines.append((str(depth), shown(loops, ".2f"), shown(never, ".2f")))
    return lines


def _by_nesting(runs: Result, n_loops: int, path: Path) -> None:
    loops = [n for n in READ_AT if n <= n_loops]
    panels: dict[str, list[Curve]] = {}
    for arm, title in ARMS.items():
        panels[title] = []
        for color, depth in enumerate(_depths(runs[arm])):
            mean, low, high = zip(*(interval(_shares(runs[arm], depth, n)) for n in loops), strict=True)
            panels[title].append(Curve(loops, mean, f"nesting {depth}", color, low, high))
    level = float(np.mean([_shares(runs["deep"], depth, 1) for depth in _depths(runs["deep"])]))
    for curves in panels.values():
        curves.append(Curve((loops[0], loops[-1]), (level, level), f"{PLAIN['deep']}, mean of nestings", None))
    stacked(panels, path, ("loops", "right"), loops)


def _by_task(runs: list[Result], n_loops: int, path: Path) -> None:
    loops = [n for n in READ_AT if n <= n_loops]
    curves = []
    for color, (name, title) in enumerate(TASKS.items()):
        values = ([run["tasks"][name]["right"][n - 1] for run in runs] for n in loops)
        mean, low, high = zip(*map(interval, values), strict=True)
        curves.append(Curve(loops, mean, title, color, low, high))
    stacked({"mixed": curves}, path, ("loops", "right"), loops)
