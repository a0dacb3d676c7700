"""The report on exits and difficulty, from its numbers."""

import math
from functools import partial
from typing import Any

import numpy as np

from open_mythos.experiments.record import Figure, Part, Report, Table, interval, shown
from open_mythos.plots import interval_curves

Runs = list[dict[str, Any]]
LOSS = 0.01
"""Accuracy that a threshold may cost and still be the one that tables and sentences are about."""
HARD = {"khop": "hops to the answer", "addition": "length of the chain of carries into the digit"}


def exits_report(results: dict[str, Runs]) -> Report:
    parts: list[Part] = []
    findings = []
    for task in HARD:
        arms = {name.removeprefix(f"{task}, "): runs for name, runs in results.items() if name.startswith(f"{task},")}
        chosen = choices(arms)
        findings.append(_finding(task, chosen))
        parts += _task(task, arms, chosen)
    return Report(" ".join(findings), parts)


def choices(arms: dict[str, Runs]) -> dict[str, Runs]:
    """By rule the points, one a seed, at the threshold that saves most for at most LOSS of the accuracy.

    Where every threshold costs more, the most accurate.
    """
    found = {}
    for arm, runs in arms.items():
        best = max(np.mean([run["fixed"] for run in runs], axis=0))
        rules: dict[str, list[Runs]] = {}
        for points in zip(*(run["points"] for run in runs), strict=True):
            rules.setdefault(points[0]["rule"], []).append(list(points))
        for rule, columns in rules.items():
            good = [c for c in columns if _mean(c, "accuracy") >= best - LOSS]
            name = rule if arm == "rules" else arm
            if good:
                found[name] = min(good, key=lambda c: _mean(c, "loops"))
            else:
                found[name] = max(columns, key=lambda c: _mean(c, "accuracy"))
    return found


def _mean(points: Runs, key: str) -> float:
    return float(np.mean([point[key] for point in points]))


def rhos(points: Runs, key: str = "rho") -> list[float]:
    """Rank correlations by seed; where all tokens ran equally deep, depth follows nothing: 0."""
    return [point[key] or 0.0 for point in points]


def follows(values: list[float]) -> str:
    """What an interval of a rank correlation, or of a gain, says."""
    _, low, high = interval(values)
    if math.isnan(low):
        return "one seed, no interval"
    return "yes" if low > 0 else "the reverse" if high < 0 else "not shown"


def _finding(task: str, chosen: dict[str, Runs]) -> str:
    rules = {name: rhos(points) for name, points in chosen.items() if not name.startswith("oracle")}
    said = ", ".join(f"{name} {shown(values, '.2f')}" for name, values in rules.items())
    ceiling = shown(rhos(chosen["oracle, stays right"]), ".2f")
    yes = [name for name, values in rules.items() if follows(values) == "yes"]
    gains = {n: follows([p["accuracy"] - p["shuffled"] for p in chosen[n]]) for n in rules}
    better = [name for name, verdict in gains.items() if verdict == "yes"]
    verdict = (
        f"Depth follows difficulty for {', '.join(yes) or 'no rule'}; better than the same depths dealt at random: "
        f"{', '.join(better) or 'none'}."
    )
    if len(next(iter(rules.values()))) < 2:
        verdict = "One seed has no interval, so nothing is claimed."
    return f"{task}: rank correlation of loops used with {HARD[task]}: {said}; oracle {ceiling}. {verdict}"


