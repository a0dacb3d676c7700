"""Text: what do more loops give a model trained at sampled depth, and is it better than a plain transformer?"""

import dataclasses
import gzip
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
from open_mythos.experiments.small_text_report import best, small_text_report
from open_mythos.experiments.study import Experiment, Lab, Result, seeded
from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.reports.stats import token_bits
from open_mythos.tasks import Shards
from open_mythos.tasks.task import Batch, to_tensor
from open_mythos.tokenization.tokenizer import BPETokenizer
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig

LOOPS = (1, 2, 4, 6, 8, 12, 16)
RATES = (0.5, 1.0, 2.0)
"""Factors of the recipe's learning rates that every arm's sweep begins with."""
SWEEP_SEED = 1000
SWEEP_ROWS = 128
"""Windows of the training text that score a sweep; no run reads them."""
TITLES = {
    "sampled": "looped, sampled depth",
    "fixed": "looped, fixed depth",
    "parameters": "plain, same parameters",
    "flops": "plain, same FLOPs",
    # One more run, of the first seed alone, which undoes a choice of the recipe.
    "unnormed": "looped, sampled depth, prelude output not normalised",
}
WINDOWS = 400
"""Held-out windows of the evaluation."""


def arms(base: TrainConfig) -> dict[str, TrainConfig]:
    """The recipe, its twin at a fixed depth, and plain transformers with its parameters and with its FLOPs."""
    base = dataclasses.replace(base, eval=EvalConfig())
    model, loops = base.model, LoopsConfig("fixed", base.loops.mean)
    outside = model.prelude_layers + model.coda_layers
    return {
        "sampled": base,
        "fixed": dataclasses.replace(base, loops=loops),
        "parameters": _plain(base, outside + model.recurrent_layers),
        "flops": _plain(base, outside + model.recurrent_layers * int(base.loops.mean)),
    }


def _plain(base: TrainConfig, blocks: int) -> TrainConfig:
    layers = {"prelude_layers": blocks, "coda_layers": 0, "recurrent_layers": 0}
    model = dataclasses.replace(base.model, **layers, prelude_norm=False)
    return dataclasses.replace(base, model=model, loops=LoopsConfig())


def task(cfg: TrainConfig) -> Shards:
    """The prepared text of the recipe."""
    if not isinstance(cfg.data, Shards):
        raise TypeError(f"the recipe small-text trains on {cfg.data.name!r}, not on shards; mend the recipe")
    return cfg.data


