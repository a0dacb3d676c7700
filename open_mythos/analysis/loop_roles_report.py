"""What `loop_roles` found: tables, figures and a paragraph, for the seeds of one training or for one model.

Loops are counted by index, from 0, as the model does.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from open_mythos.analysis.loop_roles import LoopRoles
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import Band, mean_band

Runs = Sequence[LoopRoles]
"""One for each seed of a training, all with as many loops."""
SMALL = 0.01
"""Changes of fewer answers than this are taken for none."""
SMALL_KL = 1e-3
"""So are those of an output by less, in nats."""


def band(runs: Runs, pick: Callable[[LoopRoles], Tensor]) -> Band:
    """Mean and interval of (N, K) values: over seeds if there are several, else over sequences."""
    return mean_band([pick(run) for run in runs])


def cells(values: Band, form: str = ".3f") -> list[str]:
    """Each as '0.512 [0.470, 0.554]'; the mean alone where there is no interval."""
    rows = zip(*(x.tolist() for x in values), strict=True)
    return [f"{m:{form}}" if low != low else f"{m:{form}} [{low:{form}}, {high:{form}}]" for m, low, high in rows]


def split_table(runs: Runs) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what changes from each loop to the next, and from what."""
    columns = {
        "change": lambda r: r.delta,
        "from the function": lambda r: r.function,
        "at the state before": lambda r: r.function_before,
        "at the state after": lambda r: r.function_after,
        "from the state": lambda r: r.state,
        "cosine of both": lambda r: r.cosine,
        "function's share": lambda r: r.share,
        "later update, of the state": lambda r: r.step[:, 1:],
    }
    filled = [cells(band(runs, pick)) for pick in columns.values()]
    rows = [[f"{t} to {t + 1}", *row] for t, row in enumerate(zip(*filled, strict=True))]
    return ["loops", *columns], rows


