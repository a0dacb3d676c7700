"""`python -m benchmarks.plan`: what `mythos plan` predicts beside measured training steps of small models."""

import contextlib
import ctypes
import gc
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.progress import track
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.machine import describe
from benchmarks.page import table, write_page
from open_mythos.accounting import count_parameters
from open_mythos.costs.depth_distribution import with_gradient
from open_mythos.costs.flops import step_flops
from open_mythos.costs.memory import Memory, micro_batches, peak, rows_at_once
from open_mythos.costs.saved_activations import execution_of
from open_mythos.tasks import Text
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.distributed import ParallelConfig
from open_mythos.train.optim import OptimConfig
from open_mythos.train.trainer import Trainer
from open_mythos.variants import VARIANTS

# Torch's counter of FLOPs does not know attention's kernels for CPUs, whose products are those of the kernels for GPUs.
_KERNEL = "_scaled_dot_product_flash_attention"
for _part in ("", "_backward"):
    _known, _missing = (getattr(torch.ops.aten, f"{_KERNEL}{which}{_part}") for which in ("", "_for_cpu"))
    flop_registry[_missing] = flop_registry[_known]
STEPS = 2
"""From the second step on the moments of the optimizer and the last step's gradients are there."""


@dataclass
class Args:
    """Measure FLOPs and memory of small runs on the CPU beside their plans. Under torchrun: memory of every rank."""

    out: Path = Path("docs/results/plan.md")
    """The report; ranks of torchrun print their lines instead."""
    cases: tuple[str, ...] = ()
    """Names of cases; none: all."""
    kind: Literal["ddp", "fsdp"] = "ddp"
    """How the ranks of torchrun share the model."""
    experts: int = 1
    """Ranks of torchrun over which the experts are spread."""


@dataclass(frozen=True)
class Reading:
    """One figure, planned and measured."""

    predicted: float
    measured: float

    @property
    def off(self) -> float:
        """The excess of the plan over the measurement, as a share of the measurement."""
        return self.predicted / self.measured - 1


