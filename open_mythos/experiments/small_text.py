"""Text: what do more loops give a model trained at sampled depth, and is it better than a plain transformer?"""

import dataclasses
import gzip
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from open_mythos.accounting import count_parameters, flops_per_token
from open_mythos.analysis.per_loop import by_loop
from open_mythos.data.corpus import build_corpus
from open_mythos.data.documents import first_text
from open_mythos.data.prepare import Settings, prepare
from open_mythos.data.records import Reading
from open_mythos.data.shards import INDEX, SPLITS, TokenShards
from open_mythos.experiments.study import Lab, Result, Results, Run, Study, curve, plain
from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.reports.document import Table
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import TextEstimate, token_bits
from open_mythos.tasks import Shards
from open_mythos.tasks.task import Batch, to_tensor
from open_mythos.tokenization.tokenizer import BPETokenizer
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
"""What a difference in bits per byte says of the first of two models."""


def arms(quick: bool) -> dict[str, TrainConfig]:
    """The recipe; a fixed depth; plain transformers with its parameters and with its FLOPs; and one choice undone."""
    base = dataclasses.replace(load_recipe("small-text"), eval=EvalConfig())
    if quick:
        base = dataclasses.replace(base, steps=4, batch_size=2)
    model, flat = base.model, dataclasses.replace(base, loops=LoopsConfig())
    outside = model.prelude_layers + model.coda_layers
    return {
        "sampled": base,
        "fixed": dataclasses.replace(base, loops=LoopsConfig("fixed", base.loops.mean)),
        "parameters": plain(flat, outside + model.recurrent_layers),
        "flops": plain(flat, outside + model.recurrent_layers * int(base.loops.mean)),
        "unnormed": dataclasses.replace(base, model=dataclasses.replace(model, prelude_norm=False)),
    }


def task(cfg: TrainConfig) -> Shards:
    """Return the prepared text of the recipe."""
    if not isinstance(cfg.data, Shards):
        raise TypeError(f"the recipe small-text trains on {cfg.data.name!r}, not on shards; fix the recipe")
    return cfg.data


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
    optim = dataclasses.replace(cfg.optim, lr=cfg.optim.lr * rate, muon_lr=cfg.optim.muon_lr * rate)
    return dataclasses.replace(cfg, optim=optim)


def seeded(cfg: TrainConfig, seed: int) -> TrainConfig:
    """Return the run with weights, depths and order of the text of its own."""
    return dataclasses.replace(cfg, seed=seed, data=dataclasses.replace(task(cfg), order_seed=seed))


def best(sweep: Result) -> float:
    """Return the factor of the learning rates with the lowest score."""
    return float(min(sweep, key=lambda rate: np.sum(sweep[rate]["bits"])))


def window_bits(model: OpenMythos, batch: Batch, loops: tuple[int, ...]) -> Tensor:
    """Return (loops, windows) the bits of the labels of each window; one line for a model without loops."""
    return by_loop(model, batch, loops, lambda logits, labels: token_bits(logits, labels).double().sum(1), rows=8)


def held_out(data: Shards, n: int) -> Batch:
    """Return `n` windows of the held-out text, or all if there are fewer, at even distances and without overlap."""
    tokens = TokenShards(data.paths[0], "validation")
    there = (tokens.n_tokens - 1) // data.seq_len
    places = np.linspace(0, there - 1, min(n, there)).astype(int)
    return _batch([tokens.read(int(i) * data.seq_len, data.seq_len + 1) for i in places])


def unread(cfg: TrainConfig) -> Batch:
    """Return the last windows of the first epoch, in the order of the run: training text that the run never reads.

    Raises:
        ValueError: the run reads them.
    """
    folder = task(cfg).paths[0]
    n = (TokenShards(folder, "train").n_tokens - 1) // cfg.data.seq_len
    if cfg.steps * cfg.batch_size > n - SWEEP_ROWS:
        raise ValueError(
            f"{folder} has {n} windows for the {cfg.steps * cfg.batch_size} of a run and {SWEEP_ROWS} that "
            "it does not read; use more text"
        )
    return cfg.data.batch(np.random.default_rng(0), SWEEP_ROWS, first_row=n - SWEEP_ROWS)


def _batch(rows: list[np.ndarray]) -> Batch:
    ids = np.stack(rows)
    return Batch(to_tensor(ids[:, :-1]), to_tensor(ids[:, 1:]))