def effect_table(runs: Runs) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what each intervention does to the output, in nats and in answers changed."""
    names = {
        "skip": "loop {} left out",
        "repeat": "loop {} twice",
        "swap": "loops {} and {} swapped",
        "more": "one loop more",
    }
    rows = []
    for name, title in names.items():
        kl, changed = band(runs, lambda r, name=name: r.kl[name]), band(runs, lambda r, name=name: r.changed[name])
        for t, row in enumerate(zip(cells(kl, ".3g"), cells(changed), strict=True)):
            rows.append([title.format(t, t + 1), *row])
    rows.append(["all loops shuffled", cells(band(runs, _shuffle("kl")), ".3g")[0], shuffled(runs)])
    return ["intervention", "KL in nats", "answers changed"], rows


def interchangeable(runs: Runs) -> bool | None:
    """Whether shuffling the loops changes less than `SMALL` of the answers; None where the numbers do not tell.

    Where no answer changed, resampling sees no spread: 3 / N is then the upper end of a share in N sequences.
    """
    changed = band(runs, _shuffle("changed"))
    high = max(changed.high[0].item(), 3 / sum(len(run.step) for run in runs))
    return True if high < SMALL else False if changed.low[0] > SMALL else None


def shuffled(runs: Runs) -> str:
    """The share of answers that shuffling the loops changes."""
    return cells(band(runs, _shuffle("changed")))[0]


def needed(runs: Runs) -> str:
    """The share of answers that the last loop changes: where it is nothing, no order could matter."""
    return cells(band(runs, lambda r: r.changed["skip"][:, -1:]))[0]


def verdict(runs: Runs) -> str:
    """One paragraph that follows from the intervals alone."""
    share = band(runs, lambda r: r.share)
    if share.mean.max() < 1e-5:
        skip = band(runs, lambda r: r.kl["skip"][:, -1:])
        return (
            "No loop has a function of its own: the part from the function is zero, so two updates differ by the state "
            f"alone, and only the number of loops can matter (one fewer: KL {cells(skip, '.3g')[0]} nats)."
        )
    low, high = share.low.tolist(), share.high.tolist()
    groups = {
        "mostly because the function differs": [t for t, x in enumerate(low) if x > 0.5],
        "mostly because the state has moved on": [t for t, x in enumerate(high) if x < 0.5],
    }
    told = {t for which in groups.values() for t in which}
    groups["for both reasons, or the intervals do not tell"] = [t for t in range(len(low)) if t not in told]
    parts = [f"from loop {', '.join(f'{t} to {t + 1}' for t in which)} {why}" for why, which in groups.items() if which]
    swapped = band(runs, lambda r: r.changed["swap"])
    moved = [f"{t} and {t + 1}" for t, x in enumerate(swapped.low.tolist()) if x > SMALL]
    order = {
        True: "The loops are interchangeable as far as answers go",
        False: "The loops are not interchangeable",
        None: "Whether the loops are interchangeable is open",
    }[interchangeable(runs)]
    size = f"shuffling them changes {shuffled(runs)} of the answers, one loop fewer {needed(runs)}"
    pairs = f"swapping two neighbours changes more than {SMALL:.0%} for {' and for '.join(moved) or 'none'}"
    return f"The update changes {'; '.join(parts)}. {order}: {size}; {pairs}. {_number_or_order(runs)}."


def _number_or_order(runs: Runs) -> str:
    fewer, other = band(runs, lambda r: r.kl["skip"][:, -1:]), band(runs, _shuffle("kl"))
    if max(fewer.high[0], other.high[0]) < SMALL_KL:
        more = "Neither the number of loops nor their order matters here"
    elif fewer.low[0] > other.high[0]:
        more = "The number of loops matters more than their order"
    elif fewer.high[0] < other.low[0]:
        more = "The order of the loops matters more than whether there is one fewer"
    else:
        more = "Neither the number of loops nor their order clearly matters more"
    return f"{more}: one fewer costs {cells(fewer, '.3g')[0]} nats at the output, a shuffle {cells(other, '.3g')[0]}"


def draw_split(models: Mapping[str, Runs], path: Path, level: str | None = None) -> None:
    """The function's share of each change, by loop, for every model; `level` names the line at 0."""
    curves = [_points(name, band(runs, lambda r: r.share)) for name, runs in models.items()]
    ticks = {t: f"{t} to {t + 1}" for t in range(_most_loops(models) - 1)}
    if level is not None:
        curves.append(Curve(list(ticks), [0.0] * len(ticks), level, None))
    labels = ("from loop to loop", "share from the function")
    draw_curves({"What changes between two consecutive loops": curves}, path, labels, ticks=ticks)


def draw_effects(models: Mapping[str, Runs], path: Path) -> None:
    """KL at the output for each loop that is left out, run twice or swapped with the next; a panel for each model."""
    names = {"skip": "left out", "repeat": "run twice", "swap": "swapped with the next"}
    panels = {
        model: [_points(title, band(runs, lambda r, name=name: r.kl[name])) for name, title in names.items()]
        + [_points("all shuffled", band(runs, _shuffle("kl")), first=-1)]
        for model, runs in models.items()
    }
    ticks = {-1: "all"} | {t: str(t) for t in range(_most_loops(models))}
    draw_curves(panels, path, ("loop index", "KL in nats"), ticks=ticks, log="y")


def _most_loops(models: Mapping[str, Runs]) -> int:
    return max(run.step.shape[1] for runs in models.values() for run in runs)


def _shuffle(effect: str) -> Callable[[LoopRoles], Tensor]:
    """(N, 1), the mean over the shuffles."""
    return lambda run: getattr(run, effect)["shuffle"].mean(1, keepdim=True)


def _points(label: str, values: Band, first: int = 0) -> Curve:
    mean, low, high = (x.tolist() for x in values)
    return Curve([t + first for t in range(len(mean))], mean, label, 0, low, high, points=True)
