"""Figures, from results.json alone. Needs matplotlib, which is the extra `plot`."""

from pathlib import Path
from typing import Any

LABELS = {"tokens": "tokens of one row, 8 loops", "loops": "loops, 256 tokens", "rows": "rows of 64 tokens, 8 loops"}


def draw_scaling(curves: dict[str, Any], path: Path) -> None:
    """Time against size in three panels, measured and as the fitted line has it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.6), layout="constrained", squeeze=False)
    for axes, (sweep, curve) in zip(panels[0], curves.items(), strict=True):
        median = [time["median"] for time in curve["times"]]
        error = [
            [time["median"] - time["q1"] for time in curve["times"]],
            [time["q3"] - time["median"] for time in curve["times"]],
        ]
        axes.plot(curve["sizes"], curve["line"], color="grey", label="line in FLOPs")
        axes.errorbar(curve["sizes"], median, yerr=error, fmt="o", capsize=3, label="median, quartiles")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(curve["sizes"], [str(size) for size in curve["sizes"]])
        axes.set_xlabel(LABELS[sweep])
        axes.set_ylabel("seconds of one forward pass")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_policies(panels: dict[str, dict[str, list[tuple[int, dict[str, Any]]]]], path: Path) -> None:
    """Tokens per second by requests in work, a panel for each model and law, a curve for each policy; PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    columns = min(3, len(panels))
    n_lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        n_lines, columns, figsize=(4.4 * columns, 3.6 * n_lines), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        for (policy, points), marker in zip(curves.items(), "osv^D", strict=True):
            rows = [n for n, _ in points]
            median = [rate["median"] for _, rate in points]
            error = [[r["median"] - r["q1"] for _, r in points], [r["q3"] - r["median"] for _, r in points]]
            axes.errorbar(rows, median, yerr=error, marker=marker, markersize=4, capsize=2, label=policy)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(rows, [str(n) for n in rows])
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set_title(title)
        axes.set_xlabel("requests in work")
        axes.set_ylabel("tokens per second")
        axes.grid(alpha=0.3)
    grid.flat[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)
