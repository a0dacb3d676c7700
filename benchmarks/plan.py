"""`python -m benchmarks.plan`: what `mythos plan` predicts beside what training steps take, on small models.

FLOPs: the products that torch's counter sees in a step, those in this package's own autograd functions among them, and
those of attention's kernel for CPUs, which the counter does not know and is told here. Grouped products it would not
see either; in float32 on a CPU there are none.

Memory: everything torch allocates less what it frees, at its highest, from the profiler's allocation events. That
includes what operators take inside; the resident set would add what the C library's allocator keeps.

Memory of a rank: what the C library (glibc) has given out, looked at after each operator. The profiler does not see
what other threads free, and those of gloo free tensors that they were the last to hold, now this one and now that.
"""

import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.progress import track
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from open_mythos.accounting import count_parameters
from open_mythos.costs.depth_distribution import with_gradient
from open_mythos.costs.flops import step_flops
from open_mythos.costs.memory import micro_batches, peak, rows_at_once
from open_mythos.costs.saved_activations import execution_of
from open_mythos.tasks import Text
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.distributed import ParallelConfig
from open_mythos.train.optim import OptimConfig
from open_mythos.train.trainer import Trainer
from open_mythos.variants import VARIANTS


def _forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


KERNELS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""Attention's kernel for CPUs, which torch's counter of FLOPs does not know."""

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
        """By how much the plan is above what was measured, relative to that."""
        return self.predicted / self.measured - 1


MLA = {"attn_type": "mla", "kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32}
PUBLISHED = {"injection": "lti", "halting": "act", "lora_rank": 8, "loop_embedding": True, "prelude_norm": False}


def cases() -> dict[str, TrainConfig]:
    """Experts, both attentions, rows of drawn depth and a window of back-propagation, and what else changes memory."""

    def of(variant: str, rows: int, changed: dict[str, Any] | None = None, **fields: Any) -> TrainConfig:
        model = replace(VARIANTS[variant](), max_seq_len=512, **(changed or {}))
        fields = {"loops": LoopsConfig("poisson", 4, backprop_depth=3), **fields}
        return TrainConfig(model, Text(seq_len=512), STEPS, rows, **fields)

    return {
        "200k": of("200k", 8),
        "3m": of("3m", 4, optim=OptimConfig("muon")),
        "3m, mla": of("3m", 4, {**MLA, "v_head_dim": 40}),
        "3m, ACT and depth LoRA": of("3m", 4, PUBLISHED, loops=LoopsConfig("fixed", 4)),
        "3m, dense, no window": of("3m", 4, {"n_experts": 0}, loops=LoopsConfig("poisson", 4)),
        "3m, bf16": of("3m", 4, dtype="bfloat16"),
        "30m": of("30m", 4),
        "30m, loops recomputed": of("30m", 4, checkpoint_loops=True),
        "30m, Muon, one row": of("30m", 1, optim=OptimConfig("muon"), loops=LoopsConfig("fixed", 1)),
    }


def kept_loops(cfg: TrainConfig) -> np.ndarray:
    """Of each row of the last step."""
    return with_gradient(cfg.loops, cfg.loops.depths(cfg.seed, STEPS - 1, cfg.batch_size))


def measure_flops(cfg: TrainConfig) -> Reading:
    """Of the second step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(cfg, Path(folder), device="cpu", progress=False)
        trainer.train_step(0)
        with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
            trainer.train_step(1)
    depths = cfg.loops.depths(cfg.seed, 1, cfg.batch_size)
    kept = with_gradient(cfg.loops, depths)
    planned = step_flops(cfg, execution_of(cfg, "cpu"), int(depths.sum()), int(kept.sum()))
    return Reading(planned.total, counter.get_total_flops())


def measure_memory(cfg: TrainConfig) -> Reading:
    """Of one process, building the model and two steps."""
    gc.collect()  # what an earlier run left in cycles would be freed meanwhile, and count as less than nothing
    with tempfile.TemporaryDirectory() as folder, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        trainer = Trainer(cfg, Path(folder), device="cpu", progress=False)
        for step in range(STEPS):
            trainer.train_step(step)
    live = highest = 0
    assert p.profiler is not None and p.profiler.kineto_results is not None
    for event in p.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return Reading(peak(cfg, execution_of(cfg, "cpu"), grad_loops=int(kept_loops(cfg).sum())).total, highest)


class _MallocInfo(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]


_LIBC = ctypes.CDLL(None)


