"""The report of the verification, from its numbers, beside the published ones."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from open_mythos.reports.document import Figure, Part, Report, Table
from open_mythos.reports.figures import interval_curves
from open_mythos.reports.stats import interval, shown

LOOPS = (1, 2, 3, 4, 6, 8, 12, 16)
AGREEMENT = (0.352, 0.656, 0.727, 0.805, 0.883, 0.906, 0.961, 1.0)
KL = (0.19, 0.10, 0.07, 0.06, 0.04, 0.02, 0.005, 0.0)
STEPS = (0, 20, 60, 100, 200, 299)
A_MAX = {
    "bounded": (0.368, 0.496, 0.480, 0.477, 0.474, 0.469),
    "free from .368": (0.418, 0.719, 0.749, 0.736, 0.700, 0.666),
    "free from .95": (1.000, 1.319, 1.340, 1.315, 1.251, 1.190),
}
GROWTH = {
    "0.37": (91, 124, 136, 141, 143, 143, 144, 144),
    "0.9": (91, 172, 246, 312, 371, 425, 473, 517),
    "1.0": (91, 182, 272, 363, 454, 544, 635, 726),
    "1.2": (91, 200, 330, 487, 675, 901, 1172, 1498),
    "1.5": (91, 228, 432, 738, 1199, 1889, 2924, 4476),
    "2.0": (92, 274, 638, 1367, 2825, 5740, 11570, 23232),
}
TIMED_LOOPS = (1, 2, 4, 8, 16)
SECONDS = (0.141, 0.254, 0.501, 1.021, 2.071)
PEAK_GB = (6.29, 6.37, 6.42, 6.44, 6.44)
DEAD = 1e-8
"""A gradient norm that is zero but for rounding."""


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Intercept, slope and R^2 of the least-squares line."""
    slope, intercept = np.polyfit(xs, ys, 1)
    rest = np.asarray(ys) - intercept - slope * np.asarray(xs)
    return float(intercept), float(slope), float(1 - rest.var() / np.var(ys))


def dead(run: dict[str, Any]) -> bool:
    """Whether a run of the ablation no longer learns at its end, with no gradient or one that is no number."""
    return not run["gradient"][-1] >= DEAD


def verify_report(results: dict[str, Any]) -> Report:
    ablation = results["ablation"]
    n_dead = {arm: sum(map(dead, runs)) for arm, runs in ablation.items()}
    parts: list[Part] = [
        *_loops(results["loops"], results["large"]),
        *_spectral(results["spectral"]),
        *_ablation(ablation, n_dead),
        *_growth(results["growth"]),
        *_latency(results["latency"], results["large"]),
        *_beyond(results["beyond"]),
        *_act(results["act"]),
    ]
    return Report(f"{_verdict(ablation, n_dead)} {_grown(results['growth'])} {_saving(results['act'])}", parts)


def _loops(loops: dict[str, list[dict[str, Any]]], large: str) -> list[Part]:
    rows, lines = [], {"published": [(n, a, math.nan, math.nan) for n, a in zip(LOOPS, AGREEMENT, strict=True)]}
    rows.append(["published", "agreement", *(f"{a:.3f}" for a in AGREEMENT)])
    rows.append(["published", "KL", *(f"{x:.3f}" for x in KL)])
    for init, runs in loops.items():
        for output in ("ACT as published", "ACT", "last state"):
            name = f"{init} values, {output}"
            for key in ("agreement", "kl"):
                values = [[run[output][i][key] for run in runs] for i in range(len(LOOPS))]
                label = "KL" if key == "kl" else key
                rows.append([name, label, *(shown(v, ".3f" if key == "agreement" else ".2g") for v in values)])
                if key == "agreement" and (init != "our" or output == "ACT"):
                    lines[name] = [(n, *interval(v)) for n, v in zip(LOOPS, values, strict=True)]
    moved = {init: [run["ACT"][0]["agreement"] for run in runs] for init, runs in loops.items()}
    said = " and ".join(f"{1 - np.mean(v):.0%} of the tokens with {init} initial values" for init, v in moved.items())
    rebuilt = np.mean([[x["agreement"] for x in run["ACT as published"]] for run in loops["0.5.0's"]], axis=0)
    off = np.abs(rebuilt - AGREEMENT)
    caption = "Untrained: agreement of the top token with 16 loops"
    return [
        "## Loops are no no-op",
        f"{large}: one loop instead of 16 changes the top one of {said} (ACT with weights that sum to one). "
        "With 0.5.0's initial values and its ACT the agreement differs from the published one by "
        f"{off.mean():.3f} on average and {off.max():.3f} at most, over the loop counts.",
        Figure("loops", caption, partial(interval_curves, lines, ("loops", "agreement with 16 loops"), caption)),
        Table(["", "", *map(str, LOOPS)], rows),
    ]


