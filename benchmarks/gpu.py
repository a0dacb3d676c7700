"""`python -m benchmarks.gpu`: everything that a short lease of one GPU can show, the most important first.

Every section runs in a process of its own, so that a crash of the driver or a section that takes too long costs only
itself; each figure is in the file as soon as it is measured. `--device cpu` rehearses all of it at tiny sizes.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from benchmarks.case import commit
from benchmarks.gpu_page import render
from benchmarks.job import Job
from benchmarks.machine import describe
from benchmarks.models import as_published
from benchmarks.page import write_page
from benchmarks.peers import OPEN_MYTHOS, install
from benchmarks.sides import open_mythos_0_5, ours
from benchmarks.stats import Spread, ratios
from benchmarks.tasks import clocked
from open_mythos import LoopPlan, MythosConfig, OpenMythos, SamplingParams, convert_open_mythos_0_5
from open_mythos.checks import check_choice
from open_mythos.costs.flops import step_flops
from open_mythos.costs.gpus import CARDS
from open_mythos.device import setup_device
from open_mythos.engine.config import EngineConfig
from open_mythos.engine.llm import LLM
from open_mythos.nn.layer_costs import Execution
from open_mythos.tasks import Text
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.variants import VARIANTS, sized

Put = Callable[..., None]
Work = Callable[[], Any]


@dataclass(frozen=True)
class Args:
    """Measure this package on a GPU within a few minutes."""

    minutes: float = 8
    """Time for all sections; those that do not fit any more are listed as skipped."""
    out: Path = Path("benchmarks/.gpu")
    """Folder of results.json and results.md."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a rehearsal at tiny sizes, whose figures mean nothing."""
    sections: tuple[str, ...] = ()
    """Those to run; none: all."""
    child: bool = False
    """Run one section in this process; the command starts itself with it."""


@dataclass(frozen=True)
class Sizes:
    models: tuple[str, ...]
    """Variants to decode; the last one is trained too."""
    loops: int
    batches: tuple[int, ...]
    prompt: int
    answer: int
    """New tokens of a request to the engine."""
    train: tuple[int, int]
    """Rows and tokens of a training step."""
    repeats: int


SIZES = {
    "cuda": Sizes(("30m", "120m", "1b"), 8, (1, 32), 512, 64, (8, 1024), 20),
    "cpu": Sizes(("200k", "3m"), 2, (1, 2), 8, 4, (2, 16), 2),
}
SHARES = {"environment": 0.05, "correctness": 0.2, "speed": 0.3, "train": 0.15, "engine": 0.2, "peer": 0.2}
"""The most of all the time that a section may take. What one leaves over is there for those behind it."""
COMMAND = (sys.executable, "-m", "benchmarks.gpu")
LEAST_S = 3.0
"""A section with less time than this is skipped: its imports take as long."""