def null_lines(data: Shards, batch: Batch) -> dict[str, float]:
    """Return bits per byte without a network: from counts of the training text, and by gzip of the held-out text."""
    train, held = (TokenShards(data.paths[0], split) for split in ("train", "validation"))
    V, ids = train.info["vocab_size"], train.read(0, train.n_tokens)
    before, token = batch.input_ids.numpy(), batch.labels.numpy()
    single = (np.bincount(ids, minlength=V) + 1.0) / (len(ids) + V)
    pairs, counts = np.unique(ids[:-1] * V + ids[1:], return_counts=True)
    place = np.minimum(np.searchsorted(pairs, before * V + token), len(pairs) - 1)
    seen = np.where(pairs[place] == before * V + token, counts[place], 0)
    # The weight of the single tokens is that of 100 tokens seen (a Dirichlet prior).
    pair = (seen + 100 * single[token]) / (np.bincount(ids, minlength=V)[before] + 100)
    text = data.tokenizer().decode(held.read(0, held.n_tokens).tolist()).encode()
    bytes_per_token = data.bytes_per_token
    return {
        "counts of tokens": float(-np.log2(single[token]).mean() / bytes_per_token),
        "counts of pairs of tokens": float(-np.log2(pair).mean() / bytes_per_token),
        "gzip -9 of the held-out text": 8 * len(gzip.compress(text, 9)) / len(text),
    }


def prepare_corpus(folder: Path, vocab_size: int) -> None:
    """Do what the commands in the recipe's docstring do, as far as it is not done."""
    if (folder / INDEX).exists():
        return
    corpus, bpe = folder.parent / "corpus.jsonl", folder.parent / f"bpe-{vocab_size}"
    if not corpus.exists():
        build_corpus(corpus)
    if not bpe.exists():
        BPETokenizer.train(first_text([str(corpus)], Reading(max_document_bytes=2**62), 100 * 2**20), vocab_size).save(
            bpe
        )
    prepare([str(corpus)], folder, str(bpe), Settings(held_out=0.03))


def measured_on(batch: Batch, loops: tuple[int, ...], model: OpenMythos) -> Result:
    """Return the rounded bits of each window at each number of loops."""
    return {"bits": window_bits(model, batch, loops).numpy().round(2).tolist()}