def _spectral(spectral: dict[str, Any]) -> list[Part]:
    low, high = spectral["start"]
    return [
        "## Spectral radius",
        Table(
            ["", "published", "here"],
            [
                ["A at the start, lowest", "0.367879", f"{low:.6f}"],
                ["A at the start, highest", "0.367879", f"{high:.6f}"],
                *(
                    [f"largest A of any parameter value, infinite ones too, {dtype}", "below 1", f"{a:.8f}"]
                    for dtype, a in spectral["most"].items()
                ),
            ],
        ),
    ]


def _verdict(ablation: dict[str, list[dict[str, Any]]], n_dead: dict[str, int]) -> str:
    """What the ablation says, from its counts."""
    n = len(next(iter(ablation.values())))
    count = {form: [n_dead[f"{form}, {decay}"] for decay in A_MAX] for form in ("published", "mended", "ours")}
    bounded, free = count["published"][0], sum(count["published"][1:])
    others = sum(count["mended"]) + sum(count["ours"])
    all_bounded = sum(each[0] for each in count.values())
    tally = (
        f"(dead runs with 0.5.0's ACT: {bounded} of {n} with a bounded A, {free} of {2 * n} with a free one; with "
        f"weights that sum to one: {others} of {6 * n})"
    )
    if n < 2:
        return f"Stability: one seed, so nothing is claimed {tally}."
    if not all_bounded and free and others >= free:
        return f"A bounded A trains on where a free one dies, as published {tally}."
    if bounded and not others:
        return (
            "The published death of training is a fault of halting and not of A: it happens also with a bounded A, and "
            f"never once ACT's weights sum to one {tally}."
        )
    if free and not others:
        return f"Training died only with a free A and 0.5.0's ACT together {tally}."
    if not bounded + free + others:
        return f"No run died here, bounded or free {tally}."
    return f"Death follows neither A nor halting alone {tally}."


