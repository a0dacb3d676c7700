"""The report on what exits save on text, from its numbers."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from open_mythos.experiments.study import Result
from open_mythos.reports.document import Figure, Report, Table
from open_mythos.reports.figures import interval_curves
from open_mythos.reports.stats import TextEstimate

SHOWN = ("kl", 0.01)
"""The rule that the tables by exit and by kind of byte are about."""
KINDS = ("first letter of a word", "later letter of a word", "space or line break", "anything else")


def adaptive_report(results: Result) -> Report:
    runs = results["runs"]
    first, deepest = runs[0], len(runs[0]["fixed"])
    cfg, fixed = first["asked"]["config"], np.array([run["fixed"] for run in runs])
    points = [_point(runs, i, fixed) for i in range(len(first["exits"]))]
    clearest = max(points, key=lambda p: TextEstimate(p["gain"]).interval[1])
    shown = next(p for p in points if (p["rule"], p["threshold"]) == SHOWN)
    spread = [(p["shuffled"] - p["same"]).mean() for p in points]
    rules = dict.fromkeys(p["rule"] for p in points)
    by_rule = {rule: [p for p in points if p["rule"] == rule] for rule in rules}
    loss = ", ".join(f"{run['train_ce']:.2f}" for run in runs)
    columns = {"bits per byte": "bits", "same depth": "same", "shuffled": "shuffled"}
    parts = [
        f"{first['parameters']:,} parameters, {cfg['steps']} steps of {cfg['batch_size']} windows of "
        f"{cfg['data']['seq_len']} bytes, every token at {deepest} loops; training loss {loss} nats at the end. "
        f"Evaluation: {first['tokens']:,} bytes of held-out text for each seed, {fixed.shape[2]} windows. Intervals "
        "are those of the text: 95 %, from a bootstrap over windows with the mean over seeds in each; *higher* and "
        "*lower* stand where the interval and every seed agree on the sign, else *undecided*.",
        Figure(
            "exits",
            "What fewer loops cost: bits per byte above the deepest call's. No bar where its lower end is below zero.",
            partial(_draw_cost, fixed, by_rule),
        ),
        Figure(
            "gain",
            "Bits per byte that exits are better by than the same depths dealt at random.",
            partial(_draw_gain, by_rule),
        ),
        "## Every token at the same depth",
        Table(
            ["loops", *(str(n + 1) for n in range(deepest))],
            [["bits per byte", *(f"{x:.3f}" for x in fixed.mean((0, 2)))]],
        ),
        "## With exits",
        "*Same depth* is the curve above at the same mean loops; between whole numbers a mix of the two. *Shuffled* is "
        "the control. *Gain* is shuffled less exits.",
        Table(
            ["rule", "threshold", "mean loops", *columns, "gain", "95 %", "", f"tokens by loops 1 to {deepest}"],
            [
                [
                    p["rule"],
                    f"{p['threshold']:g}",
                    f"{p['loops']:.2f}",
                    *(f"{p[key].mean():.4f}" for key in columns.values()),
                    f"{p['gain'].mean():+.4f}",
                    TextEstimate(p["gain"]).between("+.4f"),
                    TextEstimate(p["gain"]).verdict(),
                    ", ".join(map(str, p["tokens"])),
                ]
                for p in points
            ],
        ),
        f"A spread of depths that means nothing, which is shuffled less same depth, costs {min(spread):+.4f} to "
        f"{max(spread):+.4f} bits per byte: what exits gain by their choice of tokens has to make up for that before "
        "they beat one depth for all.",
        f"## Who leaves when ({SHOWN[0]}, threshold {SHOWN[1]:g}: {shown['loops']:.2f} loops on average)",
        f"Seed {cfg['seed']}. Bits per byte of the tokens that left after so many loops, or that predict such a byte, "
        f"with exits, and had all tokens run 2 or {deepest} loops: what the loops beyond the second are worth to them.",
        _groups("loops", [str(g["key"]) for g in first["by_exit"]], first["by_exit"]),
        _groups("the byte predicted", [KINDS[g["key"]] for g in first["by_kind"]], first["by_kind"]),
    ]
    said = [_said(rule, found) for rule, found in by_rule.items()]
    said += ["One model only."] * (len(runs) == 1)
    said.append(
        f"The clearest gain: {clearest['gain'].mean():.4f} bits per byte at {clearest['loops']:.2f} loops "
        f"({clearest['rule']} at {clearest['threshold']:g})."
    )
    return Report(" ".join(said), parts)


def _groups(label: str, names: list[str], groups: list[Result]) -> Table:
    deepest = len(groups[0]["bits_by_depth"])
    head = [label, "tokens", "mean loops", "all at 2", f"all at {deepest}", "worth of more loops", "with exits"]
    rows = []
    for name, g in zip(names, groups, strict=True):
        two, most = g["bits_by_depth"][1], g["bits_by_depth"][-1]
        bits = f"{two:.3f}", f"{most:.3f}", f"{two - most:+.3f}", f"{g['bits']:.3f}"
        rows.append([name, str(g["tokens"]), f"{g['loops']:.2f}", *bits])
    return Table(head, rows)


def _said(rule: str, points: list[Result]) -> str:
    """Whether a rule's exits are better than their control, and than one depth for all, at how many thresholds."""
    against = [p["against"].mean() for p in points]
    gain, same = (Counter(TextEstimate(p[key]).verdict() for p in points) for key in ("gain", "against"))
    return (
        f"Exits by {rule}, {len(points)} thresholds: {gain['higher']} read text better than the same depths dealt at "
        f"random ({gain['lower']} worse), {same['higher']} better than one depth for all ({same['lower']} worse; "
        f"{min(against):+.4f} to {max(against):+.4f} bits per byte)."
    )


