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
