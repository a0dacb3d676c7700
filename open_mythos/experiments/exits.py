"""Does depth follow difficulty? Accuracy against mean loops for every halting rule, an oracle, and learned halting.

Shapes: B rows, T tokens, S seeds, L loops.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_mythos.analysis.per_loop import is_right, right_by_loop, settled
from open_mythos.experiments.brackets import arms as bracket_arms
from open_mythos.experiments.difficulty import DISTANCES, HARD, WITHIN, questions
from open_mythos.experiments.given_depths import shuffled, with_exits
from open_mythos.experiments.study import Result, Results, Run, Study, curve, vary
from open_mythos.nn.halting import HaltingRule
from open_mythos.recipes import load_recipe
from open_mythos.reports.document import Table
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import Estimate, rank_correlation
from open_mythos.tasks.task import IGNORE
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.losses import LossConfig

THRESHOLDS = {
    "latent_diff": (0.03, 0.1, 0.2, 0.4, 0.8),
    "second_difference": (0.03, 0.1, 0.2, 0.4, 0.8),
    "kl": (1e-4, 1e-3, 1e-2, 0.1, 1.0),
}
ACT_THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.99)
PONDER = 0.01
ACT_LOOPS = 6
DEEPEST = 12
"""Loops of the evaluation."""
END_ONLY = "end only"
"""The recipe for khop whose label is the end of the chain after the last loop, instead of a hop after each."""
NUMBERS = ("loops", "loops_of_all_tokens", "accuracy", "shuffled", "rho", "rho_of_any_place", "shuffled_rho")
LOSS = 0.01
"""Accuracy that a threshold may cost and still be chosen."""


def arms(quick: bool) -> dict[str, TrainConfig]:
    """Return each task's recipe, and the same with learned halting, without and with a ponder cost."""
    khop, addition = load_recipe("tiny-khop"), load_recipe("tiny-addition")
    bases = {
        "khop": vary(khop, steps=200 if quick else khop.steps, loops={"ramp_steps": 50 if quick else 150}),
        "addition": vary(addition, steps=60 if quick else addition.steps),
        "brackets": bracket_arms(quick)["sampled"],
    }
    found = {}
    for task, base in bases.items():
        base = vary(base, eval={"every": 0})
        found[f"{task}, rules"] = base
        # One loss at the end, and one cap for all rows: the model decides how deep a token goes.
        loops = LoopsConfig("fixed", ACT_LOOPS, max_loops=ACT_LOOPS, ramp_steps=base.steps // 4)
        if task == "khop":
            base = found[f"{task}, rules, {END_ONLY}"] = vary(base, data={"target": "root"}, losses=LossConfig())
        model = {"halting": "act", "max_loop_iters": ACT_LOOPS}
        for ponder in (0.0, PONDER):
            learned = vary(base, model=model, loops=loops, losses=LossConfig(ponder=ponder))
            found[f"{task}, ACT, ponder {ponder:g}"] = learned
    return found


def measure(run: Run) -> Result:
    """Measure accuracy and loops of the labelled tokens: at fixed depth, by the oracles, and by every rule."""
    model, n_loops, seed = run.model, run.settings["loops"], run.seed + 1_000_000
    batch, difficulty, group = questions(run.config.data, run.settings["rows"], seed)
    asked = batch.labels != IGNORE
    graded = asked & (difficulty >= 0)
    hard = difficulty[graded]
    right = right_by_loop(model, batch, n_loops)

    def point(name: str, threshold: float | None, exit: HaltingRule | Tensor) -> Result:
        hit, loops = with_exits(model, batch, exit, is_right, n_loops)
        other = loops.clone()
        other[asked] = shuffled(loops[asked], seed)
        control, _ = with_exits(model, batch, other, is_right, n_loops)
        means = {"loops": loops[asked], "accuracy": hit[asked], "shuffled": control[asked]}
        return {
            "rule": name,
            "threshold": threshold,
            "loops_of_all_tokens": loops.double().mean().item(),
            **{key: x.double().mean().item() for key, x in means.items()},
            "rho": rank_correlation(loops[graded], hard, group[graded]),
            "rho_of_any_place": rank_correlation(loops[graded], hard),
            "shuffled_rho": rank_correlation(other[graded], hard, group[graded]),
            "by_difficulty": _by(hard, loops[graded]),
            "accuracy_by_difficulty": _by(hard, hit[graded]),
        }

    points, thresholds = [], {"act": ACT_THRESHOLDS}
    if model.cfg.halting != "act":
        thresholds = THRESHOLDS
        # An answer that is never right gets 1 loop, which costs the least.
        stays = torch.from_numpy(settled(right[:, asked].numpy())).clamp(min=1)
        first = right[:, asked].int().argmax(0) + 1
        for name, chosen in (("oracle, stays right", stays), ("oracle, first right", first)):
            depths = torch.full_like(batch.labels, n_loops)
            depths[asked] = chosen
            points.append(point(name, None, depths))
    points += [point(name, at, model.exit_rule(name, at)) for name in thresholds for at in thresholds[name]]
    return {
        "fixed": right[:, asked].double().mean(1).tolist(),
        "commonest": (batch.labels[asked].bincount().max() / asked.sum()).item(),
        "points": points,
    }


def _by(hard: Tensor, values: Tensor) -> dict[str, float]:
    return {str(level): values[hard == level].double().mean().item() for level in hard.unique().tolist()}


Row = dict[str, Any]
"""A rule at a threshold for each seed, with its `results` by seed and the estimates made from them."""


def row(arm: str, results: list[Result], runs: list[Result]) -> Row:
    """Summarise a rule's results by seed."""
    rule, at = results[0]["rule"], sorted({result["threshold"] for result in results} - {None})
    name, places = arm if rule == "act" else rule + arm.removeprefix("rules"), [f"{x:g}" for x in at]
    values = {key: np.array([result[key] for result in results], dtype=float) for key in NUMBERS}
    # A correlation is 0 where all tokens of a group ran equally deep: depth follows nothing.
    found = {key: Estimate(np.nan_to_num(x)) for key, x in values.items()}
    # One depth for all at the same mean loops; between whole numbers a mix of two depths.
    depths = range(1, len(runs[0]["fixed"]) + 1)
    same = [np.interp(n, depths, run["fixed"]) for n, run in zip(values["loops"], runs, strict=True)]
    return found | {
        "arm": arm,
        "rule": rule,
        "name": name,
        "threshold": ", ".join(places) or "-",
        "label": ", ".join([name, *places]),
        "gain": found["accuracy"] - found["shuffled"],
        "ahead": found["accuracy"] - Estimate(same),
        "follows": follows(found["rho"]),
        "constant": f"{np.isnan(values['rho_of_any_place']).sum()} of {len(results)}",
        "results": results,
    }


def rows(r: Results, task: str) -> dict[str, tuple[list[Row], Row]]:
    """Return by rule its thresholds, and the row with the threshold that `choose` gives each seed."""
    found = {}
    for arm, runs in r.runs.items():
        if arm.startswith(f"{task}, "):
            name = arm.removeprefix(f"{task}, ")
            for rule in dict.fromkeys(point["rule"] for point in runs[0]["points"]):
                points = [[point for point in run["points"] if point["rule"] == rule] for run in runs]
                chosen = row(name, choose(points, np.array([run["fixed"] for run in runs])), runs)
                found[chosen["name"]] = [row(name, [*at], runs) for at in zip(*points, strict=True)], chosen
    return found


def choose(points: list[list[Result]], fixed: np.ndarray) -> list[Result]:
    """Choose a rule's threshold for each seed by the answers of the other seeds; a single seed's by its own.

    It is the one with the fewest loops for at most LOSS of the accuracy at any depth, `fixed` (S, L); if none is so
    good, the most accurate.
    """
    loops, accuracy = (np.array([[point[key] for point in own] for own in points]) for key in ("loops", "accuracy"))
    chosen = []
    for seed, own in enumerate(points):
        others = [i for i in range(len(points)) if i != seed] or [seed]
        good = accuracy[others].mean(0) >= fixed[others].mean(0).max() - LOSS
        cost = np.where(good, loops[others].mean(0), np.inf) if good.any() else -accuracy[others].mean(0)
        chosen.append(own[cost.argmin()])
    return chosen


def follows(x: Estimate) -> str:
    """Name what the interval of a correlation or a gain shows."""
    return "one seed, no interval" if len(x.by_seed) < 2 else x.side(0, "yes", "the reverse", "not shown")


def by_difficulty(chosen: list[Row], key: str) -> tuple[list[int], list[list[Estimate]]]:
    """Return the difficulties that every seed has, and at these the estimates of a number of each row."""
    levels = sorted(set.intersection(*({*map(int, result[key])} for result in chosen[0]["results"])))
    return levels, [
        [Estimate([result[key][str(level)] for result in row["results"]]) for level in levels] for row in chosen
    ]


def numbers(r: Results, task: str) -> dict[str, Any]:
    """Return what the page states of a task."""
    found = rows(r, task)
    chosen = [row for _, row in found.values()]
    rules = {name: each for name, each in found.items() if not name.startswith("oracle")}
    over_thresholds = []
    for name, (thresholds, _) in rules.items():
        words = [row["follows"] for row in thresholds]
        reverse = f", the reverse at {words.count('the reverse')}" * ("the reverse" in words)
        over_thresholds.append(f"{name} at {words.count('yes')} of {len(words)}{reverse}")
    yes = ", ".join(name for name, (_, row) in rules.items() if row["follows"] == "yes") or "no rule"
    better = ", ".join(name for name, (_, row) in rules.items() if follows(row["gain"]) == "yes") or "none"
    verdict = (
        f"At these thresholds depth follows difficulty for {yes}; better than the same depths at random answers: "
        f"{better}."
    )
    if len(chosen[0]["results"]) < 2:
        verdict = "With one seed there is no interval, so nothing is claimed."

    def table(key: str, form: str) -> Table:
        levels, estimates = by_difficulty(chosen, key)
        lines = zip(chosen, estimates, strict=True)
        return Table(["rule", *levels], [[row["label"], *(f"{x:{form}}" for x in line)] for row, line in lines])

    fixed = {arm: [run["fixed"] for run in runs] for arm, runs in r.runs.items() if arm.startswith(f"{task}, ")}
    return {
        "said": ", ".join(f"{name} {row['rho']:.2f}" for name, (_, row) in rules.items()),
        "oracle": found["oracle, stays right"][1]["rho"],
        "verdict": verdict,
        "over_thresholds": "; ".join(over_thresholds),
        "fixed": Table(
            ["loops", *range(1, len(fixed[f"{task}, rules"][0]) + 1)],
            [[arm.removeprefix(f"{task}, "), *(f"{x:.3f}" for x in np.mean(x, 0))] for arm, x in fixed.items()],
        ),
        "used": table("by_difficulty", ".2f"),
        "right": table("accuracy_by_difficulty", ".3f"),
        "rows": [row for thresholds, _ in found.values() for row in thresholds],
        "correlations": chosen,
    }


def fill(r: Results) -> dict[str, Any]:
    """Return what fills the page: the numbers of every task."""
    tasks = {task: numbers(r, task) for task in HARD}
    return tasks | {f"{task}_{name}": tasks[task][name] for task in HARD for name in ("rows", "correlations")}


def is_drawn(name: str) -> bool:
    """Return whether a rule is in the figures: on the model with the end as its only label, one rule is enough."""
    return END_ONLY not in name or name.startswith("kl")


def draw_exits(r: Results, path: Path, task: str) -> None:
    """Draw accuracy by mean loops, for every rule and for every token at the same depth."""
    runs = r.runs[f"{task}, rules"]
    fixed = np.array([run["fixed"] for run in runs]).T
    curves = [curve(range(1, len(fixed) + 1), [*map(Estimate, fixed)], "every token at the same depth")]
    for name, (found, _) in rows(r, task).items():
        lines = [("accuracy", name)] * is_drawn(name) + [("shuffled", "depths of kl, shuffled")] * (name == "kl")
        at = [row["loops"].mean for row in found]
        curves += [curve(at, [row[key] for row in found], label) for key, label in lines]
    chance = float(np.mean([run["commonest"] for run in runs]))
    curves.append(Curve((1, DEEPEST), (chance, chance), "one answer for all, the commonest", None))
    draw_curves({f"{task}: accuracy by mean loops": curves}, path, ("mean loops of answers", "accuracy"))


def draw_depth(r: Results, path: Path, task: str) -> None:
    """Plot mean loops by difficulty for each rule at the threshold of `choose`."""
    chosen = [row for name, (_, row) in rows(r, task).items() if is_drawn(name)]
    levels, estimates = by_difficulty(chosen, "by_difficulty")
    curves = [curve(levels, line, row["name"]) for row, line in zip(chosen, estimates, strict=True)]
    draw_curves({f"{task}: loops by difficulty": curves}, path, (HARD[task], "mean loops"))


def page() -> str:
    """Return the page, whose finding and report on one task are repeated for each."""
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    for heading in ("# Finding\n", "# Report\n"):
        before, part = text.split(heading)
        part, *rest = part.split("\n# ")
        each = [part.replace("TASK", task).replace("HARD", HARD[task]).replace("WITHIN", WITHIN[task]) for task in HARD]
        text = "\n# ".join([before + heading + "".join(each), *rest])
    return text


STUDY = Study(
    title="Does depth follow difficulty?",
    question="When a rule or a learned halting decides how many loops an answer gets, do the hard ones get more, and "
    "what does that buy over one depth for all?",
    page=page(),
    cost=("4 min", "80 min"),
    arms=arms,
    settings=lambda cfg, quick: {
        "rows": 400 if quick else 1000,
        "loops": DEEPEST,
        "distances": [*DISTANCES],
        "thresholds": [THRESHOLDS, ACT_THRESHOLDS],
    },
    measure=measure,
    fill=fill,
    figures={f"{task}-exits": functools.partial(draw_exits, task=task) for task in HARD}
    | {f"{task}-depth": functools.partial(draw_depth, task=task) for task in HARD},
)
