"""The figure and the report of `small_text`, made from its raw numbers alone."""

from functools import partial

import numpy as np

from open_mythos.experiments.study import Result
from open_mythos.reports.document import Figure, Part, Report, Table
from open_mythos.reports.figures import interval_curves
from open_mythos.reports.stats import TextEstimate


def best(sweep: Result) -> float:
    """The factor of the learning rates with the lowest score."""
    return float(min(sweep, key=lambda rate: np.sum(sweep[rate]["bits"])))


def bits_per_byte(results: Result) -> dict[str, np.ndarray]:
    """(seeds, loops, windows) of each arm; one in place of loops for a plain one."""
    return {
        name: np.array([run["bits"] for run in runs]) / results["bytes_per_window"]
        for name, runs in results["runs"].items()
    }


def contrasts(results: Result) -> dict[str, np.ndarray]:
    """What is compared -> (seeds, windows) bits per byte of the first named less the second."""
    bits, loops, mean = bits_per_byte(results), results["loops"], _mean(results)
    title = {name: arm["title"] for name, arm in results["arms"].items()}
    at = {(name, n): bits[name][:, i] for name in ("sampled", "fixed") for i, n in enumerate(loops)}
    found = {}
    for name in ("sampled", "fixed"):
        for n in (1, loops[-1]):
            found[_deeper(title[name], n, mean)] = at[name, n] - at[name, mean]
    found[f"{title['sampled']} less {title['fixed']}, both at {mean}"] = at["sampled", mean] - at["fixed", mean]
    for name in ("sampled", "fixed"):
        for plain in ("parameters", "flops"):
            found[_against(results["arms"], name, plain, mean)] = at[name, mean] - bits[plain][:, 0]
    return found


def small_text_report(results: Result) -> Report:
    recipe, runs, arms, mean = results["recipe"], results["runs"], results["arms"], _mean(results)
    bits, loops, compared = bits_per_byte(results), results["loops"], contrasts(results)
    seeds = [run["asked"]["config"]["seed"] for run in runs["sampled"]]
    everything = [r for rs in runs.values() for r in rs] + [r for s in results["sweep"].values() for r in s.values()]
    seq_len, n_windows = recipe["data"]["seq_len"], runs["sampled"][0]["asked"]["windows"]
    depths = np.repeat(np.arange(len(results["depths"])), results["depths"])
    rates = sorted({float(rate) for sweep in results["sweep"].values() for rate in sweep})
    several = {name: bits[name] for name in results["sweep"]}
    one = ": here there is one, so a difference between arms is one of single runs" if len(seeds) == 1 else ""
    parts: list[Part] = [
        f"Recipe `small-text`: {recipe['steps']} steps of {recipe['batch_size']} windows of {seq_len} tokens, "
        f"{recipe['steps'] * recipe['batch_size'] * seq_len:,} tokens: less than an epoch. The vocabulary is a BPE of "
        f"{recipe['model']['vocab_size']} tokens; its merges have seen the held-out text too. Held out: {n_windows} "
        f"windows, {n_windows * results['bytes_per_window']:,.0f} bytes, of {results['held_out_documents']} documents.",
        *_figures(several, loops, mean, {name: _named(arm) for name, arm in arms.items()}),
        "## What it says",
        "Differences of bits per byte, window by window; negative: the first is better. *Higher* and *lower* stand "
        f"where the interval and every seed agree on the sign ({_seeds(results)}).",
        Table(
            ["difference", "mean", "95 % over windows", "by seed", ""],
            [
                [
                    what,
                    f"{x.mean():+.4f}",
                    TextEstimate(x).between("+.4f"),
                    _listed(x.mean(1), "+.4f"),
                    TextEstimate(x).verdict(),
                ]
                for what, x in compared.items()
            ],
        ),
        "The interval is that of the text: from a bootstrap over windows, with the mean over seeds in each, and "
        f"neighbours taken for independent. What another seed would give is seen in the column of seeds alone{one}.",
        "## Bits per byte",
        Table(
            ["loops", *(arms[name]["title"] for name in several)],
            [
                [str(n), *(f"{x.mean():.4f} ({TextEstimate(x).between('.3f')})" for x in _line(several, i))]
                for i, n in enumerate(loops)
            ],
        ),
        "A plain transformer has no loops: its one value stands in every line. Without a network: "
        f"{_listed_by_name(results['nulls'])}; the counts are those of all the training text, three times what an arm "
        "reads.",
        Table(
            ["arm", "seed", *map(str, loops)],
            [
                [
                    arms[name]["title"],
                    str(seed),
                    *(f"{x:.4f}" for x in values.mean(1)),
                    *[""] * (len(loops) - len(values)),
                ]
                for name in bits
                for seed, values in zip(seeds, bits[name], strict=False)
            ],
        ),
        "The last line, one run, undoes a choice of the recipe: the norm between prelude and loop. Its rates are "
        "those chosen for sampled depth.",
        "## The arms",
        f"FLOPs are those of a token's forward pass with {seq_len // 2} tokens of context, at {mean} loops where there "
        "are loops; training costs three times as much. Seconds are those of training one seed, the mean over seeds. "
        f"All runs of this record, sweeps included: {sum(run['cpu_s'] for run in everything) / 60:.0f} minutes of CPU.",
        Table(
            ["arm", "blocks", "parameters", "without embedding", "MFLOP per token", "without head", "CPU s"],
            [
                [
                    arm["title"],
                    "{} + {} looped + {}".format(*arm["blocks"]) if arm["blocks"][1] else str(arm["blocks"][0]),
                    f"{arm['parameters']:,}",
                    f"{arm['parameters_without_embedding']:,}",
                    f"{arm['flops'] / 1e6:.3f}",
                    f"{arm['flops_without_head'] / 1e6:.3f}",
                    f"{np.mean([run['cpu_s'] for run in runs[name]]):.0f}",
                ]
                for name, arm in arms.items()
            ],
        ),
        "The plain transformer with their FLOPs has as many blocks as the looped arms unrolled, and no injection. "
        f"Sampled depth is 1 + Poisson({mean - 1}) for each window: {depths.mean():.2f} loops on average, 99 % of the "
        f"windows at most {np.quantile(depths, 0.99):.0f}, none above {depths.max()} (seed {seeds[0]}). Gradients go "
        "through all loops.",
        "## Learning rates",
        f"Bits per byte after {recipe['steps'] // 4} steps, by factor of the recipe's rates (AdamW "
        f"{recipe['optim']['lr']:g}, Muon {recipe['optim']['muon_lr']:g}): one seed, which no other run has, scored on "
        f"{results['sweep_rows']} windows of training text that no run of it reads. Where the best was at an end, the "
        "next factor was tried.",
        Table(
            ["arm", *(f"x {rate:g}" for rate in rates), "chosen"],
            [
                [arms[name]["title"], *(_score(sweep, rate, results) for rate in rates), f"{best(sweep):g}"]
                for name, sweep in results["sweep"].items()
            ],
        ),
    ]
    worth = {"higher": "worse", "lower": "better", "undecided": "undecided"}
    said = []
    for name in ("sampled", "fixed"):
        against = {arms[p]["title"]: compared[_against(arms, name, p, mean)] for p in ("parameters", "flops")}
        found = (f"{worth[TextEstimate(x).verdict()]} than {plain} ({x.mean():+.3f})" for plain, x in against.items())
        said.append(f"{arms[name]['title']}: {', '.join(found)}")
    deeper = compared[_deeper(arms["sampled"]["title"], loops[-1], mean)]
    return Report(
        f"Bits per byte of held-out text at {mean} loops ({_seeds(results)}): "
        f"{'; '.join(said)}. Sampled depth at {loops[-1]} loops less at {mean}: {deeper.mean():+.4f} "
        f"({worth[TextEstimate(deeper).verdict()]}).",
        parts,
    )


