"""Addition: does a model that loops more often than it was trained to stay right, and what keeps it so?"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from open_mythos.analysis.per_loop import by_loop, is_right, rows_right
from open_mythos.experiments.study import Measure, Result, Results, Run, Study
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.recipes import load_recipe
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import Estimate
from open_mythos.tasks import Addition
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE, Batch
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.metrics import read_metrics

LOOPS = (1, 2, 4, 8, 16, 32)
DIGITS = (2, 3, 4)
COSINE_ROWS = 200
PUBLISHED = {
    2: (0.38, 0.53, 1.00, 0.98, 0.91, 0.62),
    3: (0.19, 0.50, 1.00, 0.98, 0.91, 0.65),
    4: (0.09, 0.16, 1.00, 0.94, 0.75, 0.45),
}
"""Exact match by digits at LOOPS: one model for 2 to 5 digits, dim 256, mean of 4 seeds."""
PUBLISHED_COSINES = {
    2: (0.711, 0.961, 0.985, 0.993, 0.999, 0.9995, 0.9995),
    3: (0.726, 0.967, 0.986, 0.992, 0.999, 0.9996, 0.9996),
    4: (0.745, 0.957, 0.977, 0.986, 0.998, 0.9992, 0.999),
}
"""Cosines of the states after loops t and t - 1, by digits at the t of COSINES_AT."""
COSINES_AT = (1, 2, 3, 4, 8, 16, 32)
GOAL = 0.99
COLLAPSE = 0.1
"""A fall of exact match that is surely larger than this is called a collapse."""


def arms(quick: bool) -> dict[str, TrainConfig]:
    """Sampled and fixed depth, the published protocol, and two runs of one seed. The quick form has few steps."""
    recipe = load_recipe("tiny-addition")
    steps = 150 if quick else recipe.steps
    sampled = dataclasses.replace(recipe, steps=steps, eval=EvalConfig(every=25, rows=512, loops=(4,)))
    deeper, deepest = dataclasses.replace(recipe.model, max_loop_iters=16), LoopsConfig("poisson", 16, max_loops=32)
    return {
        "sampled": sampled,
        "fixed": dataclasses.replace(sampled, loops=LoopsConfig("fixed", 4)),
        "published": published(100 if quick else 3000),
        "deep": dataclasses.replace(sampled, model=deeper, loops=deepest, steps=50 if quick else steps),
        "four": dataclasses.replace(sampled, data=Addition(2, 4), steps=100 if quick else 2 * steps),
    }


def published(steps: int) -> TrainConfig:
    """Return the recipe `addition-dgx` at half its width, on 2 and 3 digits; the warm-up has its share of the steps."""
    cfg = load_recipe("addition-dgx")
    model = dataclasses.replace(cfg.model, dim=128, n_heads=4, n_kv_heads=1, expert_dim=256)
    schedule = dataclasses.replace(cfg.schedule, warmup_steps=cfg.schedule.warmup_steps * steps // cfg.steps)
    scored = EvalConfig(every=25 if steps < 500 else 100, rows=512, loops=(4,))
    return dataclasses.replace(cfg, model=model, data=Addition(2, 3), steps=steps, schedule=schedule, eval=scored)


def measure(run: Run) -> Result:
    """Return exact match and loops used by digits and loops allowed, cosines by digits and loop, and the curve of
    training as (steps, exact match at 4 loops). All arms of a seed answer the same problems."""
    task, found = run.config.data, {"accuracy": {}, "used": {}, "cosine": {}}
    for digits in range(task.min_digits, task.max_digits + 1):
        batch = Addition(digits, digits).batch(stream(run.seed, digits, Purpose.VALIDATION), run.settings["rows"])
        found["accuracy"][digits], found["used"][digits] = by_loops(run.model, batch, LOOPS)
        found["cosine"][digits] = cosines(run.model, batch.take(slice(COSINE_ROWS)), max(LOOPS))
    lines = read_metrics(run.folder / "metrics.jsonl")
    curve = [(int(line["step"]), line["val/accuracy@4"]) for line in lines if "val/accuracy@4" in line]
    return found | {"curve": curve}


def by_loops(model: OpenMythos, batch: Batch, loops: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """Return by loops allowed the share of rows with every label right, and the mean loops of the answers' tokens.

    A row is right exactly when greedy decoding would write it: see `train.evaluate.Score`.
    """
    right = rows_right(by_loop(model, batch, loops, is_right), batch).mean(1).tolist()
    if model.cfg.halting == "none":
        return right, [float(n) for n in loops]
    with evaluating(model):
        used = [model(batch.input_ids, n, trace=True).exit_loop[batch.labels != IGNORE] + 1 for n in loops]
    return right, [x.double().mean().item() for x in used]


def cosines(model: OpenMythos, batch: Batch, n_loops: int) -> list[float | None]:
    """Return the mean cosine of the states after loops t and t - 1, by t from 1, at the answers' tokens; none halts.

    The first is None where the state before the first loop is zero, which has no direction.
    """
    with evaluating(model):
        ids = batch.input_ids
        hidden = model(ids, n_loops, exit="fixed", trace=True).hidden
        if model.cfg.initial_state == "e":
            first = model.encode(ids, model.make_view((ids.shape[0], ids.shape[1])))
            hidden = torch.cat([first[None], hidden])
        states = hidden[:, batch.labels != IGNORE]
        values = F.cosine_similarity(states[1:], states[:-1], dim=-1).mean(-1).tolist()
    return [None] * (n_loops - len(values)) + values


def holds(r: Results, arm: str) -> str:
    """Return whether every cell at 4 loops and more reaches the goal in the mean over seeds, as a clause."""
    values = r[arm, "accuracy"].values[:, :, LOOPS.index(4) :]
    lowest = values.mean(0).min()
    return (
        f"the cells at 4 to {LOOPS[-1]} loops {'reach' if lowest >= GOAL else 'do not all reach'} {GOAL} (lowest "
        f"{lowest:.3f} in the mean of {r.n_seeds(arm)}, {values.min():.3f} in a single run)"
    )


def change(four: Estimate, most: Estimate) -> str:
    """Return the word for what exact match does from 4 loops to the most."""
    fall = four - most
    mean, low, high = fall.interval
    if four.mean < 0.5:
        return "has not learned the task"
    if math.isnan(low):
        return f"changes by {-mean:+.3f} in its one run"
    if low > 0:
        return "collapses" if low > COLLAPSE else "falls"
    if high < 0:
        return "rises"
    if max(-low, high) < COLLAPSE:
        return "stays"
    fell, n = int((fall.by_seed > COLLAPSE).sum()), len(fall.by_seed)
    return f"falls by more than {COLLAPSE} in {fell} of {n} seeds, too mixed for an interval to decide"


def click(run: Result) -> int | None:
    """Return the steps at the first evaluation in training that reaches the goal at 4 loops."""
    return next((step for step, accuracy in run["curve"] if accuracy >= GOAL), None)


def seen(cfg: Result, digits: int) -> float:
    """Return the share of the problems of 2 or 3 digits that training shows, when half the rows have so many."""
    return -math.expm1(-cfg["steps"] * cfg["batch_size"] / 2 / (9 * 10 ** (digits - 1)) ** 2)


def by_seed(r: Results, arm: str) -> Iterator[dict[str, Any]]:
    """Yield the numbers of each run; those by digits are joined by slashes."""
    for run, accuracy in zip(r.runs[arm], r[arm, "accuracy"].values[:, :, LOOPS.index(4) :], strict=True):
        four, most = (" / ".join(f"{x:.3f}" for x in accuracy[:, i]) for i in (0, -1))
        yield run | {"title": r.title(arm), "click": click(run) or "never", "four": four, "most": most,
                     "lowest": accuracy.min()}  # fmt: skip


def beside(theirs: Sequence[float], xs: Sequence[int], arms: Mapping[str, Measure], form: str) -> list[dict[str, Any]]:
    """Return a row for each x with the published number and those of the arms; some have no first cosine."""
    found = {arm: [measured[x] for x in xs] for arm, measured in arms.items()}
    ours = {arm: ["none" if math.isnan(y.mean) else f"{y:{form}}" for y in ys] for arm, ys in found.items()}
    return [{"x": x, "theirs": theirs[i]} | {arm: ys[i] for arm, ys in ours.items()} for i, x in enumerate(xs)]


def fill(r: Results) -> dict[str, Any]:
    """Return the numbers of each arm and run, and the tables beside the published ones."""
    arms: dict[str, dict[str, Any]] = {}
    for arm in r.runs:
        # 2 and 3 digits together, which all arms have.
        cells = r[arm, "accuracy"].values[:, :2].mean(1)
        four, most = Estimate(cells[:, LOOPS.index(4)]), Estimate(cells[:, -1])
        numbers = f"{four} at 4 loops, {most} at {LOOPS[-1]}"
        arms[arm] = r.arm(arm) | {"change": change(four, most), "numbers": numbers, "holds": holds(r, arm)}
        arms[arm]["capital"] = r.title(arm).capitalize()
    tables = {}
    for d in DIGITS:
        have = [arm for arm in arms if d in r[arm, "accuracy"].axes["digits"]]
        exact, cosine = ({arm: r[arm, name].where(digits=d) for arm in have} for name in ("accuracy", "cosine"))
        tables[f"exact_{d}"] = beside(PUBLISHED[d], LOOPS, exact, ".3f")
        tables[f"cosines_{d}"] = beside(PUBLISHED_COSINES[d], COSINES_AT, cosine, ".4f")
    few = [
        {"loops": n, "digits": d, "theirs": PUBLISHED[d][i], "ours": ours, "side": ours.side(PUBLISHED[d][i])}
        for i, n in enumerate(LOOPS[:2])
        for d in (2, 3)
        for ours in [r["sampled", "accuracy"].at(digits=d, loops=n)]
    ]
    cfg = arms["sampled"]["config"]
    return {**arms, **tables} | {
        "arms": arms.values(),
        "few": few,
        "runs": [run for arm in arms for run in by_seed(r, arm)],
        "used": r["published", "used"].where(digits=3),
        "steps": cfg["steps"],
        "rows": r.runs["sampled"][0]["asked"]["rows"],
        "seen": {d: seen(cfg, d) for d in (2, 3)},
    }


def draw_loops(r: Results, path: Path) -> None:
    panels: dict[str, list[Curve]] = {}
    for d, theirs in PUBLISHED.items():
        panels[f"{d} digits"] = [Curve(LOOPS, theirs, "as published, dim 256", color=None)]
        for arm in r.runs:
            if d in r[arm, "accuracy"].axes["digits"]:
                panels[f"{d} digits"].append(r[arm, "accuracy"].where(digits=d).curve(r.title(arm)))
    draw_curves(panels, path, ("loops", "exact match"), ticks=LOOPS, log="x", shares=True)


def draw_training(r: Results, path: Path) -> None:
    panels = {}
    for arm, runs in r.runs.items():
        last = runs[0]["curve"][-1][0]
        curves = [
            Curve([step for step, _ in run["curve"]], [share for _, share in run["curve"]], f"seed {run['seed']}", i)
            for i, run in enumerate(runs)
        ]
        panels[r.title(arm)] = [Curve((0, last), (GOAL, GOAL), str(GOAL), color=None), *curves]
    draw_curves(panels, path, ("steps", "exact match at 4 loops"), shares=True)


STUDY = Study(
    title="Addition: more loops than in training",
    question="Does a model that loops more often than it was trained to stay right, and what keeps it so?",
    page=Path(__file__).with_suffix(".md"),
    cost=("3 min", "90 min"),
    arms=arms,
    titles={"sampled": "sampled depth, mean 4", "fixed": "fixed depth 4", "published": "published protocol, this size",
            "deep": "sampled depth, mean 16", "four": "sampled depth, up to 4 digits"},
    n_seeds={"deep": 1, "four": 1},
    settings=lambda config, quick: {"loops": LOOPS, "rows": 500 if quick else 1000},
    measure=measure,
    axes={"accuracy": {"digits": DIGITS, "loops": LOOPS}, "used": {"digits": DIGITS, "loops": LOOPS},
          "cosine": {"digits": DIGITS, "loops": range(1, LOOPS[-1] + 1)}},
    fill=fill,
    figures={"loops": draw_loops, "training": draw_training},
)  # fmt: skip
