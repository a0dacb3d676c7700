"""Figures. Needs matplotlib, which is the extra `plot`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_mythos.extras import load

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Told apart by the colour-blind too. Source: Okabe and Ito 2008, jfly.uni-koeln.de/color."""
Series = tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]
"""Places, means, and the lower and upper ends of their intervals, NaN for none."""


def heat_map(
    accuracy: Sequence[Sequence[float]],
    distances: Sequence[int],
    loops: Sequence[int],
    path: Path,
    title: str,
    label: str = "hops from the question to the answer",
) -> None:
    """Accuracy by distance (rows, named by `label`) and loops (columns); a line marks where loops equal distance."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    image = axes.imshow(accuracy, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
    for i, row in enumerate(accuracy):
        for j, value in enumerate(row):
            color = "black" if value > 0.5 else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(loops)), [str(n) for n in loops])
    axes.set_yticks(range(len(distances)), [str(d) for d in distances])
    axes.set_xlabel("loops")
    axes.set_ylabel(label)
    # The staircase between too few loops and enough.
    first_enough = [next((j for j, n in enumerate(loops) if n >= d), len(loops)) for d in distances]
    xs, ys = [], []
    for i, j in enumerate(first_enough):
        xs += [j - 0.5, j - 0.5]
        ys += [i - 0.5, i + 0.5]
    axes.plot(xs, ys, color="black", linewidth=2)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="accuracy")
    _save(plt, figure, path)


def loop_curve(values: Sequence[float], loops: Sequence[int], path: Path, label: str, title: str) -> None:
    """One value for each number of loops, on a logarithmic axis."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.plot(loops, values, marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(loops), [str(n) for n in loops])
    axes.set_xlabel("loops")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    _save(plt, figure, path)


def xy_curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    labels: tuple[str, str],
    title: str,
    log_y: bool = False,
) -> None:
    """Several curves, each with its name, on the axes that `labels` name."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for i, (name, (xs, ys)) in enumerate(series.items()):
        axes.plot(xs, ys, marker="osDv^x"[i % 6], markersize=4, label=name)
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(plt, figure, path)


@dataclass(frozen=True)
class Curve:
    """A line of a figure, with a band from `low` to `high` where these are given and finite."""

    xs: Sequence[float]
    ys: Sequence[float]
    label: str
    color: int | None = 0
    """Place in COLORS; None: a grey dashed line, for what is not ours or is only compared with."""
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def stacked(
    panels: Mapping[str, Sequence[Curve]], path: Path, labels: tuple[str, str], loops: Sequence[int] | None = None
) -> None:
    """Shares by what `labels[0]` names, a panel below the other, one legend; `loops`: a logarithmic axis of these."""
    plt = _pyplot()
    figure, rows = plt.subplots(len(panels), figsize=(6.4, 1 + 2.6 * len(panels)), layout="constrained", squeeze=False)
    handles: dict[str, Any] = {}
    for axes, (title, curves) in zip(rows[:, 0], panels.items(), strict=True):
        for curve in curves:
            if curve.color is None:
                style = {"color": "0.45", "linestyle": "--", "zorder": 1}
            else:
                i = curve.color % len(COLORS)
                every = max(1, len(curve.xs) // 16)
                style = {"color": COLORS[i], "marker": "osDv^x"[i], "markersize": 4, "markevery": every}
            (handles[curve.label],) = axes.plot(curve.xs, curve.ys, label=curve.label, **style)
            if curve.low and all(map(math.isfinite, (*curve.low, *curve.high))):
                axes.fill_between(curve.xs, curve.low, curve.high, color=style["color"], alpha=0.18, linewidth=0)
        if loops is not None:
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(loops), [str(n) for n in loops])
            axes.minorticks_off()
        axes.set_ylim(-0.04, 1.04)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=8, ncols=2)
    _save(plt, figure, path)


def interval_panels(
    panels: Mapping[str, Mapping[str, Series]],
    path: Path,
    labels: tuple[str, str],
    ticks: Mapping[int, str],
    level: tuple[str, float] | None = None,
    log_y: bool = False,
) -> None:
    """Panels one under the other, each of several series of points with their intervals; `level` is a dashed line."""
    plt = _pyplot()
    size = (6.4, 2.2 * len(panels) + 1.6)
    figure, rows = plt.subplots(len(panels), 1, figsize=size, layout="constrained", squeeze=False, sharex=True)
    for axes, (title, series) in zip(rows[:, 0], panels.items(), strict=True):
        for i, (name, (xs, mean, low, high)) in enumerate(series.items()):
            # Points of one place stand side by side, so that no interval hides another.
            beside = [[k for k, other in enumerate(series.values()) if x in other[0]] for x in xs]
            at = [x + 0.12 * (near.index(i) - (len(near) - 1) / 2) for x, near in zip(xs, beside, strict=True)]
            ends = [[max(0.0, m - x) for m, x in zip(mean, low, strict=True)]]
            ends.append([max(0.0, x - m) for m, x in zip(mean, high, strict=True)])
            color, marker = COLORS[i % len(COLORS)], "osDv^x"[i % 6]
            axes.errorbar(at, mean, ends, color=color, label=name, marker=marker, markersize=5, capsize=3, ls="none")
        if level is not None:
            axes.axhline(level[1], color="black", linestyle="--", linewidth=1, label=level[0])
        if log_y:
            axes.set_yscale("log")
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(labels[1])
        axes.grid(alpha=0.3, axis="y")
    rows[-1, 0].set_xlabel(labels[0])
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=2)
    _save(plt, figure, path)


def interval_curves(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    labels: tuple[str, str],
    title: str,
    path: Path,
    log_y: bool = False,
    level: tuple[str, float] | None = None,
) -> None:
    """Curves of (x, y, low, high) with a bar from low to high (NaN: none), and a level such as chance; x are counts."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(4.8, 5.6), layout="constrained")
    for i, (name, points) in enumerate(series.items()):
        xs, ys, low, high = zip(*points, strict=True)
        color = COLORS[i % len(COLORS)]
        axes.plot(
            xs,
            ys,
            ("-", "--", ":")[i // len(COLORS) % 3],
            # More marks than colours, so that a colour that comes again has another.
            marker="osDv^xP*"[i % 8],
            markersize=4,
            color=color,
            label=name,
        )
        axes.vlines(xs, low, high, color=color, alpha=0.6)
    if level:
        axes.axhline(level[1], color="black", linestyle=":", label=level[0])
    if log_y:
        axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    _save(plt, figure, path)


def require_matplotlib() -> None:
    """Raise before long work when the figures at its end could not be drawn."""
    _pyplot()


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
