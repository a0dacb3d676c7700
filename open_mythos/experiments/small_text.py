"""Text: what do more loops give a model trained at sampled depth, and is it better than a plain transformer?

    python -m open_mythos.experiments.small_text --out docs/results/small-text

Protocol: four arms read the same tokens: the recipe `small-text`, whose depth is sampled; its twin at one fixed depth;
a plain transformer with as many parameters; one with as many FLOPs per token. Each arm's learning rates are those of
its own sweep of shorter runs, all swept alike and scored on training text that no run reads. Then bits per byte of
held-out text, at 1 to 16 loops where there are loops. Null lines: counts of single tokens and of pairs, and gzip.
"""

import dataclasses
import gzip
import json
import math
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from open_mythos.accounting import count_parameters, flops_per_token
from open_mythos.data.corpus import build_corpus
from open_mythos.data.documents import Reading, first_text
from open_mythos.data.prepare import Settings, prepare
from open_mythos.data.shards import INDEX, SPLITS, TokenShards
from open_mythos.evaluating import evaluating
from open_mythos.experiments.small_text_report import best, write_record
from open_mythos.files import write_text
from open_mythos.model import OpenMythos
from open_mythos.nn.numerics import wide
from open_mythos.plots import require_matplotlib
from open_mythos.recipes import load_recipe
from open_mythos.tokenizer import BPETokenizer
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.data import Batch, to_tensor
from open_mythos.train.loops import LoopsConfig
from open_mythos.train.metrics import read_metrics
from open_mythos.train.tasks import Shards
from open_mythos.train.trainer import Trainer

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
}
UNNORMED = "looped, sampled depth, prelude output not normalised"
"""One more run, of the first seed alone, which undoes a choice of the recipe."""
Result = dict[str, Any]


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


def seeded(cfg: TrainConfig, seed: int, rate: float) -> TrainConfig:
    """The run with weights, depths and order of the text of its own, at `rate` times the recipe's learning rates."""
    optim = dataclasses.replace(cfg.optim, lr=cfg.optim.lr * rate, muon_lr=cfg.optim.muon_lr * rate)
    return dataclasses.replace(cfg, seed=seed, data=dataclasses.replace(cfg.data, order_seed=seed), optim=optim)


def window_bits(model: OpenMythos, batch: Batch, loops: tuple[int, ...] = LOOPS) -> np.ndarray:
    """(loops, windows) bits of the labels of each window; one line for a model without loops.

    One pass of the deepest call serves all: its state after loop n is the last state of a call with n loops.
    """
    parts = []
    with evaluating(model):
        for ids, labels in zip(batch.input_ids.split(8), batch.labels.split(8), strict=True):
            if model.recurrent is None:
                logits = [model(ids)]
            else:
                hidden = model(ids, n_loops=max(loops), trace=True).hidden
                view = model.make_view((ids.shape[0], ids.shape[1]))
                logits = (model.readout(hidden[n - 1], view) for n in loops)
            nats = [F.cross_entropy(wide(x).transpose(1, 2), labels, reduction="none").double().sum(1) for x in logits]
            parts.append(torch.stack(nats) / math.log(2))
    return torch.cat(parts, dim=1).numpy()


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


@dataclass
class Args:
    """Train the four arms, unless that is done, and record their bits per byte."""

    out: Path
    """Folder for report.json, report.md, loops.png and loops.svg."""
    runs: Path = Path("runs/small-text")
    """Folder for the runs; one of the same configuration that is there already is not repeated."""
    data: Path | None = None
    """Prepared text; left out: the recipe's, which is made if it is not there."""
    seeds: tuple[int, ...] = (0,)
    windows: int = 400
    """Held-out windows of the evaluation."""
    threads: int = 1
    quick: bool = False
    """A few steps of each run, to see that everything works; the numbers mean nothing."""


