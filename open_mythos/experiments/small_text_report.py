"""The figure and the report of `small_text`, made from its raw numbers alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from open_mythos.files import write_text
from open_mythos.plots import loop_curves

Result = dict[str, Any]


def write_record(results: Result, out: Path) -> None:
    """Write report.json, report.md, loops.png and loops.svg into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.json", json.dumps(results) + "\n")
    write_text(out / "report.md", "\n".join(_report(results)))
    curves, levels = {}, {}
    for name, bits in bits_per_byte(results).items():
        arm, by_seed = results["arms"][name], bits.mean(2).tolist()
        what = f"{arm['title']}: {arm['parameters'] / 1e6:.2f} M parameters, {arm['flops'] / 1e6:.1f} MFLOP per token"
        if arm["blocks"][1]:
            curves[f"{what} at {_mean(results)} loops"] = by_seed
        else:
            levels[what] = [value for (value,) in by_seed]
    title = f"small-text: {_tokens(results) / 1e6:.1f} million tokens, {_seeds(results)}"
    loop_curves(curves, levels, results["loops"], out / "loops.png", "bits per byte of held-out text", title)


def best(sweep: Result) -> float:
    """The factor of the learning rates with the lowest score."""
    return float(min(sweep, key=lambda rate: np.sum(sweep[rate]["bits"])))


def bits_per_byte(results: Result) -> dict[str, np.ndarray]:
    """(seeds, loops, windows) of each arm; one in place of loops for a plain one."""
    return {
        name: np.array([run["bits"] for run in runs]) / results["bytes_per_window"]
        for name, runs in results["runs"].items()
    }


