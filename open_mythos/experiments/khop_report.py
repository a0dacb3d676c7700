"""What the k-hop experiment's numbers say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_mythos.reports.document import Figure, Report, Table
from open_mythos.reports.figures import Curve, heat_map, stacked
from open_mythos.reports.stats import against, interval, shown

Grid = list[list[float]]
"""Accuracy by distance (outer) and loops (inner)."""
RECIPE_INJECTION = "diagonal"
PLAIN = {"plain-depth": "plain, equal depth", "plain-parameters": "plain, equal parameters"}
TEXTS = PLAIN | {"root": "diagonal, root label only", "prelude": "diagonal, one prelude layer"}
"""Arms by what they are; the others are named after their injection."""
HOPS = (8, 16, 32, 64)
"""On the cycle."""
BEYOND = (8, 16)
"""In the forest: farther than training asks."""
RIGHT = 0.9
"""What counts as answered when a number of hops is said to be reached."""
HARM = 0.02
"""A fall of accuracy that is called harm; the largest fall of a model that changes one answer is above 0 already."""


def worst_reachable(grid: Grid, distances: Sequence[int], loops: Sequence[int]) -> float:
    """The lowest accuracy among cells with at least as many loops as hops: what the model has to get right."""
    return min(a for d, row in zip(distances, grid, strict=True) for n, a in zip(loops, row, strict=True) if n >= d)


def best_unreachable(grid: Grid, distances: Sequence[int], loops: Sequence[int]) -> float:
    """The highest accuracy among cells with fewer loops than hops: the control."""
    return max(a for d, row in zip(distances, grid, strict=True) for n, a in zip(loops, row, strict=True) if n < d)


def largest_fall(grid: Grid, distances: Sequence[int], loops: Sequence[int]) -> float:
    """The most accuracy that more loops cost at any distance, from any number that is enough to any higher one."""
    falls = [0.0]
    for d, row in zip(distances, grid, strict=True):
        enough = np.array([a for n, a in zip(loops, row, strict=True) if n >= d])
        falls.append(float((np.maximum.accumulate(enough) - enough).max()))
    return max(falls)


def reach(by_hops: np.ndarray, hops: Sequence[int]) -> int:
    """The most hops such that every seed (outer) is right there and at all fewer ones; 0: none."""
    lowest = by_hops.min(0)
    return max((d for i, d in enumerate(hops) if (lowest[: i + 1] >= RIGHT).all()), default=0)


def _shown(values: np.ndarray) -> str:
    return shown(values.tolist())


class _Numbers:
    """The numbers as arrays: `forest` (seeds, distances, loops) and `cycle` (seeds, loops) by arm."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.distances: list[int] = results["distances"]
        self.loops: list[int] = results["loops"]
        self.guess: float = results["guessing"]
        self.n_symbols: int = results["n_symbols"]
        self.chance = 1 / self.n_symbols
        self.trained: int = results["trained"][1]
        self.trained_loops: int = results["trained_loops"]
        self.injections: list[str] = results["injections"]
        runs = {name: arm["runs"] for name, arm in results["arms"].items()}
        self.looped = [name for name in runs if name not in PLAIN]
        self.forest = {name: np.array([r["forest"] for r in runs[name]]) for name in runs}
        """A plain model has one column."""
        self.cycle = {name: np.array([r["cycle"]["right"] for r in runs[name]]) for name in self.looped}
        self.too_many = {name: np.array([r["cycle"]["one_before"] for r in runs[name]]) for name in self.looped}
        self.too_few = {name: np.array([r["cycle"]["one_after"] for r in runs[name]]) for name in self.looped}
        n = len(self.forest[RECIPE_INJECTION])
        self.seeds = f"{n} seed{'s' * (n > 1)}"

    def far(self, name: str, hops: int) -> np.ndarray:
        """(seeds,) accuracy in the forest, at the most loops."""
        return self.forest[name][:, self.distances.index(hops), -1]

    def falls(self, name: str) -> np.ndarray:
        return np.array([largest_fall(grid, self.distances, self.loops) for grid in self.forest[name].tolist()])