def costs(cfg: TrainConfig) -> dict[str, Any]:
    """Blocks, parameters, and FLOPs of a token's forward pass at the mean depth with half a window of context."""
    counts, model = count_parameters(cfg.model), cfg.model
    flops = flops_per_token(model, int(cfg.loops.mean) if model.recurrent_layers else 1, cfg.data.seq_len // 2)
    return {
        "blocks": [model.prelude_layers, model.recurrent_layers, model.coda_layers],
        "parameters": counts.total,
        "parameters_without_embedding": counts.total - counts.embedding,
        "flops": flops,
        "flops_without_head": flops - 2 * model.vocab_size * model.dim,
    }


def tuned(cfg: TrainConfig, seed: int, rate: float) -> TrainConfig:
    """The run with weights, depths and order of the text of its own, at `rate` times the recipe's learning rates."""
    optim = dataclasses.replace(cfg.optim, lr=cfg.optim.lr * rate, muon_lr=cfg.optim.muon_lr * rate)
    data = dataclasses.replace(cfg.data, order_seed=seed)
    return dataclasses.replace(seeded(cfg, seed), data=data, optim=optim)


def window_bits(model: OpenMythos, batch: Batch, loops: tuple[int, ...]) -> Tensor:
    """(loops, windows) bits of the labels of each window; one line for a model without loops."""
    return by_loop(model, batch, loops, lambda logits, labels: token_bits(logits, labels).double().sum(1), rows=8)


def held_out(data: Shards, n: int) -> Batch:
    """`n` windows (or all, if there are fewer) of the held-out text, at even distances and without overlap."""
    tokens = TokenShards(data.paths[0], "validation")
    there = (tokens.n_tokens - 1) // data.seq_len
    places = np.linspace(0, there - 1, min(n, there)).astype(int)
    return _batch([tokens.read(int(i) * data.seq_len, data.seq_len + 1) for i in places])


def unread(cfg: TrainConfig) -> Batch:
    """The last windows of the first epoch, in the order of the run: training text that it does not come to.

    Raises:
        ValueError: it does.
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
    """Bits per byte without a network: from counts of all the training text, and by gzip of the held-out text."""
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
    """What the commands in the recipe's docstring do, as far as it is not done."""
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


def run(lab: Lab) -> Result:
    base = load_recipe("small-text")
    if lab.quick:
        base = dataclasses.replace(base, steps=4, batch_size=2)
    data = task(base)
    prepare_corpus(Path(data.paths[0]), base.model.vocab_size)
    unread(base)
    batch, every = held_out(data, 40 if lab.quick else WINDOWS), arms(base)
    depths = np.stack([base.loops.depths(lab.seeds[0], step, base.batch_size) for step in range(base.steps)])
    sweep = {name: _sweep(name, cfg, lab) for name, cfg in every.items()}
    every["unnormed"] = dataclasses.replace(every["sampled"], model=dataclasses.replace(base.model, prelude_norm=False))
    results: Result = {
        "recipe": base.to_dict(),
        "loops": LOOPS,
        "held_out_documents": TokenShards(data.paths[0], "validation").n_documents,
        "bytes_per_window": data.bytes_per_token * data.seq_len,
        "arms": {name: {"title": TITLES[name]} | costs(cfg) for name, cfg in every.items()},
        "depths": np.bincount(depths.flatten()).tolist(),
        "nulls": null_lines(data, batch),
        "sweep_rows": SWEEP_ROWS,
        "sweep": sweep,
        "runs": {name: [] for name in every},
    }
    for seed in lab.seeds:
        for name, cfg in every.items():
            if name != "unnormed" or seed == lab.seeds[0]:
                rates = sweep.get(name, sweep["sampled"])
                found = _measured(f"{name}-{seed}", tuned(cfg, seed, best(rates)), lab, batch, LOOPS)
                results["runs"][name].append(found)
    return results


def _sweep(name: str, cfg: TrainConfig, lab: Lab) -> dict[str, Result]:
    """Runs of a quarter of the steps by factor of the rates, which goes on until the best is not at an end."""
    warmup = cfg.schedule.warmup_steps // 4
    cfg = dataclasses.replace(
        cfg, steps=cfg.steps // 4, schedule=dataclasses.replace(cfg.schedule, warmup_steps=warmup)
    )
    found: dict[str, Result] = {}
    waiting = list(RATES)
    while waiting:
        for rate in waiting:
            run = tuned(cfg, SWEEP_SEED, rate)
            found[str(rate)] = _measured(f"sweep-{name}-{rate}", run, lab, unread(run), (int(cfg.loops.mean),))
        rates = [float(rate) for rate in found]
        further = {min(rates): min(rates) / 2, max(rates): max(rates) * 2}
        waiting = [further[best(found)]] if best(found) in further and not lab.quick else []
    return found


def _measured(label: str, cfg: TrainConfig, lab: Lab, batch: Batch, loops: tuple[int, ...]) -> Result:
    def bits(model: OpenMythos) -> Result:
        return {"bits": window_bits(model, batch, loops).numpy().round(2).tolist()}

    text = [shard.sha256 for split in SPLITS for shard in TokenShards(task(cfg).paths[0], split).shards]
    return lab.measured(label, cfg, bits, text=text, windows=len(batch.labels), loops=loops)


EXPERIMENT = Experiment(
    title="Text: sampled depth, its fixed twin, and plain transformers",
    question="What do more loops give a model of text that was trained at sampled depth, and is it better than a plain "
    "transformer with as many parameters, or with as many FLOPs?",
    protocol="""Four arms read the same tokens in the same order, with the same optimizers (Muon and AdamW): the recipe
`small-text`, whose depth is sampled; its twin at one fixed depth; a plain transformer with as many parameters; one with
as many FLOPs per token. Each arm's learning rates are those of its own sweep of shorter runs, all swept alike and
scored on training text that no run reads. Then bits per byte of held-out text (of the corpus of `mythos fetch-corpus`:
one play and 46 chapters of the Bible; training has other plays and chapters), at 1 to 16 loops where there are loops.
Each seed has its own weights, depths and order of the text. Null lines: counts of single tokens and of pairs, and
gzip.""",
    cost=("1 min", "30 min for one seed"),
    run=run,
    report=small_text_report,
    seeds=(0,),
)
