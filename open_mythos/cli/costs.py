"""Commands that count what a model, or a run, costs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from open_mythos.cli.options import check_folder
from open_mythos.cli.train import RunOptions
from open_mythos.variants import VARIANTS

if TYPE_CHECKING:
    from open_mythos.train.config import TrainConfig


@dataclass
class Plan(RunOptions):
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

    def run(self, rest: list[str], recipe: str, cfg: "TrainConfig") -> None:
        """compute what a run would cost on given GPUs"""
        from open_mythos.costs import make_plan
        from open_mythos.costs.tables import print_plan

        made = make_plan(cfg, self.gpus, self.gpu, self.mfu, self.price_per_hour)
        if self.json:
            print(json.dumps(made.to_dict(), indent=2))
        else:
            print_plan(recipe or str(self.config), made)


@dataclass
class Info:
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

    def run(self, rest: list[str]) -> None:
        """count a model's parameters, FLOPs per token, cache and memory"""
        if Path(self.model).is_dir():
            check_folder(Path(self.model))
        from open_mythos.costs.tables import print_info

        if self.tokenizer is not None:
            if self.vocab_size is not None:
                raise ValueError(f"--vocab-size {self.vocab_size} and --tokenizer are both given; give one")
            from open_mythos.tokenization.tokenizer import open_tokenizer

            self.vocab_size = open_tokenizer(self.tokenizer).vocab_size
        print_info(self.model, self.gpu_gb, self.vocab_size, self.kv_gb)
