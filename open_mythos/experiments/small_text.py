"""Text: what do more loops give a model trained at sampled depth, and is it better than a plain transformer?"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from open_mythos.accounting import count_parameters, flops_per_token
from open_mythos.analysis.per_loop import by_loop
from open_mythos.experiments.prepared_text import hashes, held_out, null_lines, prepare_corpus, prepared, split, unread
from open_mythos.experiments.study import Lab, Result, Results, Run, Study, curve, plain, vary
from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.reports.document import Table
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import TextEstimate, token_bits
from open_mythos.tasks.task import Batch
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig

LOOPS = (1, 2, 4, 6, 8, 12, 16)
WINDOWS = 400
"""Held-out windows of the evaluation; the quick form has a tenth."""
RATES = (0.5, 1.0, 2.0)
"""Factors of the recipe's learning rates with which every arm's sweep begins."""
SWEEP_SEED = 1000
SWEEP_ROWS = 128
"""Windows of the training text that score a sweep; no run reads them."""
LOOPED, PLAIN = ("sampled", "fixed"), ("parameters", "flops")
WORTH = {"higher": "worse", "lower": "better", "undecided": "undecided"}
"""Words for a difference in bits per byte, about the first of two models."""


def arms(quick: bool) -> dict[str, TrainConfig]:
    """The recipe; a fixed depth; plain transformers with its parameters and with its FLOPs; and one choice undone."""
    size = {"steps": 4, "batch_size": 2} if quick else {}
    base = vary(load_recipe("small-text"), dtype="float32", eval=EvalConfig(), **size)
    model, flat = base.model, vary(base, loops=LoopsConfig())
    outside = model.prelude_layers + model.coda_layers
    return {
        "sampled": base,
        "fixed": vary(base, loops=LoopsConfig("fixed", base.loops.mean)),
        "parameters": plain(flat, outside + model.recurrent_layers),
        "flops": plain(flat, outside + model.recurrent_layers * int(base.loops.mean)),
        "unnormed": vary(base, model={"prelude_norm": False}),
    }


def costs(cfg: TrainConfig) -> dict[str, Any]:
    """Return blocks, parameters, and FLOPs of a token's forward pass at the mean depth, half a window being context."""
    counts, model = count_parameters(cfg.model), cfg.model
    flops = flops_per_token(model, int(cfg.loops.mean) if model.recurrent_layers else 1, cfg.data.seq_len // 2)
    return {
        "blocks": [model.prelude_layers, model.recurrent_layers, model.coda_layers],
        "parameters": counts.total,
        "parameters_without_embedding": counts.total - counts.embedding,
        "flops": flops,
        "flops_without_head": flops - 2 * model.vocab_size * model.dim,
    }


def at_rate(cfg: TrainConfig, rate: float) -> TrainConfig:
    """Return the run at `rate` times the recipe's learning rates."""
    return vary(cfg, optim={"lr": cfg.optim.lr * rate, "muon_lr": cfg.optim.muon_lr * rate})


def seeded(cfg: TrainConfig, seed: int) -> TrainConfig:
    """Return the run with weights, depths and order of the text of its own."""
    return vary(cfg, seed=seed, data={"order_seed": seed})


def window_bits(model: OpenMythos, batch: Batch, loops: tuple[int, ...]) -> Tensor:
    """Return (loops, windows) the bits of the labels of each window; one line for a model without loops."""
    return by_loop(model, batch, loops, lambda logits, labels: token_bits(logits, labels).double().sum(1), rows=8)


def rounded_bits(batch: Batch, loops: tuple[int, ...], model: OpenMythos) -> Result:
    """Return `window_bits` as plain values."""
    return {"bits": window_bits(model, batch, loops).numpy().round(2).tolist()}


def best(sweep: Result) -> float:
    """Return the factor of the learning rates with the lowest score."""
    return float(min(sweep, key=lambda rate: np.sum(sweep[rate]["bits"])))


def sweep(name: str, cfg: TrainConfig, lab: Lab) -> dict[str, Result]:
    """Run a quarter of the steps at several factors of the rates, until the best factor is not the first or last."""
    schedule = {"warmup_steps": cfg.schedule.warmup_steps // 4}
    cfg = seeded(vary(cfg, steps=cfg.steps // 4, schedule=schedule), SWEEP_SEED)
    batch, loops = unread(cfg, SWEEP_ROWS), (int(cfg.loops.mean),)
    asked = {"text": hashes(cfg), "windows": len(batch.labels), "loops": loops}
    rates, found = list(RATES), {}
    for rate in rates:
        label = f"sweep-{name}-{rate}"
        found[str(rate)] = lab.measured(label, at_rate(cfg, rate), partial(rounded_bits, batch, loops), **asked)
        further = {min(rates): min(rates) / 2, max(rates): max(rates) * 2}
        if len(found) == len(rates) and best(found) in further and not lab.quick:
            rates.append(further[best(found)])
    return found


def held_out_windows(cfg: TrainConfig, quick: bool) -> Batch:
    """Return the windows of the evaluation."""
    return held_out(cfg, WINDOWS // 10 if quick else WINDOWS)


def prepare(lab: Lab, arms: dict[str, TrainConfig]) -> Result:
    """Prepare the text, give every arm the learning rates of its sweep, and return what the arms share."""
    base = arms["sampled"]
    data = prepared(base)
    prepare_corpus(Path(data.paths[0]), base.model.vocab_size)
    unread(base, SWEEP_ROWS)
    sweeps = {name: sweep(name, arms[name], lab) for name in (*LOOPED, *PLAIN)}
    for name, cfg in arms.items():
        arms[name] = at_rate(cfg, best(sweeps.get(name, sweeps["sampled"])))
    depths = np.stack([base.loops.depths(lab.seeds[0], step, base.batch_size) for step in range(base.steps)])
    return {
        "recipe": base.to_dict(),
        "held_out_documents": split(base, "validation").n_documents,
        "bytes_per_window": data.bytes_per_token * data.seq_len,
        "costs": {name: costs(cfg) for name, cfg in arms.items()},
        "depths": np.bincount(depths.flatten()).tolist(),
        "nulls": null_lines(base, held_out_windows(base, lab.quick)),
        "sweep": sweeps,
    }


def measure(run: Run) -> Result:
    """Return the bits of every held-out window by loops."""
    return rounded_bits(held_out_windows(run.config, run.lab.quick), LOOPS, run.model)


def settings(cfg: TrainConfig, quick: bool) -> dict[str, Any]:
    """Return the text, by its hashes, and the windows and loops of the evaluation."""
    return {"text": hashes(cfg), "windows": len(held_out_windows(cfg, quick).labels), "loops": LOOPS}


def bits(r: Results, arm: str, n_loops: int) -> TextEstimate:
    """Return the bits per byte of an arm at a number of loops."""
    return TextEstimate(r[arm, "bits"].where(loops=n_loops).values / r.raw["bytes_per_window"], ".4f")


def against_plain(r: Results, arm: str, mean: int) -> str:
    """Return how an arm compares with the plain transformers, as a clause."""
    less = {r.title(other): bits(r, arm, mean) - bits(r, other, 1) for other in PLAIN}
    said = ", ".join(f"{WORTH[x.verdict]} than {title} ({x.mean:+.3f})" for title, x in less.items())
    return f"{r.title(arm)}: {said}"


def contrasts(r: Results, mean: int) -> dict[str, TextEstimate]:
    """Return by title the bits per byte of the first named less the second."""
    title, (sampled, fixed) = r.title, LOOPED
    loops = [(arm, n) for arm in LOOPED for n in (1, LOOPS[-1])]
    found = {
        f"{title(arm)}: {n} loop{'s' * (n > 1)} less {mean}": bits(r, arm, n) - bits(r, arm, mean) for arm, n in loops
    }
    both = f"{title(sampled)} less {title(fixed)}, both at {mean}"
    found[both] = bits(r, sampled, mean) - bits(r, fixed, mean)
    for arm in LOOPED:
        for other in PLAIN:
            found[f"{title(arm)} at {mean} less {title(other)}"] = bits(r, arm, mean) - bits(r, other, 1)
    return found


def fill(r: Results) -> dict[str, Any]:
    """Return the differences, the bits by loops, and the facts of the recipe, the arms and the sweeps."""
    raw, cfg, per_window = r.raw, r.raw["recipe"], r.raw["bytes_per_window"]
    mean, one_seed = int(cfg["loops"]["mean"]), len(r.runs["sampled"]) == 1
    deeper = bits(r, "sampled", LOOPS[-1]) - bits(r, "sampled", mean)
    depths = np.repeat(np.arange(len(raw["depths"])), raw["depths"])
    every = [run for runs in (*r.runs.values(), *map(dict.values, raw["sweep"].values())) for run in runs]
    rates = sorted({float(rate) for sweep in raw["sweep"].values() for rate in sweep})

    def row(scores: list[list[float]], n: int) -> list[str]:
        return [f"{np.mean(score) / per_window:.4f}" if score else "" for score in scores] + [""] * (n - len(scores))

    return {
        "mean": mean,
        "n_tokens": cfg["steps"] * cfg["batch_size"] * cfg["data"]["seq_len"],
        "n_bytes": r.runs["sampled"][0]["asked"]["windows"] * per_window,
        "n_seeds": r.n_seeds("sampled"),
        "one": ": here there is one, so a difference between arms is one of single runs" * one_seed,
        **{arm: against_plain(r, arm, mean) for arm in LOOPED},
        "deeper": deeper,
        "deeper_worth": WORTH[deeper.verdict],
        "contrasts": [
            {"what": what, "x": x, "by_seed": ", ".join(f"{value:+.4f}" for value in x.by_seed.mean(1))}
            for what, x in contrasts(r, mean).items()
        ],
        "by_loops": [{"loops": n} | {arm: bits(r, arm, n) for arm in (*LOOPED, *PLAIN)} for n in LOOPS],
        "by_seed": Table(
            ["arm", "seed", *LOOPS],
            [
                [r.title(arm), run["seed"], *row(run["bits"], len(LOOPS))]
                for arm, runs in r.runs.items()
                for run in runs
            ],
        ),
        "context": cfg["data"]["seq_len"] // 2,
        "minutes": sum(run["cpu_s"] for run in every) / 60,
        "arms": [
            r.arm(arm)
            | facts
            | {"layers": "{} + {} looped + {}".format(*facts["blocks"]) if facts["blocks"][1] else facts["blocks"][0]}
            | {"mflops": facts["flops"] / 1e6, "without_head": facts["flops_without_head"] / 1e6}
            for arm, facts in raw["costs"].items()
        ],
        "depth": {"mean": depths.mean(), "most": depths.max(), "quantile": np.quantile(depths, 0.99)},
        "sweeps": Table(
            ["arm", *(f"x {rate:g}" for rate in rates), "chosen"],
            [
                [r.title(arm), *row([sweep.get(str(rate), {}).get("bits") for rate in rates], 0), f"{best(sweep):g}"]
                for arm, sweep in raw["sweep"].items()
            ],
        ),
    }


def named(r: Results, arm: str) -> str:
    """Return the title of an arm with its costs."""
    facts = r.raw["costs"][arm]
    return f"{r.title(arm)}: {facts['parameters'] / 1e6:.2f} M parameters, {facts['flops'] / 1e6:.1f} MFLOP per token"


def draw_loops(r: Results, path: Path) -> None:
    curves = [curve(LOOPS, [bits(r, arm, n) for n in LOOPS], named(r, arm)) for arm in (*LOOPED, *PLAIN)]
    draw_curves({"Text by loops": curves}, path, ("loops", "bits per byte of held-out text"))


def draw_closer(r: Results, path: Path) -> None:
    base, loops = bits(r, "parameters", 1), [n for n in LOOPS if n >= r.raw["recipe"]["loops"]["mean"]]
    curves = [curve(loops, [bits(r, arm, n) - base for n in loops], named(r, arm)) for arm in (*LOOPED, "flops")]
    curves.append(Curve((loops[0], loops[-1]), (0, 0), named(r, "parameters"), None))
    draw_curves({"Closer": curves}, path, ("loops", "bits per byte, difference"))


STUDY = Study(
    title="Text: sampled depth, fixed depth, and plain transformers",
    question="What do more loops give a model of text that was trained at sampled depth, and is it better than a plain "
    "transformer with as many parameters, or with as many FLOPs?",
    page=Path(__file__).with_suffix(".md"),
    cost=("1 min", "30 min for one seed"),
    arms=arms,
    titles={
        "sampled": "looped, sampled depth",
        "fixed": "looped, fixed depth",
        "parameters": "plain, same parameters",
        "flops": "plain, same FLOPs",
        "unnormed": "looped, sampled depth, prelude output not normalised",
    },
    seeds=(0,),
    n_seeds={"unnormed": 1},
    seeded=seeded,
    settings=settings,
    prepare=prepare,
    measure=measure,
    axes={"bits": {"loops": LOOPS, "window": range(WINDOWS)}},
    fill=fill,
    figures={"loops": draw_loops, "closer": draw_closer},
)