def main(args: Args) -> None:
    require_matplotlib()
    torch.set_num_threads(args.threads)
    base = load_recipe("small-text")
    if args.quick:
        base = dataclasses.replace(base, steps=4, batch_size=2)
    if args.data is None:
        prepare_corpus(Path(task(base).paths[0]), base.model.vocab_size)
    else:
        base = dataclasses.replace(base, data=dataclasses.replace(base.data, paths=(str(args.data),)))
    unread(base)
    batch, held = held_out(task(base), args.windows), TokenShards(task(base).paths[0], "validation")
    depths = np.stack([base.loops.depths(args.seeds[0], step, base.batch_size) for step in range(base.steps)])
    results: Result = {
        "command": f"python -m open_mythos.experiments.small_text --out {args.out}",
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "threads": args.threads,
        "recipe": base.to_dict(),
        "loops": LOOPS,
        "held_out_documents": held.n_documents,
        "bytes_per_window": task(base).bytes_per_token * base.data.seq_len,
        "arms": {name: {"title": TITLES[name]} | costs(cfg) for name, cfg in arms(base).items()},
        "depths": np.bincount(depths.flatten()).tolist(),
        "nulls": null_lines(task(base), batch),
        "sweep_rows": SWEEP_ROWS,
        "sweep": {name: _sweep(name, cfg, args) for name, cfg in arms(base).items()},
        "runs": {name: [] for name in arms(base)},
    }
    unnormed = dataclasses.replace(arms(base)["sampled"], model=dataclasses.replace(base.model, prelude_norm=False))
    for seed in args.seeds:
        for name, cfg in arms(base).items():
            run = seeded(cfg, seed, best(results["sweep"][name]))
            results["runs"][name].append(_trained(run, f"{name}-{seed}", args, batch, LOOPS))
        if "unnormed" not in results:
            run = seeded(unnormed, seed, best(results["sweep"]["sampled"]))
            results["unnormed"] = {"title": UNNORMED, "run": _trained(run, f"unnormed-{seed}", args, batch, LOOPS)}
        # After every seed: if the rest is cut off, there is a record of the seeds so far.
        write_record(results, args.out)
    print(f"Wrote report.json, report.md, loops.png and loops.svg to {args.out}.")


def _sweep(name: str, cfg: TrainConfig, args: Args) -> dict[str, Result]:
    """Runs of a quarter of the steps by factor of the rates, which goes on until the best is not at an end."""
    warmup = cfg.schedule.warmup_steps // 4
    cfg = dataclasses.replace(
        cfg, steps=cfg.steps // 4, schedule=dataclasses.replace(cfg.schedule, warmup_steps=warmup)
    )
    found: dict[str, Result] = {}
    waiting = list(RATES)
    while waiting:
        for rate in waiting:
            run = seeded(cfg, SWEEP_SEED, rate)
            found[str(rate)] = _trained(run, f"sweep-{name}-{rate}", args, unread(run), (int(cfg.loops.mean),))
        rates = [float(rate) for rate in found]
        further = {min(rates): min(rates) / 2, max(rates): max(rates) * 2}
        waiting = [further[best(found)]] if best(found) in further and not args.quick else []
    return found


def _trained(cfg: TrainConfig, name: str, args: Args, batch: Batch, loops: tuple[int, ...]) -> Result:
    """Train and evaluate one run, or read the result of an earlier call that did exactly this."""
    folder = args.runs / name
    file = folder / "result.json"
    text = [shard.sha256 for split in SPLITS for shard in TokenShards(task(cfg).paths[0], split).shards]
    asked = {"config": cfg.to_dict(), "text": text, "windows": len(batch.labels), "loops": loops}
    asked = json.loads(json.dumps(asked))  # as it is read back: tuples are lists there
    if file.exists():
        result = json.loads(file.read_text())
        if {key: result[key] for key in asked} == asked:
            return result
    # What is left is of another configuration, or was cut off.
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{name}:")
    wall, cpu = time.perf_counter(), time.process_time()
    trainer = Trainer(cfg, folder, device="cpu", threads=args.threads)
    trainer.run()
    result = asked | {
        "commit": _commit(),
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "train_ce": read_metrics(folder / "metrics.jsonl")[-1]["train/ce"],
        "bits": window_bits(trainer.model, batch, loops).round(2).tolist(),
    }
    write_text(file, json.dumps(result) + "\n")
    return result


def _commit() -> str:
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    main(tyro.cli(Args))
