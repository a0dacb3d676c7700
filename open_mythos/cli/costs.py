"""Commands that count what a model, or a run, costs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from open_mythos.cli.options import check_folder, read
from open_mythos.cli.train import RunOptions, read_run
from open_mythos.variants import VARIANTS


@dataclass
class PlanArgs(RunOptions):
    """Compute the costs of a run on given GPUs: parameters, memory, FLOPs, communication, days. Nothing is built.

    Any field of the recipe can be given as in `mythos train`: --parallel.rows 2 --parallel.kind fsdp
    --checkpoint-loops --steps 1000.
    """

    gpus: int = 8
    gpu: Literal["h100", "h200", "a100-80", "a100-40", "l40s", "rtx-4090"] = "h100"
    mfu: float = 0.4
    """Share of the GPUs' peak that the products reach, recomputed ones included. Measure it; 0.4 is a good run."""
    price_per_hour: float | None = None
    """Price of one GPU-hour, in any currency."""
    json: bool = False
    """Print one JSON object instead of tables."""


def plan(rest: list[str]) -> None:
    """compute what a run would cost on given GPUs"""
    args, recipe, cfg = read_run(rest, PlanArgs, "mythos plan")
    from open_mythos.costs import make_plan
    from open_mythos.costs.tables import print_plan

    made = make_plan(cfg, args.gpus, args.gpu, args.mfu, args.price_per_hour)
    if args.json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        print_plan(recipe or str(args.config), made)


@dataclass
class InfoArgs:
    """Compute the costs of a model from its configuration alone: parameters, FLOPs and memory."""

    model: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(help=f"A variant ({', '.join(VARIANTS)}) or the folder of a model.")
    ]
    gpu_gb: float = 80.0
    """Memory of one GPU in GB, for the count of GPUs."""
    kv_gb: float | None = None
    """Memory for keys and values in GB, for the count of tokens and requests that fit. Left out: 32 whole contexts, at
    most 10 GB."""
    tokenizer: str | None = None
    """Count with the vocabulary of this tokenizer: "bytes", a folder, a tokenizer.json, or a model's name on the
    Hugging Face hub."""
    vocab_size: int | None = None
    """Size of the vocabulary to count with."""


def info(rest: list[str]) -> None:
    """count a model's parameters, FLOPs per token, cache and memory"""
    args = read(InfoArgs, "mythos info", rest)
    if Path(args.model).is_dir():
        check_folder(Path(args.model))
    from open_mythos.costs.tables import print_info

    if args.tokenizer is not None:
        if args.vocab_size is not None:
            raise ValueError(f"--vocab-size {args.vocab_size} and --tokenizer are both given; give one")
        from open_mythos.tokenization.tokenizer import open_tokenizer

        args.vocab_size = open_tokenizer(args.tokenizer).vocab_size
    print_info(args.model, args.gpu_gb, args.vocab_size, args.kv_gb)
