"""Does depth follow difficulty? Accuracy against mean loops for every halting rule, an oracle, and learned halting.

Shapes: B rows, T tokens, D width, L loops.
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_mythos.analysis.per_loop import right_by_loop, settled
from open_mythos.experiments.adaptive import GivenDepths, shuffled
from open_mythos.experiments.brackets import arms as bracket_arms
from open_mythos.experiments.study import Result, Results, Run, Study
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.halting import ACT, HaltingRule
from open_mythos.recipes import load_recipe
from open_mythos.reports.document import Table
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import Estimate, over_seeds, rank_correlation
from open_mythos.tasks import Addition, Brackets, KHop
from open_mythos.tasks.addition import PLUS
from open_mythos.tasks.brackets import END, first_break, nesting
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE, Batch
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.losses import LossConfig

Task = KHop | Addition | Brackets
HARD = {
    "khop": "hops to the answer",
    "addition": "length of the chain of carries into the digit",
    "brackets": "nesting before the break",
}
WITHIN = {
    "khop": "",
    "addition": ", among digits of one place",
    "brackets": ", among digits of one place in strings that break at the same",
}
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
DISTANCES = range(1, 9)
END_ONLY = "end only"
"""The recipe for khop whose label is the end of the chain after the last loop, instead of a hop after each."""
NUMBERS = ("loops", "loops_of_all_tokens", "accuracy", "shuffled", "rho", "rho_of_any_place", "shuffled_rho")
LOSS = 0.01
"""Accuracy that a threshold may cost and still be chosen."""


def arms(quick: bool) -> dict[str, TrainConfig]:
    """Return each task's recipe, and the same with learned halting, without and with a ponder cost."""
    khop, addition = load_recipe("tiny-khop"), load_recipe("tiny-addition")
    bases = {
        "khop": dataclasses.replace(
            khop,
            steps=200 if quick else khop.steps,
            loops=dataclasses.replace(khop.loops, ramp_steps=50 if quick else 150),
        ),
        "addition": dataclasses.replace(addition, steps=60 if quick else addition.steps),
        "brackets": bracket_arms(quick)["sampled"],
    }
    found = {}
    for task, base in bases.items():
        base = dataclasses.replace(base, eval=dataclasses.replace(base.eval, every=0))
        found[f"{task}, rules"] = base
        # One loss at the end, and one cap for all rows: the model decides how deep a token goes.
        data = dataclasses.replace(base.data, target="root") if isinstance(base.data, KHop) else base.data
        if data != base.data:
            found[f"{task}, rules, {END_ONLY}"] = dataclasses.replace(base, data=data, losses=LossConfig())
        for ponder in (0.0, PONDER):
            found[f"{task}, ACT, ponder {ponder:g}"] = dataclasses.replace(
                base,
                model=dataclasses.replace(base.model, halting="act", max_loop_iters=ACT_LOOPS),
                data=data,
                loops=LoopsConfig("fixed", ACT_LOOPS, max_loops=ACT_LOOPS, ramp_steps=base.steps // 4),
                losses=LossConfig(ponder=ponder),
            )
    return found


def questions(task: Task, rows: int, seed: int) -> tuple[Batch, Tensor, Tensor]:
    """Draw fresh questions, and return with them each token's difficulty and its group, (B, T) int64 both.

    The difficulty is hops to the answer, carries on the way (see `carries`), or the nesting of a string that breaks.
    Tokens of a group differ in nothing that a rule might go by without solving; in brackets they also have one answer.
    """
    rng = stream(seed, 0, Purpose.VALIDATION)
    if isinstance(task, Brackets):
        strings, lengths = dataclasses.replace(task, min_length=task.max_length).draw(rng, rows)
        batch = task.encode(strings, lengths)
        deep, broken = nesting(strings, lengths), first_break(strings, lengths)
        # Balanced strings have an answer that needs no reading; the replaced bracket gives a few another nesting.
        deep = np.where((broken < 0) | (deep > task.max_nesting) | (deep < 1), -1, deep)
        at = torch.arange(task.seq_len)
        hard = torch.from_numpy(deep)[:, None].expand_as(batch.labels).masked_fill(batch.labels == END, -1)
        return batch, hard, 100 * torch.from_numpy(broken)[:, None] + at
    if isinstance(task, Addition):
        batch = task.validation_batch(rng, rows)
        digits = (batch.input_ids == PLUS).int().argmax(1)
        return batch, carries(batch.input_ids), 100 * digits[:, None] + torch.arange(task.seq_len)
    parts = []
    for distance in DISTANCES:
        asked = dataclasses.replace(task, target="root", min_distance=distance, max_distance=distance)
        parts.append(asked.batch(rng, rows // len(DISTANCES)))
    ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("input_ids", "labels"))
    distance = torch.arange(DISTANCES[0], DISTANCES[-1] + 1).repeat_interleave(rows // len(DISTANCES))
    return Batch(ids, labels), distance[:, None].expand_as(ids).contiguous(), torch.zeros_like(ids)


def carries(ids: Tensor) -> Tensor:
    """Count, in "A+B=R" with R reversed, the carries in a row that end at each token that predicts a digit of R.

    The others have -1: the end is known by its position, and is no easy digit.
    """
    found = torch.full_like(ids, -1)
    for row, text in zip(found, ids.tolist(), strict=True):
        d = text.index(PLUS)
        a, b = text[:d][::-1], text[d + 1 : 2 * d + 1][::-1]
        chain, carry = 0, 0
        for place in range(d):
            row[2 * d + 1 + place] = chain
            carry = int(a[place] + b[place] + carry > 9)
            chain = chain + 1 if carry else 0
        if carry:
            row[3 * d + 1] = chain
    return found


def answered(model: OpenMythos, batch: Batch, rule: HaltingRule | None, n_loops: int) -> tuple[Tensor, Tensor]:
    """Return whether each token is right, and the loops that it ran, (B, T) each."""
    with evaluating(model):
        out = model(batch.input_ids, n_loops, exit=rule, trace=True)
    return out.logits.argmax(-1) == batch.labels, out.exit_loop + 1


def measure(run: Run) -> Result:
    """Measure accuracy and loops of the labelled tokens: at fixed depth, by the oracles, and by every rule."""
    model, n_loops, seed = run.model, run.settings["loops"], run.seed + 1_000_000
    batch, difficulty, group = questions(run.config.data, run.settings["rows"], seed)
    asked = batch.labels != IGNORE
    graded = asked & (difficulty >= 0)
    hard = difficulty[graded]
    right = right_by_loop(model, batch, n_loops)
    assert model.recurrent is not None
    act = model.recurrent.act

    def point(name: str, threshold: float | None, rule: HaltingRule | None) -> Result:
        hit, loops = answered(model, batch, rule, n_loops)
        other = loops.clone()
        other[asked] = shuffled(loops[asked], seed)
        control_rule = GivenDepths(other, None if act is None else ACT(act, 1.0))
        control, _ = answered(model, batch, control_rule, n_loops)
        return {
            "rule": name,
            "threshold": threshold,
            "loops": loops[asked].double().mean().item(),
            "loops_of_all_tokens": loops.double().mean().item(),
            "accuracy": hit[asked].double().mean().item(),
            "shuffled": control[asked].double().mean().item(),
            "rho": rank_correlation(loops[graded], hard, group[graded]),
            "rho_of_any_place": rank_correlation(loops[graded], hard),
            "shuffled_rho": rank_correlation(other[graded], hard, group[graded]),
            "by_difficulty": _by(hard, loops[graded]),
            "accuracy_by_difficulty": _by(hard, hit[graded]),
        }

    points = []
    if act is None:
        # An answer that is never right gets 1 loop, which costs the least.
        stays = torch.from_numpy(settled(right[:, asked].numpy())).clamp(min=1)
        first = right[:, asked].int().argmax(0) + 1
        for name, chosen in (("oracle, stays right", stays), ("oracle, first right", first)):
            depths = torch.full_like(batch.labels, n_loops)
            depths[asked] = chosen
            points.append(point(name, None, GivenDepths(depths)))
    for name, thresholds in (THRESHOLDS if act is None else {"act": ACT_THRESHOLDS}).items():
        points += [point(name, threshold, model.exit_rule(name, threshold)) for threshold in thresholds]
    return {
        "fixed": right[:, asked].double().mean(1).tolist(),
        "commonest": (batch.labels[asked].bincount().max() / asked.sum()).item(),
        "points": points,
    }


def _by(hard: Tensor, values: Tensor) -> dict[str, float]:
    return {str(level): values[hard == level].double().mean().item() for level in hard.unique().tolist()}


Row = dict[str, Any]
"""A rule at one threshold, with its `results` by seed and the estimates made from them."""


def row(arm: str, results: list[Result], fixed: np.ndarray) -> Row:
    """Summarise the results of a rule by seed; `fixed` (S, L) is the accuracy with every token at the same depth."""
    rule, thresholds = results[0]["rule"], sorted({result["threshold"] for result in results} - {None})
    name = arm if rule == "act" else rule + arm.removeprefix("rules")
    values = {key: np.array([result[key] for result in results], dtype=float) for key in NUMBERS}
    # A correlation is 0 where all tokens of a group ran equally deep: depth follows nothing.
    found = {key: Estimate(np.nan_to_num(x)) for key, x in values.items()}
    # One depth for all at the same mean loops; between whole numbers a mix of two depths.
    depths = range(1, fixed.shape[1] + 1)
    same = [np.interp(n, depths, accuracy) for n, accuracy in zip(values["loops"], fixed, strict=True)]
    return found | {
        "arm": arm,
        "rule": rule,
        "name": name,
        "threshold": ", ".join(f"{x:g}" for x in thresholds) or "-",
        "label": ", ".join([name, *(f"{x:g}" for x in thresholds)]),
        "gain": found["accuracy"] - found["shuffled"],
        "ahead": found["accuracy"] - Estimate(same),
        "follows": follows(found["rho"]),
        "constant": f"{np.isnan(values['rho_of_any_place']).sum()} of {len(results)}",
        "results": results,
        "fixed": fixed,
    }


def rows(r: Results, task: str) -> list[Row]:
    """Return every rule and threshold of a task's models."""
    return [
        row(arm.removeprefix(f"{task}, "), list(results), np.array([run["fixed"] for run in runs]))
        for arm, runs in r.runs.items()
        if arm.startswith(f"{task},")
        for results in zip(*(run["points"] for run in runs), strict=True)
    ]


def choose(found: list[Row]) -> list[Row]:
    """Choose a result for each rule and seed, at the threshold that the answers of the other seeds choose.

    It is the one with the fewest loops for at most LOSS of the accuracy; if none is so good, the most accurate. A
    single seed chooses on its own answers.
    """
    chosen = []
    for _, group in itertools.groupby(found, key=lambda row: row["name"]):
        thresholds, results = list(group), []
        fixed = thresholds[0]["fixed"]
        for seed in range(len(fixed)):
            others = [i for i in range(len(fixed)) if i != seed] or [seed]
            best = fixed[others].mean(0).max()
            accuracy, loops = ([x[key].by_seed[others].mean() for x in thresholds] for key in ("accuracy", "loops"))
            good = [t for t, value in enumerate(accuracy) if value >= best - LOSS]
            at = min(good, key=lambda t: loops[t]) if good else int(np.argmax(accuracy))
            results.append(thresholds[at]["results"][seed])
        chosen.append(row(thresholds[0]["arm"], results, fixed))
    return chosen


def follows(x: Estimate) -> str:
    """Name what the interval of a correlation or a gain shows."""
    return "one seed, no interval" if len(x.by_seed) < 2 else x.side(0, "yes", "the reverse", "not shown")


def finding(task: str, chosen: list[Row]) -> str:
    """Write which rules' depths follow difficulty."""
    (oracle,) = (row for row in chosen if row["name"] == "oracle, stays right")
    rules = [row for row in chosen if not row["name"].startswith("oracle")]
    yes = ", ".join(row["name"] for row in rules if row["follows"] == "yes") or "no rule"
    better = ", ".join(row["name"] for row in rules if follows(row["gain"]) == "yes") or "none"
    verdict = (
        f"At these thresholds depth follows difficulty for {yes}; better than the same depths at random answers: "
        f"{better}."
    )
    if len(oracle["results"]) < 2:
        verdict = "With one seed there is no interval, so nothing is claimed."
    said = ", ".join(f"{row['name']} {row['rho']:.2f}" for row in rules)
    correlation = f"rank correlation of loops used with {HARD[task]}{WITHIN[task]}"
    return f"{task}: {correlation}: {said}; oracle {oracle['rho']:.2f}. {verdict}"


def by_difficulty(chosen: list[Row], key: str) -> dict[int, list[Estimate]]:
    """Estimate a number of each row by difficulty, for the difficulties that every seed has."""
    levels = set.intersection(*({*map(int, result[key])} for result in chosen[0]["results"]))
    return {
        level: [Estimate([result[key][str(level)] for result in row["results"]]) for row in chosen]
        for level in sorted(levels)
    }


def numbers(r: Results, task: str) -> dict[str, Any]:
    """Return what the page states of a task."""
    found = rows(r, task)
    chosen = choose(found)
    over_thresholds = []
    for name in (row["name"] for row in chosen if not row["name"].startswith("oracle")):
        words = [row["follows"] for row in found if row["name"] == name]
        reverse = f", the reverse at {words.count('the reverse')}" * ("the reverse" in words)
        over_thresholds.append(f"{name} at {words.count('yes')} of {len(words)}{reverse}")

    def table(key: str, form: str) -> Table:
        by = by_difficulty(chosen, key)
        cells = zip(*by.values(), strict=True)
        return Table(
            ["rule", *map(str, by)],
            [[row["label"], *(f"{x:{form}}" for x in of)] for row, of in zip(chosen, cells, strict=True)],
        )

    fixed = {row["arm"]: row["fixed"].mean(0) for row in found}
    return {
        "finding": finding(task, chosen),
        "hard": HARD[task],
        "within": WITHIN[task],
        "over_thresholds": "; ".join(over_thresholds),
        "rows": found,
        "correlations": chosen,
        "fixed": Table(
            ["loops", *map(str, range(1, len(fixed["rules"]) + 1))],
            [[arm, *(f"{x:.3f}" for x in values)] for arm, values in fixed.items()],
        ),
        "used": table("by_difficulty", ".2f"),
        "right": table("accuracy_by_difficulty", ".3f"),
    }


def fill(r: Results) -> dict[str, Any]:
    """Return what fills the page: the numbers of every task."""
    tasks = {task: numbers(r, task) for task in HARD}
    lists = {f"{task}_{name}": found[name] for task, found in tasks.items() for name in ("rows", "correlations")}
    return tasks | lists | {"finding": " ".join(found["finding"] for found in tasks.values())}


def is_drawn(name: str) -> bool:
    """Return whether a rule is in the figures: on the model with the end as its only label, one rule is enough."""
    return END_ONLY not in name or name.startswith("kl")


def draw_exits(r: Results, path: Path, task: str) -> None:
    """Draw accuracy by mean loops, for every rule and for every token at the same depth."""
    found, runs = rows(r, task), r.runs[f"{task}, rules"]
    lines: dict[str, list[tuple[float, np.ndarray]]] = {
        "every token at the same depth": list(enumerate(found[0]["fixed"].T, 1))
    }
    for row in (row for row in found if is_drawn(row["name"])):
        at = row["loops"].mean
        lines.setdefault(row["name"], []).append((at, row["accuracy"].by_seed))
        if row["name"] == "kl":
            lines.setdefault("depths of kl, shuffled", []).append((at, row["shuffled"].by_seed))
    curves = [_curve(name, line) for name, line in lines.items()]
    chance = float(np.mean([run["commonest"] for run in runs]))
    curves.append(Curve((1, DEEPEST), (chance, chance), "one answer for all, the commonest", None))
    draw_curves({f"{task}: accuracy by mean loops": curves}, path, ("mean loops of answers", "accuracy"))


def draw_depth(r: Results, path: Path, task: str) -> None:
    """Plot mean loops by difficulty for the rules that `is_drawn` selects, each at the threshold of `choose`."""
    chosen = choose(rows(r, task))
    by = by_difficulty(chosen, "by_difficulty")
    curves = [
        _curve(row["name"], [(level, estimates[i].by_seed) for level, estimates in by.items()])
        for i, row in enumerate(chosen)
        if is_drawn(row["name"])
    ]
    draw_curves({f"{task}: loops by difficulty": curves}, path, (HARD[task], "mean loops"))


def _curve(label: str, line: list[tuple[float, np.ndarray]]) -> Curve:
    xs, values = zip(*sorted(line, key=lambda point: point[0]), strict=True)
    mean, low, high = (x.tolist() for x in over_seeds(np.stack(values, axis=1)))
    return Curve(xs, mean, label, 0, low, high)


def page() -> str:
    """Return the page, whose part on one task is repeated for each."""
    text, part = Path(__file__).with_suffix(".md").read_text(encoding="utf-8").split("# Report\n")
    return f"{text}# Report\n{''.join(part.replace('TASK', task) for task in HARD)}"


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