def report(results: dict[str, Any]) -> Report:
    it = _Numbers(results)
    return Report(
        _finding(it),
        [
            Figure("hops", f"Accuracy by hops, mean and 95 % interval of {it.seeds}", lambda path: _draw(it, path)),
            "## Cycle: after l loops, the l-th successor",
            f"Accuracy after as many loops as hops; chance is {it.chance:.3f}. 'Reached' is the most hops up to which "
            f"every seed is at least {RIGHT} right, of all up to {it.loops[-1]}. Intervals are 95 % over seeds.",
            _cycle(it),
            f"By kind of loop count above {it.n_symbols}, so after more than one round. After a whole number of rounds "
            "the answer is the question itself; a count that is right for such a reason would be better than primes.",
            _kinds(it),
            "Null control: the share of answers that are right for one hop more than there were loops, or one fewer, "
            "in the mean over all loops and at the loops where it is highest.",
            _off_by_one(it),
            "## Forest: the root, with enough loops and with more",
            f"With {it.loops[-1]} loops, enough for every distance; a plain model has its blocks and no more. Naming a "
            f"root of the prompt at random scores {it.guess:.3f}.",
            _forest(it),
            Figure(
                "heatmap",
                f"Accuracy by hops and loops, injection {RECIPE_INJECTION}, mean over seeds",
                lambda path: heat_map(
                    it.forest[RECIPE_INJECTION].mean(0).tolist(),
                    it.distances,
                    it.loops,
                    path,
                    f"Forests, mean of {it.seeds}; trained on 1 to {it.trained} hops, {it.trained_loops} loops at most",
                ),
            ),
            "Do more loops than needed ever hurt? The largest fall of accuracy at any distance, from any number of "
            f"loops that is enough to any higher one, by seed; harm is what lies above {HARM}. Then the control: the "
            "highest accuracy of any cell with fewer loops than hops, where the answer is out of reach; a model that "
            "names the symbol it has reached, which is no root yet, scores 0 there. And the lowest of any cell with "
            "enough loops.",
            _more_loops(it),
            "## What the recipe's choices do",
            _choices(it),
            "## What was trained",
            _trained(results),
        ],
    )


def _harm(falls: np.ndarray) -> str:
    return {"above": "they hurt", "below": "they do not hurt"}.get(against(falls, HARM), "not told")


def _finding(it: _Numbers) -> str:
    own = it.cycle[RECIPE_INJECTION]
    on_cycle = ", ".join(_shown(own[:, h - 1]) for h in HOPS)
    far = HOPS[-1]
    others = ", ".join(f"{name} {_shown(it.cycle[name][:, far - 1])}" for name in it.injections[1:])
    last = BEYOND[-1]
    twins = "; ".join(
        f"{text} {_shown(it.far(name, last))}, the difference {_shown(ahead)} {against(ahead, 0)} 0"
        for name, text in PLAIN.items()
        for ahead in [it.far(RECIPE_INJECTION, last) - it.far(name, last)]
    )
    falls = it.falls(RECIPE_INJECTION)
    return (
        f"Trained on 1 to {it.trained} hops with at most {it.trained_loops} loops, {RECIPE_INJECTION} injection names "
        f"the symbol {', '.join(map(str, HOPS[:-1]))} and {far} hops on along a cycle after as many loops with "
        f"accuracy {on_cycle}; at {far} that is {against(own[:, far - 1], it.chance)} chance ({it.chance:.3f}). Others "
        f"at {far}: {others}. In forests, with {it.loops[-1]} loops at {last} hops, it is right "
        f"{_shown(it.far(RECIPE_INJECTION, last))} of the time; twins: {twins}. The most that more loops than needed "
        f"cost it at any distance is {_shown(falls)}: {_harm(falls)}."
    )


def _draw(it: _Numbers, path: Path) -> None:
    def curve(name: str, xs: Sequence[int], values: np.ndarray, color: int) -> Curve:
        mean, low, high = zip(*(interval(column.tolist()) for column in values.T), strict=True)
        return Curve(xs, mean, TEXTS.get(name, name), color, low, high)

    def levels(share: float, last: int) -> list[Curve]:
        text = "chance; longest in training"
        return [Curve((1, last), (share, share), text, None), Curve((it.trained, it.trained), (0, 1), text, None)]

    steps = range(1, it.loops[-1] + 1)
    shown_arms = [*it.injections, *PLAIN]
    panels = {
        f"Cycle of {it.n_symbols} symbols, as many loops as hops": levels(it.chance, steps[-1])
        + [curve(name, steps, it.cycle[name], i) for i, name in enumerate(it.injections)],
        f"Forest, {it.loops[-1]} loops (plain: none)": levels(it.guess, it.distances[-1])
        + [curve(name, it.distances, it.forest[name][:, :, -1], i) for i, name in enumerate(shown_arms)],
    }
    stacked(panels, path, ("hops", "accuracy"))


