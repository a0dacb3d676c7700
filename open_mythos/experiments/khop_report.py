"""What the k-hop experiment's numbers say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_mythos.experiments.record import Figure, Report, Table, interval, shown
from open_mythos.plots import heat_map, interval_curves

Grid = list[list[float]]
"""Accuracy by distance (outer) and loops (inner)."""
PLAIN = {"plain-depth": "plain, equal depth", "plain-parameters": "plain, equal parameters"}
TEXTS = PLAIN | {"root": "diagonal, root label only", "prelude": "diagonal, one prelude layer"}
"""Arms by what they are; the others are named after their injection."""
RIGHT = 0.9
"""What counts as answered when a distance is said to be reached."""


def worst_reachable(grid: Grid, distances: Sequence[int], loops: Sequence[int]) -> float:
    """The lowest accuracy among cells with at least as many loops as hops: what the model has to get right."""
    return min(a for d, row in zip(distances, grid, strict=True) for n, a in zip(loops, row, strict=True) if n >= d)


def best_unreachable(grid: Grid, distances: Sequence[int], loops: Sequence[int]) -> float:
    """The highest accuracy among cells with fewer loops than hops: the control."""
    return max(a for d, row in zip(distances, grid, strict=True) for n, a in zip(loops, row, strict=True) if n < d)


def against(values: np.ndarray, level: float) -> str:
    """Which side of a level the interval of the mean lies on; one seed has no interval, and tells nothing."""
    _, low, high = interval(values.tolist())
    return "above" if low > level else "below" if high < level else "not told apart from"


def _shown(values: np.ndarray) -> str:
    return shown(values.tolist())


def reach(grids: np.ndarray, distances: Sequence[int]) -> int:
    """The farthest distance such that every seed is right at the most loops there and at all nearer ones; 0: none."""
    lowest = grids[:, :, -1].min(0)
    return max((d for i, d in enumerate(distances) if (lowest[: i + 1] >= RIGHT).all()), default=0)


def report(results: dict[str, Any]) -> Report:
    distances, loops, guess = results["distances"], results["loops"], results["guessing"]
    injections = results["injections"]
    # (seeds, distances, loops); a plain model has one column.
    grids = {name: np.array([r["accuracy"] for r in arm["runs"]]) for name, arm in results["arms"].items()}
    # Over all that has to be right, not one cell, which luck could choose.
    enough = np.array(loops)[None] >= np.array(distances)[:, None]
    best = max(injections, key=lambda name: grids[name][:, enough].mean())
    trained = f"{results['trained'][0]} to {results['trained'][1]} hops"
    seeds = f"{len(grids[best])} seed{'s' * (len(grids[best]) > 1)}"

    def draw_hops(path: Path) -> None:
        shares = {name: grids[name][:, :, -1].T for name in (*injections, *PLAIN)}
        curves = {
            TEXTS.get(name, name): [interval(column.tolist()) for column in columns] for name, columns in shares.items()
        }
        interval_curves(
            curves,
            distances,
            path,
            ("hops from the question to the answer", "accuracy"),
            f"{loops[-1]} loops; trained on {trained}",
            {"naming a root at random": guess},
            (distances[0], results["trained"][1]),
        )

    def draw_map(path: Path) -> None:
        title = f"Injection {best}, mean of {seeds}; trained on {trained}"
        heat_map(grids[best].mean(0).tolist(), distances, loops, path, title)

    far = {name: grids[name][:, -1, -1] for name in grids}
    ahead = {name: far[best] - far[name] for name in PLAIN}
    twins = "; ".join(
        f"{text} {_shown(far[name])}, the difference {_shown(ahead[name])} {against(ahead[name], 0)} 0"
        for name, text in PLAIN.items()
    )
    reached = reach(grids[best], distances)
    right = f"every seed is at least {RIGHT} right up to {reached} hops" if reached else "no distance is reached"
    others = ", ".join(f"{name} {_shown(far[name])}" for name in injections if name != best)
    finding = (
        f"Trained on {trained} and given {loops[-1]} loops, the best injection, {best}, answers {_shown(far[best])} of "
        f"questions of {distances[-1]} hops, {against(far[best], guess)} naming a root at random ({guess:.3f}); "
        f"{right}. Others: {others}. Twins: {twins}."
    )
    return Report(
        finding,
        [
            "## Accuracy by hops",
            f"With {loops[-1]} loops, which is enough for every distance; a plain model has its blocks and no more. "
            f"'Reached' is the farthest distance up to which every seed is at least {RIGHT} right. Intervals are 95 % "
            "over seeds.",
            Figure("hops", f"Accuracy by hops, mean and 95 % interval of {seeds}", draw_hops),
            _by_hops(grids, distances),
            "## Accuracy by loops",
            Figure("heatmap", f"Accuracy by hops and loops, injection {best}, mean over seeds", draw_map),
            _by_loops(grids, injections, distances, loops),
            "## Null control: fewer loops than hops",
            "The answer is then out of reach, so a model that scores there guesses, or the answer leaks. The highest "
            "accuracy of any such cell, by seed, which luck among cells only raises; beside it the lowest accuracy of "
            f"any cell with enough loops. Naming a root of the prompt at random scores {guess:.3f}; a model that "
            "names the symbol it has reached, which is no root yet, scores 0.",
            _control(grids, distances, loops, guess),
            "## What was trained",
            _trained(results),
            "## What the recipe's choices do",
            _choices(far, distances[-1], grids),
        ],
    )


def _by_hops(grids: dict[str, np.ndarray], distances: Sequence[int]) -> Table:
    rows = [
        [TEXTS.get(name, name), *(_shown(column) for column in grid[:, :, -1].T), str(reach(grid, distances))]
        for name, grid in grids.items()
    ]
    return Table(["", *(f"{d} hop{'s' * (d > 1)}" for d in distances), "reached"], rows)


def _by_loops(
    grids: dict[str, np.ndarray], injections: Sequence[str], distances: Sequence[int], loops: Sequence[int]
) -> Table:
    rows = [
        [f"{d} hops, {name}", *(_shown(column) for column in grids[name][:, i].T)]
        for i, d in enumerate(distances)
        if d >= 8
        for name in injections
    ]
    return Table(["", *(f"{n} loop{'s' * (n > 1)}" for n in loops)], rows)


def _control(grids: dict[str, np.ndarray], distances: Sequence[int], loops: Sequence[int], guess: float) -> Table:
    rows = []
    for name, by_seed in grids.items():
        if by_seed.shape[-1] == len(loops):
            highest = np.array([best_unreachable(grid, distances, loops) for grid in by_seed.tolist()])
            lowest = np.array([worst_reachable(grid, distances, loops) for grid in by_seed.tolist()])
            rows.append(
                [TEXTS.get(name, name), _shown(highest), f"{against(highest, guess)} {guess:.3f}", _shown(lowest)]
            )
    head = ["", "highest, loops < hops", "against a root at random", "lowest, loops >= hops"]
    return Table(head, rows)


def _trained(results: dict[str, Any]) -> Table:
    rows = []
    for name, arm in results["arms"].items():
        sizes = [f"{arm['parameters']:,}", str(arm["blocks"]), str(arm["dim"])]
        seconds = np.mean([run["cpu_s"] for run in arm["runs"]])
        rows.append([TEXTS.get(name, name), *sizes, arm["labels"], f"{seconds:.0f}"])
    return Table(["", "parameters", "blocks", "width", "labels in training", "CPU s a run"], rows)


def _choices(far: dict[str, np.ndarray], distance: int, grids: dict[str, np.ndarray]) -> str:
    """What undoing each choice does, and loops against blocks where both have the same labels."""
    lines = []
    for name, what in (
        ("root", "Without labels on the hops on the way, only the root after the last loop"),
        ("prelude", "With one prelude layer instead of none"),
    ):
        change = far[name] - far["diagonal"]
        verdict = {"above": "better", "below": "worse"}.get(against(change, 0), "not told apart")
        lines.append(
            f"- {what}: {_shown(far[name])} at {distance} hops, {_shown(change)} against the recipe: {verdict}; "
            f"{_shown(grids[name][:, 0, -1])} at 1 hop."
        )
    change = grids["root"][:, :, -1].mean(1) - grids["plain-depth"][:, :, -1].mean(1)
    side = {"above": "the loops are worth more", "below": "the loops are worth less"}.get(
        against(change, 0), "not told apart"
    )
    lines.append(
        "- Loops against blocks with the same labels (`root` against `plain-depth`, the mean over all distances): "
        f"{_shown(change)}: {side}."
    )
    return "\n".join(lines)
