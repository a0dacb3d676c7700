"""Where a bracket string first breaks: does deeper nesting take more loops? And does a task have its own number?"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_mythos.analysis.per_loop import right_by_loop, rows_right, settled
from open_mythos.experiments.study import Result, Results, Run, Study, curve, plain
from open_mythos.model import OpenMythos
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import ONE_SEED, Estimate, rank_correlation
from open_mythos.tasks import Addition, Brackets, Mixed
from open_mythos.tasks.brackets import KINDS, first_break, nesting
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.optim import OptimConfig
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.variants import small_model

LENGTH = 12
MEAN_LOOPS = 4
LOOPS = 16
"""Most loops at test."""
DEPTHS = range(1, LENGTH // 2 + 1)
"""Nestings that the page shows. A few strings have others, as the bracket that was replaced counts too."""
SHOWN = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of loops in the figures."""
LOOPED = {"sampled": "sampled depth", "fixed": "fixed depth 4"}
PLAIN = {"deep": "plain, 5 blocks", "small": "plain, 2 blocks"}
TASKS = {"parity": "parity of 8 bits", "addition": "addition", "brackets": "brackets that break"}
LEARNED = 0.5
"""Share right at the last loop, mean over seeds, below which a task's settling says nothing."""


def arms(quick: bool) -> dict[str, TrainConfig]:
    """Sampled depth, its baselines, and a model of several tasks."""
    steps = 200 if quick else 1000
    layout = {"max_seq_len": 32, "max_loop_iters": MEAN_LOOPS, "coda_layers": 0, "rope_theta": 3.0, "qk_norm": True}
    model = small_model(Brackets().vocab_size, 64, 4, 128, **layout)
    sampled = TrainConfig(
        model=model,
        data=Brackets(2, LENGTH, 1, LENGTH // 2),
        steps=steps,
        batch_size=128,
        optim=OptimConfig("muon", lr=2.5e-3, weight_decay=0.0, muon_lr=5e-3),
        schedule=ScheduleConfig(warmup_steps=20, shape="linear", cooldown=0.5),
        loops=LoopsConfig("poisson", MEAN_LOOPS, max_loops=12),
    )
    fixed = dataclasses.replace(sampled, loops=LoopsConfig("fixed", MEAN_LOOPS))

    mixed = dataclasses.replace(
        sampled,
        model=dataclasses.replace(model, vocab_size=Mixed().vocab_size),
        data=Mixed(max_bits=8, max_digits=2, max_length=LENGTH),
        # A third of the rows are brackets, which are learned last.
        steps=steps * 3 // 2,
        loops=LoopsConfig("poisson", 5, max_loops=12),
    )
    deep, small = plain(fixed, 1 + MEAN_LOOPS), plain(fixed, 2)
    return {"sampled": sampled, "fixed": fixed, "deep": deep, "small": small, "mixed": mixed}


def by_row(model: OpenMythos, rows: int, seed: int) -> Result:
    """Return the nesting, the break and the settling loop of strings of one length, the longest of training.

    `right` has, for broken and balanced strings by nesting, the share of rows that are right after each loop.
    """
    task = Brackets(LENGTH, LENGTH, 1, LENGTH // 2)
    strings, lengths = task.draw(stream(seed, 0, Purpose.VALIDATION), rows)
    batch = task.encode(strings, lengths)
    right = rows_right(right_by_loop(model, batch, LOOPS), batch)
    deep, place = nesting(strings, lengths), first_break(strings, lengths)
    shares = {
        name: {int(d): right[:, which & (deep == d)].mean(axis=1).round(4).tolist() for d in np.unique(deep[which])}
        for name, which in (("broken", place >= 0), ("balanced", place < 0))
    }
    # The kind of the first bracket cannot matter: the null control.
    rows_of = {"nesting": deep, "place": place, "settled": settled(right), "kind": strings[:, 0] % KINDS}
    return {"right": shares, "rows": {name: values.tolist() for name, values in rows_of.items()}}


def by_task(model: OpenMythos, data: Mixed, rows: int, seed: int) -> Result:
    """Return for each task, on its longest rows, the share right by loop, and the number of rows by settling loop.

    Of brackets only strings that break are asked: "--" is what a model says before it has looked.
    """
    found = {}
    for i, part in enumerate(data.parts):
        rng = stream(seed, 1 + i, Purpose.VALIDATION)
        if isinstance(part, Brackets):
            part = Brackets(LENGTH, LENGTH, 1, LENGTH // 2)
            strings, lengths = part.draw(rng, rows)
            broken = first_break(strings, lengths) >= 0
            batch = part.encode(strings[broken], lengths[broken])
        elif isinstance(part, Addition):
            batch = dataclasses.replace(part, min_digits=part.max_digits).batch(rng, rows)
        else:
            batch = part.batch(rng, rows)
        batch = data.translate(part, batch)
        right = rows_right(right_by_loop(model, batch, LOOPS), batch)
        found[part.name] = {
            "right": right.mean(axis=1).round(4).tolist(),
            "settled": np.bincount(settled(right), minlength=LOOPS + 1).tolist(),
        }
    return {"tasks": found}


def measure(run: Run) -> Result:
    """Return what is right after every loop and when rows settle, by row or, for the mixed model, by task."""
    rows, data = run.settings["rows"], run.config.data
    return by_task(run.model, data, rows, run.seed) if isinstance(data, Mixed) else by_row(run.model, rows, run.seed)


def settling(counts: Sequence[int]) -> tuple[float, float]:
    """Return the mean loop of the rows that settle, and the share of rows that never do; NaN where there are none.

    Args:
        counts: rows by settling loop; those that never settle come first.
    """
    settles, total = np.array(counts[1:]), sum(counts)
    mean = float(settles @ np.arange(1, len(counts)) / settles.sum()) if settles.sum() else math.nan
    return mean, counts[0] / total if total else math.nan


def estimates(pairs: Sequence[tuple[float, float]]) -> dict[str, Estimate]:
    """Return settling loop and share that never settles over seeds."""
    loops, never = zip(*pairs, strict=True)
    return {"settles": Estimate(loops, ".2f"), "never": Estimate(never, ".2f")}


def correlations(runs: list[Result]) -> dict[str, Estimate]:
    """Return rank correlations with the settling loop, by seed, over broken rows that settle."""
    found: dict[str, list[float]] = {"raw": [], "at_place": [], "place": [], "null": []}
    for run in runs:
        rows = {name: np.array(values) for name, values in run["rows"].items()}
        which = (rows["place"] >= 0) & (rows["settled"] > 0)
        loop, nested, place, kind = (rows[name][which].tolist() for name in ("settled", "nesting", "place", "kind"))
        found["raw"].append(rank_correlation(loop, nested))
        found["at_place"].append(rank_correlation(loop, nested, place))
        found["place"].append(rank_correlation(loop, place, nested))
        found["null"].append(rank_correlation(loop, kind, place))
    return {name: Estimate(values, "+.2f") for name, values in found.items()}


def direction(correlation: Estimate) -> str:
    """Return what the interval over seeds says of the correlation with nesting."""
    none, n = int(np.isnan(correlation.by_seed).sum()), len(correlation.by_seed)
    if none:
        return f"there is no correlation where all rows settle at one loop, as in {none} of {n} seeds"
    later, earlier = (f"strings nested deeper settle {word}" for word in ("later", "earlier"))
    return correlation.side(
        0, later, earlier, "one seed, so no interval" if n < 2 else "no order that the seeds agree on"
    )


def null_side(null: Estimate) -> str:
    """Describe whether the interval of the null control over seeds contains 0.

    The control is the rank correlation of the settling loop with the type of the first bracket, which cannot matter: an
    interval without 0 casts doubt on the other correlations.
    """
    if np.isnan(null.by_seed).any():
        return "not defined in each seed"
    doubt = "it should be 0: the rest is in doubt"
    return null.side(0, doubt, doubt, "one seed, so no interval" if len(null.by_seed) < 2 else "as it should")


def by_task_numbers(runs: list[Result]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], str]:
    """Return the mixed model's numbers by task, the differences of learned tasks, and the sentence about them."""
    tasks: dict[str, dict[str, Any]] = {
        name: {"title": title, "right": Estimate([run["tasks"][name]["right"][-1] for run in runs], ".2f")}
        | estimates([settling(run["tasks"][name]["settled"]) for run in runs])
        for name, title in TASKS.items()
    }
    learned = [name for name in TASKS if tasks[name]["right"].mean >= LEARNED]
    pairs: list[dict[str, Any]] = [
        {"pair": f"{TASKS[a]} less {TASKS[b]}", "less": tasks[a]["settles"] - tasks[b]["settles"]}
        for a, b in itertools.combinations(learned, 2)
    ]
    if len(learned) < 2:
        return tasks, pairs, "One model of three tasks did not learn two of them, so their loops cannot be compared."
    means = ", ".join(f"{TASKS[name]} {tasks[name]['settles']:.1f}" for name in learned)
    sides = [pair["less"].side(0) for pair in pairs]
    apart = f"{sum(side in ('above', 'below') for side in sides)} of {len(sides)} pairs of tasks differ"
    apart = "one seed, so no interval" if ONE_SEED in sides else apart
    left_out = "".join(f"; {TASKS[name]} was not learned" for name in TASKS if name not in learned)
    return tasks, pairs, f"In one model of three tasks rows settle after this many loops: {means}; {apart}{left_out}."


def fill(r: Results) -> dict[str, Any]:
    """Return the correlations, the accuracy by nesting, and the tasks of the mixed model."""
    broken = {arm: r[arm, "right.broken"] for arm in (*LOOPED, *PLAIN)}
    arms = {arm: r.arm(arm) | correlations(r.runs[arm]) for arm in LOOPED}
    nestings = []
    for depth in broken["sampled"].axes["nesting"]:
        line: dict[str, Any] = {"nesting": depth}
        for arm, measured in broken.items():
            found = measured.where(nesting=depth)
            line[arm] = {n: Estimate(found.at(loops=n).by_seed, ".2f") for n in (1, 4, LOOPS)}
        rows = [{name: np.array(values) for name, values in run["rows"].items()} for run in r.runs["sampled"]]
        counts = [np.bincount(x["settled"][(x["place"] >= 0) & (x["nesting"] == depth)], minlength=2) for x in rows]
        nestings.append(line | estimates([settling(each.tolist()) for each in counts]))
    less = {arm: broken[arm].at(loops=LOOPS) - broken["sampled"].at(loops=LOOPS) for arm in ("fixed", *PLAIN)}
    tasks, pairs, tasks_say = by_task_numbers(r.runs["mixed"])
    return arms | {
        "at_place": arms["sampled"]["at_place"],
        "direction": direction(arms["sampled"]["at_place"]),
        "null": arms["sampled"]["null"],
        "null_side": null_side(arms["sampled"]["null"]),
        "nestings": nestings,
        "less": "; ".join(f"{r.title(arm)} {x:+.3f}, {x.side(0)} 0" for arm, x in less.items()),
        "parameters": ", ".join(f"{name} {n:,}" for name, n in r.raw["parameters"].items()),
        "balanced": {n: r["sampled", "right.balanced"].at(loops=n) for n in (1, LOOPS)},
        "tasks": tasks.values(),
        "pairs": pairs,
        "tasks_say": tasks_say,
    }


def draw_brackets(r: Results, path: Path) -> None:
    level = r["deep", "right.broken"].at().mean
    panels: dict[str, list[Curve]] = {}
    for arm, title in LOOPED.items():
        panels[title] = [Curve((1, LOOPS), (level, level), f"{PLAIN['deep']}, mean of nestings", None)]
        for depth in r[arm, "right.broken"].axes["nesting"]:
            by_loop = r[arm, "right.broken"].where(nesting=depth)
            panels[title].append(curve(SHOWN, [by_loop[n] for n in SHOWN], f"nesting {depth}"))
    draw_curves(panels, path, ("loops", "right"), ticks=SHOWN, log="x", shares=True)


def draw_mixed(r: Results, path: Path) -> None:
    right = {name: r["mixed", f"tasks.{name}.right"] for name in TASKS}
    curves = [curve(SHOWN, [right[name][n] for n in SHOWN], title) for name, title in TASKS.items()]
    draw_curves({"mixed": curves}, path, ("loops", "right"), ticks=SHOWN, log="x", shares=True)


STUDY = Study(
    title="Brackets: does nesting need loops?",
    question="Do more deeply nested strings need more loops, and does each task settle at its own loop?",
    page=Path(__file__).with_suffix(".md"),
    cost=("2 min", "35 min"),
    arms=arms,
    titles=LOOPED | PLAIN,
    settings=lambda config, quick: {"rows": 400 if quick else 2000, "loops": LOOPS},
    measure=measure,
    axes={f"right.{name}": {"nesting": DEPTHS, "loops": range(1, LOOPS + 1)} for name in ("broken", "balanced")}
    | {f"tasks.{name}.right": {"loops": range(1, LOOPS + 1)} for name in TASKS},
    fill=fill,
    figures={"brackets": draw_brackets, "mixed": draw_mixed},
)