def held_out_windows(cfg: TrainConfig, quick: bool) -> Batch:
    """Return the windows of the evaluation."""
    return held_out(task(cfg), WINDOWS // 10 if quick else WINDOWS)


def text_of(cfg: TrainConfig) -> list[str]:
    """Return the hashes of the prepared text, on which the numbers depend."""
    return [shard.sha256 for split in SPLITS for shard in TokenShards(task(cfg).paths[0], split).shards]


def sweep(name: str, cfg: TrainConfig, lab: Lab) -> dict[str, Result]:
    """Run a quarter of the steps at several factors of the rates, until the best factor is not the first or last."""
    warmup = cfg.schedule.warmup_steps // 4
    cfg = dataclasses.replace(
        cfg, steps=cfg.steps // 4, schedule=dataclasses.replace(cfg.schedule, warmup_steps=warmup)
    )
    found: dict[str, Result] = {}
    waiting = list(RATES)
    while waiting:
        for rate in waiting:
            run = seeded(at_rate(cfg, rate), SWEEP_SEED)
            batch, loops = unread(run), (int(cfg.loops.mean),)
            asked = {"text": text_of(cfg), "windows": len(batch.labels), "loops": loops}
            measure = partial(measured_on, batch, loops)
            found[str(rate)] = lab.measured(f"sweep-{name}-{rate}", run, measure, **asked)
        rates = [float(rate) for rate in found]
        further = {min(rates): min(rates) / 2, max(rates): max(rates) * 2}
        waiting = [further[best(found)]] if best(found) in further and not lab.quick else []
    return found


def prepare_runs(lab: Lab, arms: dict[str, TrainConfig]) -> Result:
    """Prepare the text, give every arm the learning rates of its sweep, and return what the arms share."""
    base = arms["sampled"]
    data = task(base)
    prepare_corpus(Path(data.paths[0]), base.model.vocab_size)
    unread(base)
    depths = np.stack([base.loops.depths(lab.seeds[0], step, base.batch_size) for step in range(base.steps)])
    sweeps = {name: sweep(name, arms[name], lab) for name in (*LOOPED, *PLAIN)}
    facts = {name: costs(cfg) for name, cfg in arms.items()}
    for name, cfg in arms.items():
        arms[name] = at_rate(cfg, best(sweeps.get(name, sweeps["sampled"])))
    return {
        "recipe": base.to_dict(),
        "held_out_documents": TokenShards(data.paths[0], "validation").n_documents,
        "bytes_per_window": data.bytes_per_token * data.seq_len,
        "costs": facts,
        "depths": np.bincount(depths.flatten()).tolist(),
        "nulls": null_lines(data, held_out_windows(base, lab.quick)),
        "sweep": sweeps,
    }


def measure(run: Run) -> Result:
    """Return the bits of every held-out window by loops."""
    return measured_on(held_out_windows(run.config, run.lab.quick), LOOPS, run.model)


def bits(r: Results, arm: str, n_loops: int) -> TextEstimate:
    """Return the bits per byte of an arm at a number of loops."""
    return TextEstimate(r[arm, "bits"].where(loops=n_loops).values / r.raw["bytes_per_window"], ".4f")


def contrasts(r: Results, mean: int) -> dict[str, TextEstimate]:
    """Return by title the bits per byte of the first named less the second."""
    title, found = r.title, {}
    for arm in LOOPED:
        for n in (1, LOOPS[-1]):
            what = f"{title(arm)}: {n} loop{'s' * (n > 1)} less {mean}"
            found[what] = bits(r, arm, n) - bits(r, arm, mean)
    sampled, fixed = LOOPED
    both = f"{title(sampled)} less {title(fixed)}, both at {mean}"
    found[both] = bits(r, sampled, mean) - bits(r, fixed, mean)
    for arm in LOOPED:
        for other in PLAIN:
            found[f"{title(arm)} at {mean} less {title(other)}"] = bits(r, arm, mean) - bits(r, other, 1)
    return found


def against_plain(r: Results, arm: str, mean: int) -> str:
    """Return how an arm compares with the plain transformers, as a clause."""
    less = {r.title(other): bits(r, arm, mean) - bits(r, other, 1) for other in PLAIN}
    said = ", ".join(f"{WORTH[x.verdict()]} than {title} ({x.mean:+.3f})" for title, x in less.items())
    return f"{r.title(arm)}: {said}"


def fill(r: Results) -> dict[str, Any]:
    """Return the differences, the bits by loops, and the facts of the recipe, the arms and the sweeps."""
    raw, cfg = r.raw, r.raw["recipe"]
    mean, per_window = int(cfg["loops"]["mean"]), raw["bytes_per_window"]
    n_windows, n_seeds = r.runs["sampled"][0]["asked"]["windows"], len(r.runs["sampled"])
    every = [run for runs in (*r.runs.values(), *map(dict.values, raw["sweep"].values())) for run in runs]
    deeper = bits(r, "sampled", LOOPS[-1]) - bits(r, "sampled", mean)
    depths = np.repeat(np.arange(len(raw["depths"])), raw["depths"])

    by_loops = [
        {"loops": n}
        | {arm: f"{bits(r, arm, n).mean:.4f} ({bits(r, arm, n).between('.3f')})" for arm in (*LOOPED, *PLAIN)}
        for n in LOOPS
    ]
    by_seed = [
        {"title": r.title(arm), "seed": run["seed"]}
        | {
            f"at_{n}": f"{np.mean(row) / per_window:.4f}" if row else ""
            for n, row in itertools.zip_longest(LOOPS, run["bits"])
        }
        for arm, runs in r.runs.items()
        for run in runs
    ]
    return {
        "recipe": cfg,
        "mean": mean,
        "n_tokens": cfg["steps"] * cfg["batch_size"] * cfg["data"]["seq_len"],
        "n_windows": n_windows,
        "n_bytes": n_windows * per_window,
        "documents": raw["held_out_documents"],
        "n_seeds": r.n_seeds("sampled"),
        "one": ": here there is one, so a difference between arms is one of single runs" if n_seeds == 1 else "",
        "sampled": against_plain(r, "sampled", mean),
        "fixed": against_plain(r, "fixed", mean),
        "deeper": deeper.mean,
        "deeper_worth": WORTH[deeper.verdict()],
        "contrasts": [
            {"what": what, "mean": x.mean, "between": x.between("+.4f"), "verdict": x.verdict()}
            | {"by_seed": ", ".join(f"{value:+.4f}" for value in x.by_seed.mean(1))}
            for what, x in contrasts(r, mean).items()
        ],
        "by_loops": by_loops,
        "by_seed": by_seed,
        "nulls": ", ".join(f"{name} {value:.3f}" for name, value in raw["nulls"].items()),
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
        "first_seed": r.runs["sampled"][0]["seed"],
        "sweep_steps": cfg["steps"] // 4,
        "sweep_rows": r.raw["sweep"]["sampled"]["1.0"]["asked"]["windows"],
        "sweeps": sweep_table(r),
    }


def sweep_table(r: Results) -> Table:
    """Return a table of the bits per byte at each learning rate of the sweeps, and the rate that was chosen."""
    sweeps, per_window = r.raw["sweep"], r.raw["bytes_per_window"]
    rates = sorted({float(rate) for sweep in sweeps.values() for rate in sweep})

    def score(sweep: Result, rate: float) -> str:
        return f"{np.mean(sweep[str(rate)]['bits']) / per_window:.4f}" if str(rate) in sweep else ""

    rows = [
        [r.title(arm), *(score(sweep, rate) for rate in rates), f"{best(sweep):g}"] for arm, sweep in sweeps.items()
    ]
    return Table(["arm", *(f"x {rate:g}" for rate in rates), "chosen"], rows)


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
    settings=lambda cfg, quick: {
        "text": text_of(cfg),
        "windows": len(held_out_windows(cfg, quick).labels),
        "loops": LOOPS,
    },
    prepare=prepare_runs,
    measure=measure,
    axes={"bits": {"loops": LOOPS, "window": range(WINDOWS)}},
    fill=fill,
    figures={"loops": draw_loops, "closer": draw_closer},
)