def _figures(bits: dict[str, np.ndarray], loops: list[int], mean: int, names: dict[str, str]) -> list[Part]:
    curves = {
        names[name]: [(n, *TextEstimate(_line({name: x}, i)[0]).interval) for i, n in enumerate(loops)]
        for name, x in bits.items()
    }
    of = bits["parameters"][:, 0]
    less = {
        names[name]: [
            (n, *TextEstimate(_line({name: x}, i)[0] - of).interval) for i, n in enumerate(loops) if n >= mean
        ]
        for name, x in bits.items()
        if name != "parameters"
    }
    caption = "Bits per byte by loops, with 95 % intervals over windows."
    closer = f"The same from {mean} loops on, less those of the plain transformer of as many parameters in each window."
    labels = ("loops", "bits per byte of held-out text"), ("loops", "bits per byte, difference")
    level = (names["parameters"], 0.0)
    return [
        Figure("loops", caption, partial(interval_curves, curves, labels[0], "Text by loops")),
        Figure("closer", closer, partial(interval_curves, less, labels[1], "Closer", level=level)),
    ]


def _named(arm: Result) -> str:
    return f"{arm['title']}: {arm['parameters'] / 1e6:.2f} M parameters, {arm['flops'] / 1e6:.1f} MFLOP per token"


def _deeper(title: str, n: int, mean: int) -> str:
    return f"{title}: {n} loop{'s' * (n > 1)} less {mean}"


def _against(arms: Result, name: str, plain: str, mean: int) -> str:
    return f"{arms[name]['title']} at {mean} less {arms[plain]['title']}"


def _mean(results: Result) -> int:
    return int(results["recipe"]["loops"]["mean"])


def _seeds(results: Result) -> str:
    n = len(results["runs"]["sampled"])
    return f"{n} seed{'s' * (n > 1)}"


def _line(bits: dict[str, np.ndarray], i: int) -> list[np.ndarray]:
    """(seeds, windows) of each arm at the i-th number of loops."""
    return [x[:, i if x.shape[1] > 1 else 0] for x in bits.values()]


def _listed(values: np.ndarray, form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def _listed_by_name(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def _score(sweep: Result, rate: float, results: Result) -> str:
    run = sweep.get(str(rate))
    return f"{np.mean(run['bits']) / results['bytes_per_window']:.4f}" if run else ""