def _point(runs: list[Result], i: int, fixed: np.ndarray) -> Result:
    """One rule and threshold; its numbers of bits are (seeds, windows)."""
    exits = [run["exits"][i] for run in runs]
    bits, dealt = np.array([e["bits"] for e in exits]), np.array([e["shuffled"] for e in exits]).mean(1)
    # One depth for all at the same mean loops, window by window.
    whole = [min(int(e["loops"]), fixed.shape[1] - 1) for e in exits]
    same = np.stack(
        [
            curve[n - 1] + (e["loops"] - n) * (curve[n] - curve[n - 1])
            for e, n, curve in zip(exits, whole, fixed, strict=True)
        ]
    )
    return {
        "rule": exits[0]["rule"],
        "threshold": exits[0]["threshold"],
        "loops": float(np.mean([e["loops"] for e in exits])),
        "tokens": np.sum([e["tokens_by_loops"] for e in exits], axis=0),
        "bits": bits,
        "same": same,
        "shuffled": dealt,
        "gain": dealt - bits,
        "against": same - bits,
    }


def _draw_cost(fixed: np.ndarray, by_rule: dict[str, list[Result]], path: Path) -> None:
    deepest = fixed[:, -1]
    curves = {
        "every token at the same depth": [
            (n, *TextEstimate(fixed[:, n - 1] - deepest).interval) for n in range(1, fixed.shape[1])
        ]
    }
    for rule, points in by_rule.items():
        for key, name in (("bits", f"exits by {rule}"), ("shuffled", f"depths of {rule}, shuffled")):
            curves[name] = sorted((p["loops"], *TextEstimate(p[key] - deepest).interval) for p in points)
    # What is not above zero has no place on a logarithmic axis.
    above = {
        name: [(x, y, *((low, high) if low > 0 else (np.nan, np.nan))) for x, y, low, high in points if y > 0]
        for name, points in curves.items()
    }
    labels = ("mean loops per token", f"bits per byte above {fixed.shape[1]} loops, held out")
    interval_curves({k: v for k, v in above.items() if v}, labels, "What fewer loops cost", path, log_y=True)


def _draw_gain(by_rule: dict[str, list[Result]], path: Path) -> None:
    curves = {
        rule: sorted((p["loops"], *TextEstimate(p["gain"]).interval) for p in points)
        for rule, points in by_rule.items()
    }
    labels = ("mean loops per token", "gain in bits per byte")
    interval_curves(curves, labels, "What the choice of tokens is worth", path, level=("dealt at random", 0.0))