def _task(task: str, arms: dict[str, Runs], chosen: dict[str, Runs]) -> list[Part]:
    levels = sorted(map(int, chosen["oracle, stays right"][0]["by_difficulty"]))
    rows = []
    for arm, runs in arms.items():
        for points in zip(*(run["points"] for run in runs), strict=True):
            rows.append(_row(arm, list(points), runs))
    used, right, rho = [], [], []
    for name, points in chosen.items():
        threshold = points[0]["threshold"]
        label = name if threshold is None else f"{name}, {threshold:g}"
        used.append([label, *(shown([p["by_difficulty"][str(n)] for p in points], ".2f") for n in levels)])
        right.append([label, *(shown([p["accuracy_by_difficulty"][str(n)] for p in points]) for n in levels)])
        values = rhos(points)
        constant = sum(p["rho"] is None for p in points)
        rho.append(
            [label, shown(values), shown(rhos(points, "shuffled_rho")), follows(values), f"{constant} of {len(points)}"]
        )
    fixed = [
        [arm, *(f"{x:.3f}" for x in np.mean([run["fixed"] for run in runs], axis=0))] for arm, runs in arms.items()
    ]
    title = f"{task}: accuracy by mean loops"
    axes = ("mean loops of answers", "accuracy")
    chance = ("one answer for all, the commonest", float(np.mean([run["commonest"] for run in arms["rules"]])))
    depth_title = f"{task}: loops by difficulty"
    curves = {
        name: [(n, *interval([p["by_difficulty"][str(n)] for p in points])) for n in levels]
        for name, points in chosen.items()
    }
    return [
        f"## {task}",
        Figure(f"{task}-exits", title, partial(interval_curves, _curves(arms), axes, title, level=chance)),
        "*Same depth* is every token at one depth, between whole numbers a mix of the two; *shuffled* the same depths "
        "dealt to other answers. Differences in accuracy, with intervals over seeds.",
        Table(
            [
                "model",
                "rule",
                "threshold",
                "mean loops",
                "of all tokens",
                "accuracy",
                "less same depth",
                "less shuffled",
            ],
            rows,
        ),
        "Every token at the same depth (ACT: cut off there):",
        Table(["loops", *map(str, range(1, len(fixed[0])))], fixed),
        f"### Does depth follow difficulty ({HARD[task]})?",
        f"At the threshold that saves most for at most {LOSS} of the accuracy (chosen on these same answers); where "
        "none does, the most accurate. Spearman's rank correlation over answers:",
        Table(["rule", "correlation", "shuffled", "follows", "seeds with one depth for all"], rho),
        Figure(f"{task}-depth", depth_title, partial(interval_curves, curves, (HARD[task], "mean loops"), depth_title)),
        "Mean loops by difficulty:",
        Table(["rule", *map(str, levels)], used),
        "Accuracy by difficulty:",
        Table(["rule", *map(str, levels)], right),
    ]


def _row(arm: str, points: Runs, runs: Runs) -> list[str]:
    same = [
        point["accuracy"] - float(np.interp(point["loops"], range(1, len(run["fixed"]) + 1), run["fixed"]))
        for point, run in zip(points, runs, strict=True)
    ]
    threshold = points[0]["threshold"]
    return [
        arm,
        points[0]["rule"],
        "-" if threshold is None else f"{threshold:g}",
        shown([p["loops"] for p in points], ".2f"),
        shown([p["loops_of_all_tokens"] for p in points], ".2f"),
        shown([p["accuracy"] for p in points]),
        shown(same, "+.3f"),
        shown([p["accuracy"] - p["shuffled"] for p in points], "+.3f"),
    ]


def _curves(arms: dict[str, Runs]) -> dict[str, list[tuple[float, float, float, float]]]:
    rules = arms["rules"]
    found: dict[str, list[tuple[float, float, float, float]]] = {
        "every token at the same depth": [
            (n, *interval([run["fixed"][n - 1] for run in rules])) for n in range(1, len(rules[0]["fixed"]) + 1)
        ]
    }
    for arm, runs in arms.items():
        for points in zip(*(run["points"] for run in runs), strict=True):
            name = points[0]["rule"] if arm == "rules" else arm
            at = _mean(list(points), "loops")
            found.setdefault(name, []).append((at, *interval([p["accuracy"] for p in points])))
            if name == "kl":
                control = found.setdefault("depths of kl, shuffled", [])
                control.append((at, *interval([p["shuffled"] for p in points])))
    return {name: sorted(points) for name, points in found.items()}
