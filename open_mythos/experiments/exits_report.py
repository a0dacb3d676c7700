"""The report on exits and difficulty, from its numbers."""

import math
from functools import partial
from typing import Any

import numpy as np

from open_mythos.reports.document import Figure, Part, Report, Table
from open_mythos.reports.figures import interval_curves
from open_mythos.reports.stats import against, interval, shown

Runs = list[dict[str, Any]]
END_ONLY = "end only"
"""The recipe for khop, told the end of the chain after the last loop instead of a hop after each."""
LOSS = 0.01
"""Accuracy that a threshold may cost and still be the one that tables and sentences are about."""
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
    """By rule a point for each seed, at the threshold that the answers of the other seeds choose (see `_threshold`)."""
    return {
        name: [columns[_threshold(columns, runs, seed)][seed] for seed in range(len(runs))]
        for name, (runs, columns) in _by_rule(arms).items()
    }


def _by_rule(arms: dict[str, Runs]) -> dict[str, tuple[Runs, list[Runs]]]:
    """By rule the runs of its model, and for each threshold a point for each seed."""
    found: dict[str, tuple[Runs, list[Runs]]] = {}
    for arm, runs in arms.items():
        for points in zip(*(run["points"] for run in runs), strict=True):
            found.setdefault(_named(arm, points[0]["rule"]), (runs, []))[1].append(list(points))
    return found


def _named(arm: str, rule: str) -> str:
    """Of a line in figures and tables."""
    return arm if rule == "act" else rule + arm.removeprefix("rules")


def _drawn(name: str) -> bool:
    """Of the rules on the model that was told the end only, one is enough for a figure."""
    return END_ONLY not in name or name.startswith("kl")


def _threshold(columns: list[Runs], runs: Runs, seed: int) -> int:
    """The one that gives answers the fewest loops for at most LOSS of the accuracy in all other seeds.

    If none does, the most accurate.

    A single seed chooses on its own answers.
    """
    others = [i for i in range(len(runs)) if i != seed] or [seed]
    best = max(np.mean([runs[i]["fixed"] for i in others], axis=0))
    accuracy, loops = ([_mean([c[i] for i in others], key) for c in columns] for key in ("accuracy", "loops"))
    good = [t for t, value in enumerate(accuracy) if value >= best - LOSS]
    return min(good, key=lambda t: loops[t]) if good else int(np.argmax(accuracy))


def _mean(points: Runs, key: str) -> float:
    return float(np.mean([point[key] for point in points]))


def rhos(points: Runs, key: str = "rho") -> list[float]:
    """Rank correlations by seed; NaN, where all tokens of a place ran equally deep, is 0: depth follows nothing."""
    return [0.0 if math.isnan(point[key]) else point[key] for point in points]


def follows(values: list[float]) -> str:
    """What an interval of a rank correlation, or of a gain, says."""
    words = {"above": "yes", "below": "the reverse", "not told apart from": "not shown"}
    return words.get(against(values, 0), "one seed, no interval")


def _over_thresholds(arms: dict[str, Runs]) -> str:
    """At how many of its thresholds each rule's depth follows difficulty, or its reverse."""
    told = []
    for name, (_, columns) in _by_rule(arms).items():
        words = [follows(rhos(points)) for points in columns]
        if not name.startswith("oracle"):
            reverse = f", the reverse at {words.count('the reverse')}" * ("the reverse" in words)
            told.append(f"{name} at {words.count('yes')} of {len(words)}{reverse}")
    return "; ".join(told)


def _finding(task: str, chosen: dict[str, Runs]) -> str:
    rules = {name: rhos(points) for name, points in chosen.items() if not name.startswith("oracle")}
    said = ", ".join(f"{name} {shown(values, '.2f')}" for name, values in rules.items())
    ceiling = shown(rhos(chosen["oracle, stays right"]), ".2f")
    yes = [name for name, values in rules.items() if follows(values) == "yes"]
    gains = {n: follows([p["accuracy"] - p["shuffled"] for p in chosen[n]]) for n in rules}
    better = [name for name, verdict in gains.items() if verdict == "yes"]
    verdict = (
        f"At these thresholds depth follows difficulty for {', '.join(yes) or 'no rule'}; better than the same depths "
        f"dealt at random: {', '.join(better) or 'none'}."
    )
    if len(next(iter(rules.values()))) < 2:
        verdict = "One seed has no interval, so nothing is claimed."
    return (
        f"{task}: rank correlation of loops used with {HARD[task]}{WITHIN[task]}: {said}; oracle {ceiling}. {verdict}"
    )


def _task(task: str, arms: dict[str, Runs], chosen: dict[str, Runs]) -> list[Part]:
    levels = sorted(set.intersection(*(set(map(int, p["by_difficulty"])) for p in chosen["oracle, stays right"])))
    rows = []
    for arm, runs in arms.items():
        for points in zip(*(run["points"] for run in runs), strict=True):
            rows.append(_row(arm, list(points), runs))
    used, right, rho = [], [], []
    for name, points in chosen.items():
        thresholds = sorted({point["threshold"] for point in points} - {None})
        label = ", ".join([name, *(f"{threshold:g}" for threshold in thresholds)])
        used.append([label, *(shown([p["by_difficulty"][str(n)] for p in points], ".2f") for n in levels)])
        right.append([label, *(shown([p["accuracy_by_difficulty"][str(n)] for p in points]) for n in levels)])
        values = rhos(points)
        constant = sum(math.isnan(p["rho_of_any_place"]) for p in points)
        columns = [shown(rhos(points, key)) for key in ("rho", "rho_of_any_place", "shuffled_rho")]
        rho.append([label, *columns, follows(values), f"{constant} of {len(points)}"])
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
        if _drawn(name)
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
                "correlation with difficulty",
            ],
            rows,
        ),
        "Every token at the same depth (ACT: cut off there):",
        Table(["loops", *map(str, range(1, len(fixed[0])))], fixed),
        f"### Does depth follow difficulty ({HARD[task]})?",
        f"At the threshold that gives answers the fewest loops for at most {LOSS} of the accuracy, by the answers of "
        "the other seeds (a single seed's by its own); where none does, the most accurate. Spearman's rank "
        "correlation over answers"
        f"{WITHIN[task]}; *any place* takes all together, which a rule that goes by the place alone can satisfy:",
        Table(["rule", "correlation", "any place", "shuffled", "follows", "seeds with one depth for all"], rho),
        f"Thresholds at which depth follows difficulty: {_over_thresholds(arms)}.",
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
        shown(rhos(points), "+.2f"),
    ]


def _curves(arms: dict[str, Runs]) -> dict[str, list[tuple[float, float, float, float]]]:
    rules = arms["rules"]
    found: dict[str, list[tuple[float, float, float, float]]] = {
        "every token at the same depth": [
            (n, *interval([run["fixed"][n - 1] for run in rules])) for n in range(1, len(rules[0]["fixed"]) + 1)
        ]
    }
    for name, (_, columns) in _by_rule(arms).items():
        if not _drawn(name):
            continue
        for points in columns:
            at = _mean(points, "loops")
            found.setdefault(name, []).append((at, *interval([p["accuracy"] for p in points])))
            if name == "kl":
                control = found.setdefault("depths of kl, shuffled", [])
                control.append((at, *interval([p["shuffled"] for p in points])))
    return {name: sorted(points) for name, points in found.items()}
