"""Report of `loop_roles`: tables, figures and a verdict, for the seeds of one training or for a single model.

Loops are counted by index, from 0, as in the model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from open_mythos.analysis.loop_roles import LoopRoles, loop_roles
from open_mythos.analysis.section import Section, Subject
from open_mythos.reports.document import Figure, Table
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import Interval, bootstrap, over_seeds

SMALL, SMALL_KL = 0.01, 1e-3
"""Share of answers, and nats at the output, below which a change counts as none."""

Runs = Sequence[LoopRoles]
"""The seeds of one training, or a single model; all with equally many loops."""


def across(runs: Runs, name: str) -> Interval:
    """Compute the interval of each of K values (N, K): over seeds if there are several, else over sequences.

    Args:
        name: a field, such as "share"; for an intervention "kl.skip" or "changed.skip"; of the shuffles, the mean.
    """
    field, _, intervention = name.partition(".")
    values = [getattr(run, field)[intervention] if intervention else getattr(run, field) for run in runs]
    values = [(x.mean(1, keepdim=True) if intervention == "shuffle" else x).numpy() for x in values]
    return bootstrap(values[0]) if len(values) == 1 else over_seeds([np.nanmean(x, 0) for x in values])


def cells(values: Interval, form: str = ".3f") -> list[str]:
    """Write each value as '0.512 [0.470, 0.554]'; the mean alone where there is no interval."""
    rows = zip(*values, strict=True)
    return [f"{m:{form}}" if np.isnan(low) else f"{m:{form}} [{low:{form}}, {high:{form}}]" for m, low, high in rows]


def split_table(runs: Runs) -> Table:
    """Make a table of what changes from each loop to the next, and why."""
    columns = {
        "change": "delta",
        "from the function": "function",
        "at the state before": "function_before",
        "at the state after": "function_after",
        "from the state": "state",
        "cosine of both": "cosine",
        "function's share": "share",
    }
    filled = [cells(across(runs, name)) for name in columns.values()] + [cells(across(runs, "step"))[1:]]
    rows = [[f"{t} to {t + 1}", *row] for t, row in enumerate(zip(*filled, strict=True))]
    return Table(["loops", *columns, "later update, of the state"], rows)


def effect_table(runs: Runs) -> Table:
    """Make a table of what each intervention does to the output, in nats and in answers changed."""
    titles = {
        "skip": "loop {} left out",
        "repeat": "loop {} twice",
        "swap": "loops {} and {} swapped",
        "more": "one loop more",
        "shuffle": "all loops shuffled",
    }
    rows = []
    for name, title in titles.items():
        nats, changed = cells(across(runs, f"kl.{name}"), ".3g"), cells(across(runs, f"changed.{name}"))
        rows += [[title.format(t, t + 1), *row] for t, row in enumerate(zip(nats, changed, strict=True))]
    return Table(["intervention", "KL in nats", "answers changed"], rows)


def without_order_or_last(runs: Runs) -> tuple[str, str]:
    """Write the shares of answers that a shuffle changes, and that need the last loop: else no order could matter."""
    return cells(across(runs, "changed.shuffle"))[0], cells(across(runs, "changed.skip"))[-1]


def interchangeable(runs: Runs) -> bool | None:
    """Decide whether shuffling the loops changes less than `SMALL` of the answers; None where the numbers do not tell.

    Where no answer changed, resampling has no spread: 3 / N is then the upper end of a share in N sequences.
    """
    changed = across(runs, "changed.shuffle")
    high = max(changed.high[0], 3 / sum(len(run.step) for run in runs))
    return True if high < SMALL else False if changed.low[0] > SMALL else None


def verdict(runs: Runs) -> str:
    """Write a paragraph that follows from the intervals alone."""
    share, fewer, other = (across(runs, name) for name in ("share", "kl.skip", "kl.shuffle"))
    if share.mean.max() < 1e-5:
        return (
            "No loop has a function of its own: the part from the function is zero, so two updates differ by the state "
            f"alone, and only the number of loops can matter (one fewer: KL {cells(fewer, '.3g')[-1]} nats)."
        )
    reasons = {
        "mostly because the function differs": share.low > 0.5,
        "mostly because the state has moved on": share.high < 0.5,
    }
    reasons["for both reasons, or the intervals do not tell"] = ~np.any(list(reasons.values()), axis=0)
    parts = [
        f"from loop {', '.join(f'{t} to {t + 1}' for t in np.flatnonzero(which))} {why}"
        for why, which in reasons.items()
        if which.any()
    ]
    said = {True: "The loops are interchangeable as far as answers go", False: "The loops are not interchangeable"}
    order = said.get(interchangeable(runs), "Whether the loops are interchangeable is open")
    shuffled, needed = without_order_or_last(runs)
    swapped = np.flatnonzero(across(runs, "changed.swap").low > SMALL)
    pairs = " and for ".join(f"{t} and {t + 1}" for t in swapped) or "none"
    more = "Neither the number of loops nor their order clearly matters more"
    if max(fewer.high[-1], other.high[0]) < SMALL_KL:
        more = "Neither the number of loops nor their order matters here"
    elif fewer.low[-1] > other.high[0]:
        more = "The number of loops matters more than their order"
    elif fewer.high[-1] < other.low[0]:
        more = "The order of the loops matters more than whether there is one fewer"
    return (
        f"The update changes {'; '.join(parts)}. {order}: shuffling them changes {shuffled} of the answers, one loop "
        f"fewer {needed}; swapping two neighbours changes more than {SMALL:.0%} for {pairs}. {more}: one fewer costs "
        f"{cells(fewer, '.3g')[-1]} nats at the output, a shuffle {cells(other, '.3g')[0]}."
    )


def draw_split(models: Mapping[str, Runs], path: Path) -> None:
    """Draw the function's share of each change, by loop, for every model."""
    curves = [_points(name, across(runs, "share")) for name, runs in models.items()]
    ticks = {t: f"{t} to {t + 1}" for t in range(max(len(curve.xs) for curve in curves))}
    curves.append(Curve(list(ticks), [0.0] * len(ticks), "without index-dependent parts", None))
    labels = ("from loop to loop", "share from the function")
    draw_curves({"What changes between two consecutive loops": curves}, path, labels, ticks=ticks)