def _cycle(it: _Numbers) -> Table:
    rows = [
        [
            TEXTS.get(name, name),
            *(_shown(it.cycle[name][:, h - 1]) for h in HOPS),
            f"{against(it.cycle[name][:, HOPS[-1] - 1], it.chance)} chance",
            str(reach(it.cycle[name], range(1, it.loops[-1] + 1))),
        ]
        for name in it.looped
    ]
    return Table(["", *(f"{h} hops" for h in HOPS), f"at {HOPS[-1]}", "reached"], rows)


def _kinds(it: _Numbers) -> Table:
    later = range(it.n_symbols + 1, it.loops[-1] + 1)
    primes = [n for n in later if all(n % k for k in range(2, n))]
    rounds = [n for n in later if n % it.n_symbols == 0]
    kinds = {"primes": primes, "whole rounds": rounds, "others": [n for n in later if n not in (*primes, *rounds)]}
    rows = [
        [TEXTS.get(name, name), *(_shown(it.cycle[name][:, np.array(kind) - 1].mean(1)) for kind in kinds.values())]
        for name in it.looped
    ]
    return Table(["", *(f"{name} ({len(kind)})" for name, kind in kinds.items())], rows)


def _off_by_one(it: _Numbers) -> Table:
    rows = []
    for name in it.looped:
        cells = [text for off in (it.too_few, it.too_many) for text in (off[name].mean(1), off[name].max(1))]
        rows.append([TEXTS.get(name, name), *map(_shown, cells)])
    return Table(["", "one loop too few, mean", "highest", "one loop too many, mean", "highest"], rows)


def _forest(it: _Numbers) -> Table:
    own = RECIPE_INJECTION
    rows = []
    for name in it.forest:
        behind = it.far(own, BEYOND[-1]) - it.far(name, BEYOND[-1])
        verdict = "" if name == own else f"{_shown(behind)}, {against(behind, 0)} 0"
        cells = [_shown(it.forest[name][:, i, -1]) for i in (0, it.distances.index(it.trained))]
        rows.append([TEXTS.get(name, name), *cells, *(_shown(it.far(name, h)) for h in BEYOND), verdict])
    head = ["", "1 hop", f"{it.trained} hops", *(f"{h} hops" for h in BEYOND)]
    return Table([*head, f"{own} ahead at {BEYOND[-1]} hops"], rows)


def _more_loops(it: _Numbers) -> Table:
    rows = []
    for name in it.looped:
        grids = it.forest[name].tolist()
        highest = np.array([best_unreachable(grid, it.distances, it.loops) for grid in grids])
        lowest = np.array([worst_reachable(grid, it.distances, it.loops) for grid in grids])
        falls = it.falls(name)
        rows.append([TEXTS.get(name, name), _shown(falls), _harm(falls), _shown(highest), _shown(lowest)])
    head = ["", "largest fall", "more loops than needed", "highest, loops < hops", "lowest, loops >= hops"]
    return Table(head, rows)


def _trained(results: dict[str, Any]) -> Table:
    rows = []
    for name, arm in results["arms"].items():
        sizes = [f"{arm['parameters']:,}", str(arm["blocks"]), str(arm["dim"])]
        seconds = np.mean([run["cpu_s"] for run in arm["runs"]])
        rows.append([TEXTS.get(name, name), *sizes, arm["labels"], f"{seconds:.0f}"])
    return Table(["", "parameters", "blocks", "width", "labels in training", "CPU s a run"], rows)


def _choices(it: _Numbers) -> str:
    """What undoing each choice does, and loops against blocks where both have the same labels."""
    lines = []
    hops = BEYOND[-1]
    for name, what in (
        ("root", "Without labels on the hops on the way, only the root after the last loop"),
        ("prelude", "With one prelude layer instead of none"),
    ):
        change = it.far(name, hops) - it.far(RECIPE_INJECTION, hops)
        verdict = {"above": "better", "below": "worse"}.get(against(change, 0), "not told apart")
        lines.append(
            f"- {what}: {_shown(it.far(name, hops))} in forests at {hops} hops, {_shown(change)} against the recipe: "
            f"{verdict}."
        )
    change = it.forest["root"][:, :, -1].mean(1) - it.forest["plain-depth"][:, :, -1].mean(1)
    side = {"above": "the loops are worth more", "below": "the loops are worth less"}.get(
        against(change, 0), "not told apart"
    )
    lines.append(
        "- Loops against blocks with the same labels (`root` against `plain-depth`, the mean over all distances of the "
        f"forest): {_shown(change)}: {side}."
    )
    return "\n".join(lines)