_BASE = sized(512, 256, 8, 4, 256, 4, 1, 16, 1, 4, 128, lora_rank=8, halting="none")
_LATENTS = {"kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64}
_MLA = replace(_BASE, attn_type="mla", **_LATENTS)
SHAPES = {
    "gqa": replace(_BASE, n_experts=0),
    "mla": replace(_MLA, n_experts=0),
    "experts": _BASE,
    "act": replace(_MLA, halting="act"),
    "decode": _MLA,
    "static decode": _BASE,
    "gradients": _MLA,
}
FLOAT32_BOUND, BF16_SLACK, GRAPH_BOUND = 1e-4, 5e-3, 5e-2
"""Relative RMS error against float64; in bf16 it may be twice the CPU's own, and the slack."""


def environment(device: str, put: Put) -> None:
    """Say what this is: the card, its driver, its memory and clocks."""
    put("machine", describe())
    put("package", {"commit": commit(), "torch": torch.__version__, "cuda": torch.version.cuda})
    if device == "cuda":
        properties, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
        put(
            "gpu",
            {"name": properties.name, "memory": total, "free": free, "processors": properties.multi_processor_count},
        )
        asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        said = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"], capture_output=True, text=True)
        put("nvidia-smi", said.stdout.splitlines())


@torch.no_grad()
def drawn(cfg: MythosConfig, device: str, dtype: torch.dtype) -> OpenMythos:
    """Return a model with weights large enough that an error shows, the same on every device."""
    torch.manual_seed(0)
    model = OpenMythos(cfg)
    for x in model.parameters():
        if x.ndim > 1:
            x.normal_(std=x.shape[-1] ** -0.5)
    return model.to(device, dtype).eval()


def outputs(shape: str, device: str, dtype: torch.dtype) -> Tensor:
    """Run one shape of the correctness section -> all of its numbers in float64, on the CPU."""
    model = drawn(SHAPES[shape], device, dtype)
    ids = torch.randint(512, (3, 70), generator=torch.Generator().manual_seed(1)).to(device)
    if shape == "gradients":
        model.train()(ids, plan=LoopPlan((4, 2, 3), 2)).logits.float().logsumexp(-1).mean().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
    else:
        cache = model.make_cache(3, 70, static=shape.startswith("static")) if "decode" in shape else None
        parts = (ids[:, :66], ids[:, 66:69], ids[:, 69:]) if cache else (ids,)
        with torch.inference_mode():
            found = [model(part, cache=cache) for part in parts]
    return torch.cat([x.detach().flatten().double().cpu() for x in found])


def correctness(device: str, put: Put) -> None:
    """Compare with float64 on the CPU; beside it stands the CPU's own error in the same dtype."""
    wrong = []
    for shape in SHAPES:
        exact = outputs(shape, "cpu", torch.float64)
        for dtype in (torch.float32, torch.bfloat16):
            error, own = (float((outputs(shape, d, dtype) - exact).norm() / exact.norm()) for d in (device, "cpu"))
            bound = FLOAT32_BOUND if dtype is torch.float32 else 2 * own + BF16_SLACK
            name = f"{shape} {str(dtype).removeprefix('torch.')}"
            put(name, {"error": error, "cpu": own, "bound": bound})
            wrong += [] if error <= bound else [name]
    if wrong:
        raise ArithmeticError(f"above their bounds: {', '.join(wrong)}")


def timed(device: str, repeats: int, *works: Work) -> list[list[float]]:
    """Call each of the works in turn -> seconds of each, by the device's clock if it has one."""
    for work in works:
        work()
        work()
    turns = [[clocked(work, device) for work in works] for _ in range(repeats)]
    return [[clocks.get("device", clocks["wall"]) for clocks in column] for column in zip(*turns, strict=True)]


def rate(tokens: int, seconds: list[float]) -> dict[str, Any]:
    return {"tokens/s": tokens / Spread.of(seconds).median, "seconds": asdict(Spread.of(seconds))}


def captured(step: Work, device: str) -> Work:
    """Record what a step starts on the GPU -> a replay of it; on a CPU the step itself."""
    if device == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.inference_mode()
def speed(device: str, put: Put) -> None:
    """Time the prompt and one more token in bf16, by ordinary calls and as a CUDA graph over a static cache."""
    for name in SIZES[device].models:
        with torch.device(device):
            model = OpenMythos(VARIANTS[name]()).to(torch.bfloat16).eval()
        for rows in SIZES[device].batches:
            decode(model, f"{name} x {rows}", rows, device, put)


def decode(model: OpenMythos, name: str, rows: int, device: str, put: Put) -> None:
    """Time one batch of a model, and compare the graph's logits with those of ordinary calls."""
    sizes = SIZES[device]
    n, n_loops = sizes.prompt, sizes.loops
    ids = torch.randint(model.cfg.vocab_size, (rows, n), device=device)
    cache, static = (model.make_cache(rows, n + 8, n_loops, static=static) for static in (False, True))

    def call(ids: Tensor, cache: Any, start: int) -> Tensor:
        cache.rewind(start)
        return model(ids, n_loops, cache=cache, exit="fixed", last_only=True)

    [seconds] = timed(device, sizes.repeats // 2, lambda: call(ids, cache, 0))
    put(f"prefill {name}", rate(rows * n, seconds))
    token = call(ids, static, 0).argmax(-1)
    expected = call(token, cache, n).double()
    logits = torch.zeros_like(expected, dtype=model.dtype)

    def step() -> None:
        static.rewind(n)
        view = model.make_view((rows, 1), cache=static)
        logits.copy_(model.run(token, view, n_loops, None, static, last_only=True)[0])

    replay = captured(step, device)
    logits.zero_()
    both = timed(device, sizes.repeats, lambda: call(token, cache, n), replay)
    for kind, seconds in zip(("eager", "graph"), both, strict=True):
        put(f"decode {name} {kind}", rate(rows, seconds))
    error = float((logits.double() - expected).norm() / expected.norm())
    put(f"graph {name}", {"error": error, "holds": error < GRAPH_BOUND, "eager / graph": asdict(ratios(*both))})


def flops_and_peak(cfg: MythosConfig, sizes: Sizes) -> tuple[float, float | None]:
    """Count a training step's FLOPs; look up the GPU's bf16 peak, None for an unknown one."""
    rows, T = sizes.train
    run = TrainConfig(cfg, Text(seq_len=T), 1, rows, loops=LoopsConfig("fixed", sizes.loops))
    flops = step_flops(run, Execution("cuda", True, 2, 4), rows * sizes.loops, rows * sizes.loops).model
    gpu = torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else ""
    return flops, next((card.bf16_tflops * 1e12 for key, card in CARDS.items() if key.removesuffix("-80") in gpu), None)


def stepper(side: Any, rows: int, tokens: int, n_loops: int, device: str) -> Work:
    """Return a training step in bf16 autocast with AdamW: forward, backward and update."""
    optimizer = torch.optim.AdamW(side.model.train().parameters(), lr=1e-5, fused=True)
    job = Job("train", rows=rows, tokens=tokens, n_loops=n_loops)
    ids = torch.randint(side.vocab_size, (rows, tokens), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = side.loss(ids, ids, job)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def train(device: str, put: Put) -> None:
    """Time a training step of the largest model, and the share of the GPU's peak that it reaches (MFU)."""
    sizes = SIZES[device]
    (rows, T), model = sizes.train, as_published(VARIANTS[sizes.models[-1]]())
    side = ours.make(Job("train", model, rows, T, sizes.loops, device=device))
    [seconds] = timed(device, sizes.repeats // 2, stepper(side, rows, T, sizes.loops, device))
    flops, peak = flops_and_peak(side.cfg, sizes)
    reached = flops / Spread.of(seconds).median
    more = {"TFLOP/s": reached / 1e12, "mfu": reached / peak if peak else None}
    if device == "cuda":
        more["peak bytes"] = torch.cuda.max_memory_allocated()
    put(f"train {sizes.models[-1]} {rows} x {T}", rate(rows * T, seconds) | more)


def engine(device: str, put: Put) -> None:
    """Answer as many requests as the engine has rows, all at once."""
    sizes = SIZES[device]
    for name in sizes.models[-2:]:
        with torch.device(device):
            model = OpenMythos(VARIANTS[name]()).to(torch.bfloat16).eval()
        for rows in (8, 32):
            # Without the reuse of prefixes, or every repetition would find its prompts computed.
            kv_tokens = rows * (sizes.prompt + sizes.answer + 64)
            llm = LLM(model, config=EngineConfig(rows, kv_tokens=kv_tokens, prefix_reuse=False))
            prompts = torch.randint(model.cfg.vocab_size, (rows, sizes.prompt)).tolist()
            params = SamplingParams(max_tokens=sizes.answer, ignore_eos=True, n_loops=sizes.loops, exit="fixed")
            [seconds] = timed(device, 2, lambda: llm.generate(prompts, params, progress=False))  # noqa: B023
            put(f"engine {name} x {rows}", rate(rows * sizes.answer, seconds))


def peer(device: str, put: Put) -> None:
    """Time open-mythos 0.5.0 and this package in turns on the same weights, both in bf16 autocast."""
    sizes = SIZES[device]
    install(OPEN_MYTHOS)
    (rows, T), model = sizes.train, as_published(VARIANTS[sizes.models[-1]]())
    job = Job("train", model, rows, T, sizes.loops, device=device)
    sides = open_mythos_0_5.make(job), ours.make(job)
    sides[1].model.load_state_dict(convert_open_mythos_0_5(sides[0].model.state_dict(), sides[1].cfg))
    ids = torch.randint(model["vocab_size"], (2, sizes.prompt + 1), device=device)

    def decoder(side: Any) -> Work:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            cache = side.new_cache(2, sizes.prompt + 1, sizes.loops)
            side.feed(ids[:, :-1], cache, 0, sizes.loops)

        @torch.inference_mode()
        def token() -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                if isinstance(cache, dict):  # of 0.5.0, which replaces its tensors by longer ones
                    same = {layer: dict(stored) for layer, stored in cache.items()}
                else:
                    same = cache
                    same.rewind(sizes.prompt)
                return side.feed(ids[:, -1:], same, sizes.prompt, sizes.loops)

        return token

    for what, works, tokens in (
        ("decode", [decoder(side) for side in sides], 2),
        ("train", [stepper(side, rows, T, sizes.loops, device) for side in sides], rows * T),
    ):
        theirs, own = timed(device, sizes.repeats // 2, *works)
        put(what, {"0.5.0": rate(tokens, theirs), "ours": rate(tokens, own), "ratio": asdict(ratios(theirs, own))})


SECTIONS: dict[str, Callable[[str, Put], None]] = {
    f.__name__: f for f in (environment, correctness, speed, train, engine, peer)
}


def write(out: Path, data: dict[str, Any]) -> None:
    """Write results.json, complete or not at all."""
    partial = out / "results.partial"
    partial.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(partial, out / "results.json")


def run_section(name: str, args: Args) -> None:
    """Run one section in this process; each of its figures is written at once."""
    data = json.loads((args.out / "results.json").read_text())
    section = data["sections"][name]

    def put(figure: str, value: Any) -> None:
        section["figures"][figure] = value
        write(args.out, data)

    try:
        SECTIONS[name](args.device, put)
        section["state"] = "complete"
    except Exception as e:
        section |= {"state": "failed", "error": f"{type(e).__name__}: {e}", "trace": traceback.format_exc()}
    write(args.out, data)


def main(args: Args) -> int:
    """Run the sections one after the other -> 0 if all are complete."""
    if args.child:
        run_section(args.sections[0], args)
        return 0
    setup_device(args.device)
    for name in args.sections:
        check_choice("sections", name, tuple(SECTIONS))
    args.out.mkdir(parents=True, exist_ok=True)
    start, total = time.monotonic(), args.minutes * 60
    new = {
        name: {"state": "skipped", "what": SECTIONS[name].__doc__, "figures": {}} for name in args.sections or SECTIONS
    }
    write(args.out, {"device": args.device, "seconds": 0.0, "sections": new})
    for name in new:
        limit = min(SHARES[name] * total, total - (time.monotonic() - start))
        data = json.loads((args.out / "results.json").read_text())
        if limit >= LEAST_S:
            data["sections"][name]["state"] = "crashed"  # unless the section says otherwise
            write(args.out, data)
            data = _child(name, args, limit)
        data["seconds"] = time.monotonic() - start
        write(args.out, data)
        write_page(args.out / "results.md", render(data), "On a GPU")
        print(f"{data['seconds']:.0f} s: {name} {data['sections'][name]['state']}", flush=True)
    return int(any(section["state"] != "complete" for section in data["sections"].values()))


def _child(name: str, args: Args, limit: float) -> dict[str, Any]:
    """Run a section in a process of its own, which ends with its time -> all results."""
    options = ["--sections", name, "--child", "--out", str(args.out), "--device", args.device]
    state = {}
    try:
        done = subprocess.run([*COMMAND, *options], timeout=limit)
        state = {"error": f"exit status {done.returncode}"} if done.returncode else {}
    except subprocess.TimeoutExpired:
        state = {"state": "out of time", "error": f"stopped after {limit:.0f} s"}
    data = json.loads((args.out / "results.json").read_text())
    data["sections"][name] |= state
    return data


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
