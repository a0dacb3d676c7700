"""The command that tells what a run would cost."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from open_mythos.cli.train import read_run


@dataclass
class PlanArgs:
    """What a run costs on given GPUs: parameters, memory, FLOPs, communication, days. Nothing is built.

    Any field of the recipe can be given as in `mythos train`: --parallel.rows 2 --parallel.kind fsdp
    --checkpoint-loops --steps 1000.
    """

    config: Path | None = None
    """A run's config.yaml, instead of a recipe."""
    gpus: int = 8
    gpu: Literal["h100", "h200", "a100-80", "a100-40", "l40s", "rtx-4090"] = "h100"
    mfu: float = 0.4
    """Share of the GPUs' peak that the products reach, recomputed ones included. Measure it; 0.4 is a good run."""
    price_per_hour: float | None = None
    """Price of one GPU-hour, in any currency."""
    json: bool = False
    """Print one JSON object instead of tables."""


def plan(rest: list[str]) -> None:
    """tell what a run would cost on given GPUs"""
    args, recipe, cfg = read_run(rest, PlanArgs, "mythos plan")
    from open_mythos.costs import make_plan
    from open_mythos.costs.tables import print_plan

    made = make_plan(cfg, args.gpus, args.gpu, args.mfu, args.price_per_hour)
    if args.json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        print_plan(recipe or str(args.config), made)
