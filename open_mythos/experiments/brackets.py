"""Where a bracket string first breaks: does deeper nesting take more loops? And does a task have its own number?"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from open_mythos.analysis.per_loop import right_by_loop, rows_right, settled
from open_mythos.experiments.study import Result, Results, Run, Study, curve, plain
from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import ONE_SEED, Estimate, rank_correlation
from open_mythos.tasks import Addition, Brackets, Mixed
from open_mythos.tasks.brackets import KINDS, NONE, first_break, nesting
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.variants import small_model

LENGTH = 12
TASK = Brackets(2, LENGTH, 1, LENGTH // 2)
LONGEST = dataclasses.replace(TASK, min_length=LENGTH)
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
CORRELATIONS = {"raw": ["nesting"], "at_place": ["nesting", "place"], "place": ["place", "nesting"],
                "null": ["kind", "place"]}  # fmt: skip
"""Columns whose rank is correlated with the settling loop, the second one fixed. The first bracket's kind cannot
matter: an interval without 0 casts doubt on the other correlations."""


def arms(quick: bool) -> dict[str, TrainConfig]:
    """Sampled depth, its baselines, and a model of several tasks; optimizer and depths are those of tiny-addition."""
    steps, shape = 200 if quick else 1000, {"max_seq_len": 32, "max_loop_iters": MEAN_LOOPS, "coda_layers": 0}
    model = small_model(TASK.vocab_size, 64, 4, 128, rope_theta=3.0, qk_norm=True, **shape)
    recipe = dataclasses.replace(load_recipe("tiny-addition"), eval=EvalConfig())
    sampled = dataclasses.replace(recipe, model=model, data=TASK, steps=steps)
    fixed = dataclasses.replace(sampled, loops=LoopsConfig("fixed", MEAN_LOOPS))
    several, loops = Mixed(max_bits=8, max_digits=2, max_length=LENGTH), LoopsConfig("poisson", 5, max_loops=12)
    model = dataclasses.replace(model, vocab_size=several.vocab_size)
    # A third of the rows are brackets, which are learned last.
    mixed = dataclasses.replace(sampled, model=model, data=several, steps=steps * 3 // 2, loops=loops)
    deep, small = plain(fixed, 1 + MEAN_LOOPS), plain(fixed, 2)
    return {"sampled": sampled, "fixed": fixed, "deep": deep, "small": small, "mixed": mixed}


def by_row(model: OpenMythos, rows: int, seed: int) -> Result:
    """Return settling loop, nesting, place of the break and kind of the first bracket of strings of the longest length.

    `right` has, for broken and balanced strings by nesting, the share of rows that are right after each loop.
    """
    strings, lengths = LONGEST.draw(stream(seed, 0, Purpose.VALIDATION), rows)
    batch = LONGEST.encode(strings, lengths)
    right = rows_right(right_by_loop(model, batch, LOOPS), batch)
    deep, place = nesting(strings, lengths), first_break(strings, lengths)
    shares = {
        name: {int(d): right[:, which & (deep == d)].mean(axis=1).round(4).tolist() for d in np.unique(deep[which])}
        for name, which in (("broken", place >= 0), ("balanced", place < 0))
    }
    rows_of = {"nesting": deep, "place": place, "settled": settled(right), "kind": strings[:, 0] % KINDS}
    return {"right": shares, "rows": {name: values.tolist() for name, values in rows_of.items()}}


def by_task(model: OpenMythos, data: Mixed, rows: int, seed: int) -> Result:
    """Return for each task, on its longest rows, the share right by loop, and the number of rows by settling loop.

    Of brackets only strings that break are asked: "--" is what a model says before it has looked.
    """
    found = {}
    for i, part in enumerate(data.parts):
        longest = {"addition": Addition(data.max_digits, data.max_digits), "brackets": LONGEST}.get(part.name, part)
        batch = longest.batch(stream(seed, 1 + i, Purpose.VALIDATION), rows)
        if part.name == "brackets":
            batch = batch.take((batch.labels != NONE).all(-1))
        batch = data.translate(part, batch)
        right = rows_right(right_by_loop(model, batch, LOOPS), batch)
        found[part.name] = {"right": right.mean(axis=1).round(4).tolist(),
                            "settled": np.bincount(settled(right), minlength=LOOPS + 1).tolist()}  # fmt: skip
    return {"tasks": found}


def measure(run: Run) -> Result:
    """Return what is right after every loop and when rows settle, by row or, for the mixed model, by task."""
    rows, data = run.settings["rows"], run.config.data
    return by_task(run.model, data, rows, run.seed) if isinstance(data, Mixed) else by_row(run.model, rows, run.seed)


def settling(counts: ArrayLike) -> dict[str, Estimate]:
    """Return over seeds the mean loop of the rows that settle, and the share of rows that never do; NaN without rows.

    Args:
        counts: rows by settling loop, (S, loops + 1); those that never settle come first.
    """
    rows = np.asarray(counts, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        loops = rows[:, 1:] @ np.arange(1, rows.shape[1]) / rows[:, 1:].sum(1)
        return {"settles": Estimate(loops, ".2f"), "never": Estimate(rows[:, 0] / rows.sum(1), ".2f")}


def correlations(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Estimate]:
    """Return rank correlations with the settling loop, by seed, over broken rows that settle."""
    settle = [{name: x[(seed["place"] >= 0) & (seed["settled"] > 0)] for name, x in seed.items()} for seed in rows]
    return {
        name: Estimate([rank_correlation(seed["settled"], *(seed[x] for x in columns)) for seed in settle], "+.2f")
        for name, columns in CORRELATIONS.items()
    }


def side(correlation: Estimate, above: str, below: str, unclear: str) -> str:
    """Return the words for the side of 0 on which the interval over seeds lies, or the reason why there is none."""
    none, n = int(np.isnan(correlation.by_seed).sum()), len(correlation.by_seed)
    if none:
        return f"there is no correlation where all rows settle at one loop, as in {none} of {n} seeds"
    return correlation.side(0, above, below, "one seed, so no interval" if n < 2 else unclear)


def compare(learned: Mapping[str, Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the differences of the mixed model's learned tasks, and the sentence about them."""
    pairs = {f"{TASKS[a]} less {TASKS[b]}": learned[a]["settles"] - learned[b]["settles"]
             for a, b in itertools.combinations(learned, 2)}  # fmt: skip
    if not pairs:
        return [], "One model of three tasks did not learn two of them, so their loops cannot be compared."
    means = ", ".join(f"{task['title']} {task['settles']:.1f}" for task in learned.values())
    sides = [less.side(0) for less in pairs.values()]
    apart = f"{sum(side in ('above', 'below') for side in sides)} of {len(sides)} pairs of tasks differ"
    apart = "one seed, so no interval" if ONE_SEED in sides else apart
    left_out = "".join(f"; {title} was not learned" for name, title in TASKS.items() if name not in learned)
    say = f"In one model of three tasks rows settle after this many loops: {means}; {apart}{left_out}."
    return [{"pair": pair, "less": less} for pair, less in pairs.items()], say