def _ablation(ablation: dict[str, list[dict[str, Any]]], n_dead: dict[str, int]) -> list[Part]:
    n_steps = len(next(iter(ablation.values()))[0]["A"])
    steps = [s for s in STEPS if s < n_steps]
    rows = [["published: " + decay, "", *(f"{a:.3f}" for a in values)] for decay, values in A_MAX.items()]
    end = []
    for arm, runs in ablation.items():
        rows.append([arm, f"{n_dead[arm]} of {len(runs)}"] + [shown([run["A"][s] for run in runs]) for s in steps])
        beyond = sum(max(run["A"]) >= 1 for run in runs)
        zero = [np.mean(np.array(run["gradient"]) < DEAD) for run in runs]
        frozen = sum(dead(run) and abs(run["loss"][-1] - math.log(512)) < 1e-4 for run in runs)
        losses = shown([np.mean(run["loss"][-50:]) for run in runs])
        end.append([arm, losses, f"{np.mean(zero):.0%}", f"{frozen} of {len(runs)}", f"{beyond} of {len(runs)}"])
    fall = {decay: 1 - (values[5] / values[3]) ** (1 / 199) for decay, values in A_MAX.items() if decay != "bounded"}
    said = " and ".join(f"{x:.3%} ({decay})" for decay, x in fall.items())
    parts: list[Part] = [
        "## Stability: bounded and free A",
        _verdict(ablation, n_dead),
        "What kills: the halting layer's weights move by 0.05 a step, so that after a few steps the probabilities are "
        "near 0 or 1 everywhere. Near 0 for every token, 0.5.0's weights add up to nothing: the output is 0, the "
        "logits are 0, the loss is ln 512 = 6.238 and every gradient is 0. "
        + f"From step 100 on the published free A falls by {said} a step"
        + "; AdamW's default decay of 0.01 at a rate of 0.05 alone takes 0.050 %: nothing else moves it there."
        + _alike(ablation),
        "Largest A after the update of a step:",
        Table(["run", "dead", *map(str, STEPS[: len(steps)])], [row[: 2 + len(steps)] for row in rows]),
        "And how they end (mean of the last 50 steps; nothing can be learned, so the least is about ln 512 = 6.238):",
        Table(["run", "loss", "steps without gradient", "frozen at ln 512", "A reached 1"], end),
    ]
    lines = {}
    for arm in ("published, bounded", "published, free from .95", "mended, bounded", "mended, free from .95"):
        at = range(0, n_steps, max(1, n_steps // 12))
        lines[arm] = [
            (s, float(np.mean([run["gradient"][s] > DEAD for run in ablation[arm]])), math.nan, math.nan) for s in at
        ]
    caption = "Stability ablation: share of runs that have a gradient"
    figure = Figure("stability", caption, partial(interval_curves, lines, ("step", "share of runs"), caption))
    return [*parts[:3], figure, *parts[3:]]


def _alike(ablation: dict[str, list[dict[str, Any]]]) -> str:
    falls = []
    for arm, runs in ablation.items():
        falls += [1 - run["A"][-1] / run["A"][-2] for run in runs if dead(run) and "free" in arm]
    return f" Dead runs here: {np.mean(falls):.3%} a step." if falls else ""


def _grown(growth: list[dict[str, Any]]) -> str:
    cells = [(np.mean([run[rho][t] for run in growth]), norms[t]) for rho, norms in GROWTH.items() for t in range(8)]
    off = max(abs(ours / norm - 1) for ours, norm in cells)
    return f"In the norm of the state the largest difference of a cell from the published one is {off:.1%}."


def _growth(growth: list[dict[str, Any]]) -> list[Part]:
    rows = []
    for rho, published in GROWTH.items():
        ours = [np.mean([run[rho][t] for run in growth]) for t in range(8)]
        rows.append([f"{rho} published", *map(str, published)])
        rows.append([f"{rho} here", *(f"{norm:.0f}" for norm in ours)])
    ratios = [[run["2.0"][t] / run["2.0"][t - 1] for t in (5, 6, 7)] for run in growth]
    lines = {
        rho: [(t + 1, float(np.mean([run[rho][t] for run in growth])), math.nan, math.nan) for t in range(8)]
        for rho in GROWTH
    }
    caption = "Norm of the state by loop, by the A that is forced"
    return [
        "## Growth of the state",
        f"{_grown(growth)} With A = 2 the last three ratios "
        f"average {shown([float(np.mean(r)) for r in ratios])} (published: 2.02).",
        Figure("growth", caption, partial(interval_curves, lines, ("loop", "norm"), caption, log_y=True)),
        Table(["A", *(f"loop {t}" for t in range(1, 9))], rows),
    ]


def _latency(latency: dict[str, Any], large: str) -> list[Part]:
    best = [min(seconds) for seconds in latency["seconds"]]
    ours, published = line(TIMED_LOOPS, best), line(TIMED_LOOPS, SECONDS)
    peaks = ["not measured" if x is None else f"{x / 1e9:.2f}" for x in latency["peak_bytes"]]
    return [
        "## Latency and memory by loops",
        f"128 tokens. Here ({large}, float32): {ours[0]:.3f} s + {ours[1]:.3f} s a loop, R^2 "
        f"{ours[2]:.4f}. Published (bf16, an integrated GPU), the same fit: {published[0]:.3f} s + {published[1]:.3f} "
        f"s a loop, R^2 {published[2]:.4f}.",
        Table(
            ["loops", *map(str, TIMED_LOOPS)],
            [
                ["published, s", *(f"{s:.3f}" for s in SECONDS)],
                ["here, s, lowest", *(f"{s:.3f}" for s in best)],
                ["here, s, highest", *(f"{max(s):.3f}" for s in latency["seconds"])],
                ["published, peak GB", *(f"{x:.2f}" for x in PEAK_GB)],
                ["here, peak GB", *peaks],
            ],
        ),
    ]


def _beyond(beyond: dict[str, Any]) -> list[Part]:
    calls = beyond["calls"]
    works = all(c["finite"] for c in calls)
    return [
        "## More loops than max_loop_iters (16)",
        f"Published: IndexError. Here {'all calls are finite' if works else 'not all calls are finite'}; at "
        f"{calls[-1]['loops']} loops ACT's weights sum to {beyond['weights'][0]:.6f} to {beyond['weights'][1]:.6f}.",
        Table(
            ["loops", "finite", "largest difference of a logit from the traced state's", "norm of the state"],
            [[str(c["loops"]), str(c["finite"]), f"{c['difference']:.1e}", f"{c['state']:.0f}"] for c in calls],
        ),
    ]


def _saving(act: dict[str, Any]) -> str:
    off, on = act["off"], act["on"]
    return (
        f"ACT computes {on['token_loops'] / off['token_loops']:.0%} of the token-loops in "
        f"{min(on['seconds']) / min(off['seconds']):.0%} of the time, where published it saved nothing."
    )


def _act(act: dict[str, Any]) -> list[Part]:
    names = {"off": "halting off", "all computed": "ACT, all computed until the last has halted", "on": "ACT"}
    used = act["tokens_by_loops"]
    return [
        "## ACT saves compute",
        f"{_saving(act)} Tokens by loops, 1 to {len(used)}: {', '.join(map(str, used))}. The reference of the "
        "outputs is the sum of all traced states by their weights.",
        Table(
            ["", "token-loops", "s, lowest", "s, highest", "largest difference of a logit"],
            [
                [
                    names[way],
                    str(found["token_loops"]),
                    f"{min(found['seconds']):.3f}",
                    f"{max(found['seconds']):.3f}",
                    "-" if found["difference"] is None else f"{found['difference']:.1e}",
                ]
                for way, found in ((way, act[way]) for way in names)
            ],
        ),
    ]