def interval(windows: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of (windows,), from 2,000 draws of the windows."""
    picks = np.random.default_rng(0).integers(len(windows), size=(2000, len(windows)))
    low, high = np.quantile(windows[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


def contrasts(results: Result) -> dict[str, np.ndarray]:
    """What is compared -> (seeds, windows) bits per byte of the first named less the second."""
    bits, loops, mean = bits_per_byte(results), results["loops"], _mean(results)
    title = {name: arm["title"] for name, arm in results["arms"].items()}
    at = {(name, n): bits[name][:, i] for name in ("sampled", "fixed") for i, n in enumerate(loops)}
    found = {}
    for name in ("sampled", "fixed"):
        for n in (1, loops[-1]):
            found[f"{title[name]}: {n} loop{'s' * (n > 1)} less {mean}"] = at[name, n] - at[name, mean]
    found[f"{title['sampled']} less {title['fixed']}, both at {mean}"] = at["sampled", mean] - at["fixed", mean]
    for name in ("sampled", "fixed"):
        for plain in ("parameters", "flops"):
            found[f"{title[name]} at {mean} less {title[plain]}"] = at[name, mean] - bits[plain][:, 0]
    return found


def verdict(difference: np.ndarray) -> str:
    """Of (seeds, windows): the sign, where the interval and every seed agree on it."""
    low, high = interval(difference.mean(0))
    by_seed = difference.mean(1)
    if low > 0 and (by_seed > 0).all():
        return "higher"
    return "lower" if high < 0 and (by_seed < 0).all() else "undecided"


def _report(results: Result) -> list[str]:
    recipe, runs, arms, mean = results["recipe"], results["runs"], results["arms"], _mean(results)
    bits, loops = bits_per_byte(results), results["loops"]
    seeds = [run["config"]["seed"] for run in runs["sampled"]]
    everything = [r for rs in runs.values() for r in rs] + [r for s in results["sweep"].values() for r in s.values()]
    unnormed = results["unnormed"]
    bits_unnormed = np.mean(unnormed["run"]["bits"], axis=1) / results["bytes_per_window"]
    everything.append(unnormed["run"])
    commits, cpu_min = sorted({run["commit"] for run in everything}), sum(run["cpu_s"] for run in everything) / 60
    seq_len, n_windows = recipe["data"]["seq_len"], runs["sampled"][0]["windows"]
    depths = np.repeat(np.arange(len(results["depths"])), results["depths"])
    rates = sorted({float(rate) for sweep in results["sweep"].values() for rate in sweep})
    return [
        "# Text: sampled depth, its fixed twin, and plain transformers",
        "",
        "Question: what do more loops give a model of text that was trained at sampled depth, and is it better than a "
        "plain transformer with as many parameters, or with as many FLOPs?",
        "",
        f"Command: `{results['command']} --seeds {' '.join(map(str, seeds))}`, commit {', '.join(commits)}, "
        f"{results['machine']}, {results['threads']} thread.",
        f"Recipe `small-text`: {recipe['steps']} steps of {recipe['batch_size']} windows of {seq_len} tokens. These "
        f"{_tokens(results):,} tokens are less than an epoch of the 11 MB corpus of `mythos fetch-corpus`. The "
        f"vocabulary is a BPE of {recipe['model']['vocab_size']} tokens; its merges have seen the held-out text too.",
        f"{_seeds(results).capitalize()} ({', '.join(map(str, seeds))}): each has its own weights, depths and order of "
        "the text. All arms of a seed read the same tokens in the same order, with the same optimizers (Muon and "
        "AdamW).",
        f"Held out: {n_windows} windows, {n_windows * results['bytes_per_window']:,.0f} bytes, of "
        f"{results['held_out_documents']} documents (of the corpus: one play and 46 chapters of the Bible); training "
        "has other plays and chapters.",
        "",
        "![bits per byte by loops](loops.png)",
        "",
        "## What it says",
        "",
        "Differences of bits per byte, window by window; negative: the first is better. *Higher* and *lower* stand "
        f"where the interval and every seed agree on the sign ({_seeds(results)}).",
        "",
        *_table(
            ["difference", "mean", "95 % over windows", "by seed", ""],
            [
                [what, f"{x.mean():+.4f}", _between(x, "+.4f"), _listed(x.mean(1), "+.4f"), verdict(x)]
                for what, x in contrasts(results).items()
            ],
        ),
        "",
        "The interval is that of the text: from a bootstrap over windows, with the mean over seeds in each, and "
        "neighbours taken for independent. What another seed would give is seen in the column of seeds alone"
        + (": here there is one, so a difference between arms is one of single runs." if len(seeds) == 1 else "."),
        "",
        "## Bits per byte",
        "",
        *_table(
            ["loops", *(arms[name]["title"] for name in bits)],
            [
                [str(n), *(f"{x.mean():.4f} ({_between(x, '.3f')})" for x in _line(bits, i))]
                for i, n in enumerate(loops)
            ],
        ),
        "",
        "A plain transformer has no loops: its one value stands in every line. Without a network: "
        f"{_listed_by_name(results['nulls'])}; the counts are those of all the training text, three times what an arm "
        "reads.",
        "",
        *_table(
            ["arm", "seed", *map(str, loops)],
            [
                [arms[name]["title"], str(seed), *(f"{x:.4f}" for x in values.mean(1))]
                for name in bits
                for seed, values in zip(seeds, bits[name], strict=True)
            ]
            + [[unnormed["title"], str(seeds[0]), *(f"{x:.4f}" for x in bits_unnormed)]],
        ),
        "",
        "The last line, one run, undoes a choice of the recipe: the norm between prelude and loop. Its rates are "
        "those chosen for sampled depth.",
        "",
        "## The arms",
        "",
        f"FLOPs are those of a token's forward pass with {seq_len // 2} tokens of context, at {mean} loops where there "
        "are loops; training costs three times as much. Seconds are those of training one seed, the mean over seeds, "
        f"on a machine that others used too. All runs of this record, sweeps included: {cpu_min:.0f} minutes of CPU.",
        "",
        *_table(
            ["arm", "blocks", "parameters", "without embedding", "MFLOP per token", "without head", "CPU s", "wall s"],
            [
                [
                    arm["title"],
                    "{} + {} looped + {}".format(*arm["blocks"]) if arm["blocks"][1] else str(arm["blocks"][0]),
                    f"{arm['parameters']:,}",
                    f"{arm['parameters_without_embedding']:,}",
                    f"{arm['flops'] / 1e6:.3f}",
                    f"{arm['flops_without_head'] / 1e6:.3f}",
                    *(f"{np.mean([run[clock] for run in runs[name]]):.0f}" for clock in ("cpu_s", "wall_s")),
                ]
                for name, arm in arms.items()
            ],
        ),
        "",
        "The plain transformer with their FLOPs has as many blocks as the looped arms unrolled, and no injection.",
        f"Sampled depth is 1 + Poisson({mean - 1}) for each window: {depths.mean():.2f} loops on average, 99 % of the "
        f"windows at most {np.quantile(depths, 0.99):.0f}, none above {depths.max()} (seed {seeds[0]}). Gradients go "
        "through all loops.",
        "",
        "## Learning rates",
        "",
        f"Bits per byte after {recipe['steps'] // 4} steps, by factor of the recipe's rates (AdamW "
        f"{recipe['optim']['lr']:g}, Muon {recipe['optim']['muon_lr']:g}): one seed, which no other run has, scored on "
        f"{results['sweep_rows']} windows of training text that no run of it reads. Where the best was at an end, the "
        "next factor was tried.",
        "",
        *_table(
            ["arm", *(f"x {rate:g}" for rate in rates), "chosen"],
            [
                [arms[name]["title"], *(_score(sweep, rate, results) for rate in rates), f"{best(sweep):g}"]
                for name, sweep in results["sweep"].items()
            ],
        ),
        "",
    ]


def _mean(results: Result) -> int:
    return int(results["recipe"]["loops"]["mean"])


def _seeds(results: Result) -> str:
    n = len(results["runs"]["sampled"])
    return f"{n} seed{'s' * (n > 1)}"


def _tokens(results: Result) -> int:
    recipe = results["recipe"]
    return recipe["steps"] * recipe["batch_size"] * recipe["data"]["seq_len"]


def _line(bits: dict[str, np.ndarray], i: int) -> list[np.ndarray]:
    """(seeds, windows) of each arm at the i-th number of loops."""
    return [x[:, i if x.shape[1] > 1 else 0] for x in bits.values()]


def _between(x: np.ndarray, form: str) -> str:
    low, high = interval(x.mean(0))
    return f"{low:{form}} to {high:{form}}"


def _listed(values: np.ndarray, form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def _listed_by_name(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def _score(sweep: Result, rate: float, results: Result) -> str:
    run = sweep.get(str(rate))
    return f"{np.mean(run['bits']) / results['bytes_per_window']:.4f}" if run else ""


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]
