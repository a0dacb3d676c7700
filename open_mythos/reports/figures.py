"""Figures: curves with their intervals, ratios, and a heat map. Needs matplotlib, which is the extra `plot`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from open_mythos.extras import load

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours that the colour-blind also tell apart. Source: Okabe and Ito 2008, jfly.uni-koeln.de/color."""
MARKERS = "osDv^xP*"
"""More marks than colours, so that a colour that comes again has another."""
DENSE = 12
"""Points of a curve above which its intervals are drawn as a band, and its marks are thinned out."""


@dataclass(frozen=True)
class Curve:
    """A line of a figure, with the interval from `low` to `high` at each point where both are finite."""

    xs: Sequence[float]
    ys: Sequence[float]
    label: str
    color: int | None = 0
    """None: a grey dashed line, for a level or for published numbers to compare with."""
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    points: bool = False
    """Marks alone, without a line; those of several curves at one place stand side by side."""


def draw_curves(
    panels: Mapping[str, Sequence[Curve]],
    path: Path,
    labels: tuple[str, str],
    *,
    columns: int = 1,
    ticks: Sequence[float] | Mapping[int, str] | None = None,
    log: str = "",
    shares: bool = False,
) -> None:
    """Draw a panel for each title, with one legend for all: a label has the same colour in every panel.

    Args:
        path: its ending, .png or .svg, names the format.
        labels: names of the x and the y axis.
        columns: panels side by side.
        ticks: places on the x axis, with their texts or written as they are; None: matplotlib's choice.
        log: the logarithmic axes, "x", "y" or "xy"; x in powers of two.
        shares: the y axis is that of shares, from 0 to 1.
    """
    plt = _pyplot()
    n_rows = -(-len(panels) // columns)
    size = (6.4 if columns == 1 else 4.4 * columns, 1.6 + 2.8 * n_rows)
    figure, grid = plt.subplots(n_rows, columns, figsize=size, layout="constrained", squeeze=False)
    names = list(dict.fromkeys(c.label for curves in panels.values() for c in curves if c.color is not None))
    handles: dict[str, Any] = {}
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        for curve in curves:
            handles[curve.label] = _draw(axes, curve, curves, names)
        if "x" in log:
            axes.set_xscale("log", base=2)
            axes.minorticks_off()
        if "y" in log:
            axes.set_yscale("log")
        if ticks is not None:
            axes.set_xticks(list(ticks), ticks.values() if isinstance(ticks, Mapping) else [f"{x:g}" for x in ticks])
        elif "x" not in log and all(float(x).is_integer() for curve in curves for x in curve.xs):
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel=labels[0], ylabel=labels[1], ylim=(-0.04, 1.04) if shares else None)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    if len(handles) > 1:
        columns = 1 if max(map(len, handles)) > 40 else 2
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=8, ncols=columns)
    _save(plt, figure, path)


def _draw(axes: Any, curve: Curve, beside: Sequence[Curve], names: Sequence[str]) -> Any:
    """Draw one curve and return what the legend shows of it."""
    if curve.color is None:
        return axes.plot(curve.xs, curve.ys, color="0.45", linestyle="--", zorder=1)[0]
    i = names.index(curve.label)
    xs, style = curve.xs, {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
    style["linestyle"] = "none" if curve.points else ("-", "--", ":")[i // len(COLORS) % 3]
    if curve.points:
        # No interval may hide another: points of one place are moved apart.
        near = [[other for other in beside if other.points and x in other.xs] for x in xs]
        xs = [x + 0.12 * (others.index(curve) - (len(others) - 1) / 2) for x, others in zip(xs, near, strict=True)]
    if not len(curve.low) or len(xs) > DENSE:
        if len(curve.low):
            axes.fill_between(xs, curve.low, curve.high, color=style["color"], alpha=0.18, linewidth=0)
        return axes.plot(xs, curve.ys, markevery=max(1, len(xs) // DENSE), **style)[0]
    # Rounding may leave a mean outside an interval without width.
    below = [max(0.0, y - low) for y, low in zip(curve.ys, curve.low, strict=True)]
    above = [max(0.0, high - y) for y, high in zip(curve.ys, curve.high, strict=True)]
    return axes.errorbar(xs, curve.ys, (below, above), capsize=3, **style)


def heat_map(
    accuracy: Sequence[Sequence[float]],
    distances: Sequence[int],
    loops: Sequence[int],
    path: Path,
    title: str,
    label: str = "hops from the question to the answer",
) -> None:
    """Draw accuracy by distance (rows, named by `label`) and loops (columns); a line separates loops below distance."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    image = axes.imshow(accuracy, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
    for (i, j), value in np.ndenumerate(accuracy):
        color = "black" if value > 0.5 else "white"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(loops)), map(str, loops))
    axes.set_yticks(range(len(distances)), map(str, distances))
    axes.set(xlabel="loops", ylabel=label)
    # The staircase between too few loops and enough.
    first_enough = [sum(n < d for n in loops) - 0.5 for d in distances]
    edges, style = [i - 0.5 for i in range(len(distances) + 1)], {"color": "black", "linewidth": 2, "baseline": None}
    axes.stairs(first_enough, edges, orientation="horizontal", **style)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="accuracy")
    _save(plt, figure, path)


def require_matplotlib() -> None:
    """Raise before long work when the figures at its end could not be drawn."""
    _pyplot()


def draw_ratios(panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]], path: Path) -> None:
    """Draw ratios on a logarithmic axis with a line at 1, a panel for each title, a line of marks for each label.

    Args:
        panels: title -> label -> series -> (low, middle, high). A series has one colour in every panel.
        path: its ending, .png or .svg, names the format.
    """
    plt = _pyplot()
    sizes = [len(rows) for rows in panels.values()]
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(7.2, 1.2 + 0.8 * len(panels) + 0.24 * sum(sizes)), layout="constrained",
        squeeze=False, sharex=True, height_ratios=sizes,
    )  # fmt: skip
    names = list(dict.fromkeys(name for rows in panels.values() for row in rows.values() for name in row))
    for axes, (title, rows) in zip(grid.flat, panels.items(), strict=True):
        for i, name in enumerate(names):
            found = [(y, row[name]) for y, row in enumerate(rows.values()) if name in row]
            middles = [middle for _, (_, middle, _) in found]
            errors = [[m - low for _, (low, m, _) in found], [high - m for _, (_, m, high) in found]]
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            places = [y + 0.18 * (i - (len(names) - 1) / 2) for y, _ in found]
            axes.errorbar(middles, places, xerr=errors, linestyle="none", capsize=2, label=name, **style)
        axes.axvline(1, color="0.45", linestyle="--", zorder=1)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    if len(names) > 1:
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=2)
    _save(plt, figure, path)


def _pyplot() -> Any:
    load("matplotlib", "plot", "figures").use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and drawn names of an SVG's parts the same figure is the same file.
    with plt.rc_context({"svg.hashsalt": "open_mythos"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