def fill(r: Results) -> dict[str, Any]:
    """Return the correlations, the accuracy by nesting, and the tasks of the mixed model."""
    rows = {arm: [{x: np.array(run["rows"][x]) for x in run["rows"]} for run in r.runs[arm]] for arm in LOOPED}
    arms, nestings = {arm: correlations(rows[arm]) for arm in LOOPED}, []
    right = {arm: r[arm, "right.broken"] for arm in (*LOOPED, *PLAIN)}
    for depth in DEPTHS:
        loops = (seed["settled"][(seed["place"] >= 0) & (seed["nesting"] == depth)] for seed in rows["sampled"])
        found = settling([np.bincount(x, minlength=LOOPS + 1) for x in loops])
        nestings.append({"nesting": depth, **found} | {arm: by.where(nesting=depth) for arm, by in right.items()})
    last = {arm: by.at(loops=LOOPS) for arm, by in right.items()}
    less = {arm: last[arm] - last["sampled"] for arm in ("fixed", *PLAIN)}
    tasks: dict[str, dict[str, Any]] = {
        name: {"title": title, "right": r["mixed", f"tasks.{name}.right"][LOOPS]}
        | settling([run["tasks"][name]["settled"] for run in r.runs["mixed"]])
        for name, title in TASKS.items()
    }
    pairs, tasks_say = compare({name: task for name, task in tasks.items() if task["right"].mean >= LEARNED})
    doubt = "it should be 0: the rest is in doubt"
    deeper = (f"strings nested deeper settle {word}" for word in ("later", "earlier"))
    return arms | {
        "direction": side(arms["sampled"]["at_place"], *deeper, "no order that the seeds agree on"),
        "null_side": side(arms["sampled"]["null"], doubt, doubt, "as it should"),
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
    right = {title: r["mixed", f"tasks.{name}.right"] for name, title in TASKS.items()}
    curves = [curve(SHOWN, [found[n] for n in SHOWN], title) for title, found in right.items()]
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