def given_out() -> int:
    """Bytes that malloc has given out: by mappings of their own, and out of its heaps."""
    _LIBC.mallinfo2.restype = _MallocInfo
    info = _LIBC.mallinfo2()
    return info.field4 + info.field7


class Meter(TorchDispatchMode):
    """The most bytes given out after any operator."""

    highest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.highest = max(self.highest, given_out())
        return out


def measure_rank(cfg: TrainConfig, rank: int, world: int) -> Reading:
    """Of one rank: building the model and two steps, the second time that it does so, for modules and buffers that are
    made once are there by then."""
    taken = 0
    for _ in range(2):
        gc.collect()
        before = given_out()
        with tempfile.TemporaryDirectory() as folder, Meter() as meter:
            trainer = Trainer(cfg, Path(folder), device="cpu", progress=False)
            for step in range(STEPS):
                trainer.train_step(step)
        taken = meter.highest - before
        del trainer
    # A rank's rows stand side by side in the batch, and a micro-batch's in the rank.
    each = kept_loops(cfg).reshape(world, micro_batches(cfg, world), rows_at_once(cfg, world)).sum(-1)
    return Reading(peak(cfg, execution_of(cfg, "cpu"), world, int(each[rank].max())).total, taken)


HEAD = """# The plan against measurement

What `mythos plan` computes from a configuration beside what two training steps take. Written by
`python -m benchmarks.plan` on torch {torch}, CPU; rows of 512 tokens, data the novel in bytes.

- Parameters are exact for every recipe: tests/costs/test_plan.py builds each on the meta device.
- FLOPs: all products that `torch.utils.flop_counter` sees in the second step. It sees those inside this package's own
  autograd functions; it is told of attention's kernel for CPUs, which it does not know, and which multiplies the whole
  square. It knows no grouped products: on a CPU there are none, experts are products one by one. A GPU's path is not
  counted here.
- Memory: what torch allocates less what it frees, at its highest over two steps and the building of the model, from the
  profiler's allocation events: every tensor, and what operators take inside. The resident set would add what the C
  library's allocator keeps.
- Formulas take the depths that the step really drew. No factor is fitted; what is off are groups of rows padded for the
  experts, the validation rows, rotary tables and small temporaries.
- Memory of a rank: what glibc has given out, looked at after each operator, the second time that the process builds
  the model and takes two steps; oneDNN keeps no products of earlier shapes. The profiler does not see what gloo's
  threads free, so that its figures would be too high, by another amount each time. What an operator takes inside is not
  in these lines.
- Not measured: GPUs.

| case | parameters | FLOPs planned | measured | off | peak planned | measured | off | highest in |
|---|---|---|---|---|---|---|---|---|"""
RANKS_HEAD = """
Two processes on gloo, each measuring itself:

| case | rank | peak planned | measured | off |
|---|---|---|---|---|"""


def rows(chosen: dict[str, TrainConfig]) -> Iterator[str]:
    """Lines of the table, measured one by one."""
    for name, cfg in track(chosen.items(), description="measuring"):
        flops, memory = measure_flops(cfg), measure_memory(cfg)
        moment = peak(cfg, execution_of(cfg, "cpu"), grad_loops=int(kept_loops(cfg).sum())).moment
        yield (
            f"| {name} | {count_parameters(cfg.model).total:,} | {flops.predicted / 1e9:.2f} G | "
            f"{flops.measured / 1e9:.2f} G | {flops.off:+.2%} | {_bytes(memory)} | {moment} |"
        )


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
            print(f"{RANK_LINE}{name}, {how} | {rank} of {world} | {_bytes(reading)} |", flush=True)
        return
    lines = [HEAD.format(torch=torch.__version__), *rows(chosen), RANKS_HEAD]
    for how in (["--kind", "ddp"], ["--kind", "fsdp"], ["--kind", "fsdp", "--experts", "2"]):
        lines += ranks(["--cases", "30m", *how])
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


RANK_LINE = "| rank: "


def ranks(options: list[str]) -> list[str]:
    """Lines of two processes that measure themselves."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "benchmarks.plan", *options]
    environment = os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith(RANK_LINE)]
    return sorted(line.replace(RANK_LINE, "| ") for line in found)


def _bytes(reading: Reading) -> str:
    return f"{reading.predicted / 1e6:.1f} MB | {reading.measured / 1e6:.1f} MB | {reading.off:+.1%}"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, prog="python -m benchmarks.plan", description=__doc__)))