MLA = {"attn_type": "mla", "kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32}
PUBLISHED = {"injection": "lti", "halting": "act", "lora_rank": 8, "loop_embedding": True, "prelude_norm": False}


def _config(variant: str, rows: int, changed: dict[str, Any] | None = None, **fields: Any) -> TrainConfig:
    model = replace(VARIANTS[variant](), max_seq_len=512, **(changed or {}))
    fields = {"loops": LoopsConfig("poisson", 4, backprop_depth=3), **fields}
    return TrainConfig(model, Text(seq_len=512), STEPS, rows, **fields)


def cases() -> dict[str, TrainConfig]:
    """List experts, both attentions, drawn depths, a window of back-propagation, and what else changes memory."""
    return {
        "200k": _config("200k", 8),
        "3m": _config("3m", 4, optim=OptimConfig("muon")),
        "3m, mla": _config("3m", 4, {**MLA, "v_head_dim": 40}),
        "3m, ACT and depth LoRA": _config("3m", 4, PUBLISHED, loops=LoopsConfig("fixed", 4)),
        "3m, dense, no window": _config("3m", 4, {"n_experts": 0}, loops=LoopsConfig("poisson", 4)),
        "3m, bf16": _config("3m", 4, dtype="bfloat16"),
        "30m": _config("30m", 4),
        "30m, loops recomputed": _config("30m", 4, checkpoint_loops=True),
        "30m, Muon, one row": _config("30m", 1, optim=OptimConfig("muon"), loops=LoopsConfig("fixed", 1)),
    }


@contextlib.contextmanager
def training(cfg: TrainConfig) -> Generator[Trainer]:
    """Make a trainer on the CPU, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Trainer(cfg, Path(folder), device="cpu", progress=False)


def planned_memory(cfg: TrainConfig, world: int = 1, rank: int = 0) -> Memory:
    """Plan the peak of a rank in the last step, at the depths that it draws."""
    loops = with_gradient(cfg.loops, cfg.loops.depths(cfg.seed, STEPS - 1, cfg.batch_size))
    # A rank's rows stand side by side in the batch, and a micro-batch's in the rank.
    each = loops.reshape(world, micro_batches(cfg, world), rows_at_once(cfg, world)).sum(-1)
    return peak(cfg, execution_of(cfg, "cpu"), world, int(each[rank].max()))


def measure_flops(cfg: TrainConfig) -> Reading:
    """Count the products of the second step, at the depths that it draws."""
    with training(cfg) as trainer:
        trainer.train_step(0)
        with FlopCounterMode(display=False) as counter:
            trainer.train_step(1)
    depths = cfg.loops.depths(cfg.seed, 1, cfg.batch_size)
    kept = with_gradient(cfg.loops, depths)
    planned = step_flops(cfg, execution_of(cfg, "cpu"), int(depths.sum()), int(kept.sum()))
    return Reading(planned.total, counter.get_total_flops())


def measure_memory(cfg: TrainConfig) -> Reading:
    """Measure the highest sum of torch's allocations less what it frees, over building the model and two steps."""
    gc.collect()  # garbage of an earlier run, freed meanwhile, would count as less than nothing
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p, training(cfg) as trainer:
        for step in range(STEPS):
            trainer.train_step(step)
    assert p.profiler is not None and p.profiler.kineto_results is not None
    changes = [e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    return Reading(planned_memory(cfg).total, max(itertools.accumulate(changes)))


class _MallocInfo(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]


def given_out() -> int:
    """Return the bytes that malloc (glibc) has given out: as mappings of their own, and out of its heaps."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    return info.field4 + info.field7


class Meter(TorchDispatchMode):
    """The most bytes given out after any operator."""

    highest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.highest = max(self.highest, given_out())
        return out


def measure_rank(cfg: TrainConfig, rank: int, world: int) -> Reading:
    """Measure one rank that builds the model and takes two steps, the second time: by then, modules and buffers that
    are made once exist. The profiler misses what gloo's threads free, so malloc is asked."""
    taken = 0
    for _ in range(2):
        gc.collect()
        before = given_out()
        with Meter() as meter, training(cfg) as trainer:
            for step in range(STEPS):
                trainer.train_step(step)
        taken = meter.highest - before
        del trainer
    return Reading(planned_memory(cfg, world, rank).total, taken)


def rows(chosen: dict[str, TrainConfig]) -> Iterator[Sequence[str]]:
    """Measure the cases one by one -> the cells of their rows."""
    for name, cfg in track(chosen.items(), description="measuring"):
        flops, memory = measure_flops(cfg), measure_memory(cfg)
        sizes = [f"{value / 1e9:.2f} G" for value in (flops.predicted, flops.measured)]
        counted = [f"{count_parameters(cfg.model).total:,}", *sizes, f"{flops.off:+.2%}"]
        yield name, *counted, *_bytes(memory), planned_memory(cfg).moment


def main(args: Args) -> None:
    """Measure and write, or print under torchrun."""
    found = cases()
    if unknown := [name for name in args.cases if name not in found]:
        raise SystemExit(f"--cases {unknown[0]!r} is no case; use some of {', '.join(map(repr, found))}")
    chosen = {name: found[name] for name in args.cases or found}
    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1:
        for name, cfg in chosen.items():
            reading = measure_rank(replace(cfg, parallel=ParallelConfig(args.kind, args.experts)), rank, world)
            how = args.kind if args.experts == 1 else f"{args.kind}, experts over {args.experts}"
            print(RANK_LINE, f"{name}, {how}", f"{rank} of {world}", *_bytes(reading), sep="|", flush=True)
        return
    sizes = ("peak planned", "measured", "off")
    columns = ("case", "parameters", "FLOPs planned", "measured", "off", *sizes, "highest in")
    lines = [f"{describe()['cpu']}, torch {torch.__version__}.", "", *table(columns, rows(chosen)), ""]
    found_ranks: list[list[str]] = []
    for how in (["--kind", "ddp"], ["--kind", "fsdp"], ["--kind", "fsdp", "--experts", "2"]):
        found_ranks += ranks(["--cases", "30m", *how])
    lines += ["Two processes on gloo, each measuring itself:", "", *table(("case", "rank", *sizes), found_ranks)]
    write_page(args.out, "\n".join(lines), "The plan against measurement")


RANK_LINE = "rank:"


def ranks(options: list[str]) -> list[list[str]]:
    """Let two processes measure themselves -> the cells of their rows."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "benchmarks.plan", *options]
    environment = os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return sorted(line.split("|")[1:] for line in done.stdout.splitlines() if line.startswith(RANK_LINE))


def _bytes(reading: Reading) -> tuple[str, str, str]:
    return f"{reading.predicted / 1e6:.1f} MB", f"{reading.measured / 1e6:.1f} MB", f"{reading.off:+.1%}"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, prog="python -m benchmarks.plan", description=__doc__)))
