"""What `loop_roles` found: tables, figures and a paragraph, for the seeds of one training or for one model.

Loops are counted by index, from 0, as the model does.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from open_mythos.analysis.bootstrap import Band, bootstrap
from open_mythos.analysis.loop_roles import LoopRoles
from open_mythos.plots import Series, interval_panels

Runs = Sequence[LoopRoles]
"""One for each seed of a training, all with as many loops."""
SMALL = 0.01
"""Changes of fewer answers than this are taken for none."""


def band(runs: Runs, pick: Callable[[LoopRoles], Tensor]) -> Band:
    """Mean and interval of (N, K) values over sequences, and over seeds if there are several."""
    return bootstrap([pick(run) for run in runs])


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
    shuffled = [cells(band(runs, _shuffle(effect)), form)[0] for effect, form in (("kl", ".3g"), ("changed", ".3f"))]
    return ["intervention", "KL in nats", "answers changed"], [*rows, ["all loops shuffled", *shuffled]]


def verdict(runs: Runs) -> str:
    """One paragraph that follows from the intervals alone."""
    share = band(runs, lambda r: r.share)
    if share.high.nan_to_num(1.0).max() < 1e-5:
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
    shuffled, swapped = band(runs, _shuffle("changed")), band(runs, lambda r: r.changed["swap"])
    moved = [f"{t} and {t + 1}" for t, x in enumerate(swapped.low.tolist()) if x > SMALL]
    size = f"shuffling them changes {cells(shuffled)[0]} of the answers"
    if shuffled.low[0] > SMALL:
        order = f"The loops are not interchangeable: {size}"
    elif shuffled.high[0] < SMALL:
        order = f"The loops are interchangeable as far as answers go: {size}, less than {SMALL:.0%}"
    else:
        order = f"Whether the loops are interchangeable is open: {size}"
    pairs = f"swapping two neighbours changes more than {SMALL:.0%} for {' and for '.join(moved) or 'none'}"
    return f"The update changes {'; '.join(parts)}. {order}; {pairs}."


def draw_split(models: Mapping[str, Runs], path: Path, level: str | None = None) -> None:
    """The function's share of each change, by loop, for every model; `level` names the line at 0."""
    series = {name: _series(band(runs, lambda r: r.share), 0.5) for name, runs in models.items()}
    interval_panels(
        {"what changes between two consecutive loops": series},
        path,
        ("between loop t and t+1 (at t + 1/2)", "share from the function"),
        {} if level is None else {level: 0.0},
        bars=False,
        limits=(-0.05, 1.05),
    )


def draw_effects(models: Mapping[str, Runs], path: Path) -> None:
    """KL at the output for each loop that is left out, run twice or swapped with the next; a panel for each model."""
    names = {"skip": "left out", "repeat": "run twice", "swap": "swapped with the next"}
    panels = {
        model: {title: _series(band(runs, lambda r, name=name: r.kl[name]), 0.0) for name, title in names.items()}
        | {"all shuffled": _series(band(runs, _shuffle("kl")), -1.0)}
        for model, runs in models.items()
    }
    interval_panels(panels, path, ("loop index (left: all loops shuffled)", "KL in nats"), {}, bars=True, limits=None)


def _shuffle(effect: str) -> Callable[[LoopRoles], Tensor]:
    """(N, 1), the mean over the shuffles."""
    return lambda run: getattr(run, effect)["shuffle"].mean(1, keepdim=True)


def _series(values: Band, first: float) -> Series:
    mean, low, high = (x.tolist() for x in values)
    return [t + first for t in range(len(mean))], mean, low, high