def draw_effects(models: Mapping[str, Runs], path: Path) -> None:
    """Draw the KL at the output for each loop that is left out, run twice or swapped, a panel for each model."""
    names = {"skip": "left out", "repeat": "run twice", "swap": "swapped with the next"}
    panels = {
        model: [_points(title, across(runs, f"kl.{name}")) for name, title in names.items()]
        + [_points("all shuffled", across(runs, "kl.shuffle"), first=-1)]
        for model, runs in models.items()
    }
    ticks = {-1: "all"} | {t: str(t) for t in range(max(len(curves[0].xs) for curves in panels.values()))}
    draw_curves(panels, path, ("loop index", "KL in nats"), ticks=ticks, log="y")


def _points(label: str, values: Interval, first: int = 0) -> Curve:
    mean, low, high = (x.tolist() for x in values)
    return Curve(range(first, first + len(mean)), mean, label, 0, low, high, points=True)


def section(subject: Subject) -> Section:
    """Describe whether each loop does something of its own."""
    title = "Does each loop do something of its own?"
    if subject.n_loops < 2:
        return Section(title, "One loop has no next loop to compare with.", {})
    runs = [loop_roles(subject.model, subject.input_ids, subject.n_loops, subject.where)]
    shown = {"this model": runs}
    split = Figure("split", "Share of a change that is due to the loop index.", lambda path: draw_split(shown, path))
    effects = Figure("effects", "Effect of disturbed loops on the answer.", lambda path: draw_effects(shown, path))
    parts = [split_table(runs), split, effect_table(runs), effects]
    return Section(title, verdict(runs), runs[0].to_dict(), parts)
