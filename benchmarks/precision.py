"""`python -m benchmarks.precision`: a training step in float32 beside dtype="auto", and what each of them learns."""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from open_mythos.recipes import load_recipe
from open_mythos.tasks import Text
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.evaluate import evaluate
from open_mythos.train.metrics import read_metrics
from open_mythos.train.optim import OptimConfig
from open_mythos.train.trainer import Trainer
from open_mythos.variants import VARIANTS

DTYPES = ("float32", "auto")
LEARN = {"tiny-text": 300, "small-text": 150}
"""Steps of the runs whose losses are compared."""


@dataclass
class Args:
    """Add steps and runs that the file lacks; several calls share the work."""

    out: Path = Path("docs/results/precision.json")
    cases: tuple[str, ...] = ()
    """Names of cases, such as "step 3m" or "learn tiny-text"; none: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    pairs: int = 8
    threads: int = 1


def runs() -> dict[str, TrainConfig]:
    """List the recipes, small-text on the embedded novel, and two variants on 4 x 256 tokens."""
    small = replace(load_recipe("small-text"), data=Text(kind="bpe", bpe_vocab_size=2048, seq_len=256))
    recipes = {"tiny-text": load_recipe("tiny-text"), "small-text": small}
    variants = {
        f"{name} {kind}": TrainConfig(VARIANTS[name](), Text(seq_len=256), 100, 4, optim=OptimConfig(kind))
        for name in ("3m", "30m")
        for kind in ("adamw", "muon")
    }
    return recipes | variants


def steps(cfg: TrainConfig, args: Args) -> dict[str, Any]:
    """Time steps of both dtypes in turns; the first pair only warms up."""
    seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    with tempfile.TemporaryDirectory() as folder:
        made = {name: _trainer(replace(cfg, dtype=name), Path(folder) / name, args) for name in DTYPES}
        for step in range(args.pairs + 1):
            for name, trainer in made.items():
                start = time.perf_counter()
                trainer.train_step(step, log=False)
                seconds[name].append(round(time.perf_counter() - start, 4))
        chosen = made["auto"].cfg
    ratio = statistics.median(a / b for a, b in list(zip(*seconds.values(), strict=True))[1:])
    return {"dtype": chosen.dtype, "muon": chosen.optim.muon_dtype, "ratio": round(ratio, 3), "seconds": seconds}


def losses(cfg: TrainConfig, args: Args) -> dict[str, float]:
    """Train, and return the validation loss at four loops by step, in the run's dtype and at the end in float32."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(cfg, Path(folder) / "run", args)
        trainer.run()
        lines = read_metrics(trainer.folder.metrics)
        end = evaluate(trainer.model, trainer.validation, 4).loss
    curve = {str(line["step"]): round(line["val/loss@4"], 5) for line in lines if "val/loss@4" in line}
    return curve | {"end, in float32": round(end, 5)}


def _trainer(cfg: TrainConfig, folder: Path, args: Args) -> Trainer:
    return Trainer(cfg, folder, device="cpu", threads=args.threads)


def main() -> None:
    args = tyro.cli(Args, description=Args.__doc__)
    found: dict[str, Any] = (
        json.loads(args.out.read_text()) if args.out.exists() else {"torch": str(torch.__version__), "results": {}}
    )
    asked = {f"step {name}": (steps, cfg) for name, cfg in runs().items()}
    for name, n in LEARN.items():
        cfg = replace(runs()[name], steps=n, eval=EvalConfig(every=50, rows=64, loops=(4,)))
        for seed in args.seeds:
            for dtype in ("float32", "bfloat16"):
                asked[f"learn {name}, {dtype}, seed {seed}"] = losses, replace(cfg, dtype=dtype, seed=seed)
    for name, (measure, cfg) in asked.items():
        if name not in found["results"] and (not args.cases or name.startswith(args.cases)):
            found["results"][name] = measure(cfg, args)
            print(name, found["results"][name], flush=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
