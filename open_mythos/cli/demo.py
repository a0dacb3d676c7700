"""The demo: it trains two small models from nothing and shows what more loops do for each."""

import dataclasses
import json
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from open_mythos.cli.plugins import program
from open_mythos.device import Device, Dtype, setup_device
from open_mythos.experiments.khop import accuracy_grid, enough, guessing, khop_task
from open_mythos.model import OpenMythos
from open_mythos.recipes import CPU_SECONDS, load_recipe
from open_mythos.reports.figures import Curve, draw_curves, heat_map, require_matplotlib
from open_mythos.reports.terminal import accuracy_table, duration, loop_style, loop_summary
from open_mythos.tokenization.detokenizer import TextStream
from open_mythos.tokenization.tokenizer import Tokenizer
from open_mythos.train.config import TrainConfig
from open_mythos.train.evaluate import evaluate
from open_mythos.train.trainer import Trainer

RESULTS_FILE = "demo.json"
DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16)
LOOPS = (1, 2, 4, 8, 12, 16, 24, 32)
TEXT_LOOPS = (1, 2, 4, 8, 16)
PROMPT = "Anne was "
EVALUATION_ROWS = 500
TEXT_STEPS = 150
"""Steps of the text model, half of the recipe's: the whole demo then takes well under five minutes."""
WRITTEN = {
    "khop.png": "accuracy by distance and loops",
    "text.png": "bits per byte by loops",
    RESULTS_FILE: "all numbers",
    "khop/, text/": "both runs: config.yaml, metrics.jsonl, and the model in final/",
}


def run_demo(out: Path, device: Device, dtype: Dtype, threads: int, seed: int) -> None:
    """Train both models into `out`, print what they do and write the figures.

    Raises:
        ValueError: `out` is a folder that no demo wrote, or the device does not exist.
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    setup_device(device, threads)
    if out.exists() and any(out.iterdir()) and not (out / RESULTS_FILE).exists():
        raise ValueError(f"--out {out} holds files that no demo wrote; name another folder")
    for name in ("khop", "text"):  # of an earlier demo
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS_FILE).write_text("{}\n")
    console = Console(highlight=False)
    started = time.perf_counter()
    seconds = CPU_SECONDS["tiny-khop"] + CPU_SECONDS["tiny-text"] * TEXT_STEPS / load_recipe("tiny-text").steps
    console.print(f"Two small models, trained in about {duration(seconds)} on one core of a server CPU with AVX-512.")
    machine = {"device": device, "threads": threads}
    khop = dataclasses.replace(load_recipe("tiny-khop"), seed=seed, dtype=dtype)
    text = dataclasses.replace(load_recipe("tiny-text"), seed=seed, dtype=dtype, steps=TEXT_STEPS)
    results: dict[str, Any] = {}
    for name, run, cfg in (("khop", _khop, khop), ("text", _text, text)):
        results[name] = run(console, cfg, out, machine)
        (out / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"\n[bold]Done in {time.perf_counter() - started:.0f} s.[/] Written to {out}/:")
    for name, what in WRITTEN.items():
        console.print(f"  {name:14s}{what}")
    console.print("\nTry next:")
    folder = shlex.quote(str(out))
    for command in (
        f"generate {folder}/text/final 'She had been ' --n-loops 8 --exit kl --show-loops",
        f"info {folder}/khop/final",
        "train tiny-addition --out runs/addition",
    ):
        console.print(f"  {program()} {command}", style="bold", soft_wrap=True, markup=False)


def _khop(console: Console, cfg: TrainConfig, out: Path, machine: dict[str, Any]) -> dict[str, Any]:
    task = khop_task(cfg)
    console.rule("[bold]1. Pointer chasing")
    console.print(task.example(), soft_wrap=True)
    console.print(f"Training on questions of 1 to {task.max_distance} hops, with at most {cfg.loops.max_loops} loops.")
    trainer = Trainer(cfg, out / "khop", **machine)
    trainer.run()
    console.print(f"Asking {EVALUATION_ROWS} questions of each number of hops, at up to {max(LOOPS)} loops.")
    grid = accuracy_grid(trainer.model, task, EVALUATION_ROWS, cfg.seed + 1_000_000, DISTANCES, LOOPS)
    title = f"Accuracy by hops and loops; trained on 1 to {task.max_distance} hops"
    console.print(accuracy_table(title, DISTANCES, LOOPS, grid))
    heat_map(grid, DISTANCES, LOOPS, out / "khop.png", title)
    reachable = enough(DISTANCES, LOOPS)
    worst, control = float(np.array(grid)[reachable].min()), float(np.array(grid)[~reachable].max())
    console.print(
        f"With at least as many loops as hops: {worst:.3f} or better everywhere, up to 16 hops and 32 loops. "
        f"With fewer loops than hops, the control: {control:.3f} at most, as the model names a symbol on the way. "
        f"Naming any root of the prompt would score {guessing(task):.2f}.\n"
    )
    figures = {"accuracy": grid, "worst_reachable": worst, "best_unreachable": control}
    return {"distances": DISTANCES, "loops": LOOPS, **figures}


def _text(console: Console, cfg: TrainConfig, out: Path, machine: dict[str, Any]) -> dict[str, Any]:
    console.rule("[bold]2. Text")
    console.print("Training from nothing on the bytes of Jane Austen's Persuasion, each row at random loops.")
    trainer = Trainer(cfg, out / "text", **machine)
    trainer.run()
    model, bytes_per_token = trainer.model, cfg.data.bytes_per_token
    if bytes_per_token is None:
        raise TypeError(f"the recipe tiny-text trains on {cfg.data.name!r}, which is no text")
    scores = [evaluate(model, trainer.validation, n).bits_per_byte(bytes_per_token) for n in TEXT_LOOPS]
    console.print(
        "Bits per byte of held-out text: "
        + "   ".join(f"{n} loop{'s' * (n > 1)} [bold]{bpb:.3f}[/]" for n, bpb in zip(TEXT_LOOPS, scores, strict=True))
    )
    curve = Curve(TEXT_LOOPS, scores, "")
    labels = ("loops", "bits per byte, held out")
    draw_curves({"A small text model by loops": [curve]}, out / "text.png", labels, ticks=TEXT_LOOPS, log="x")
    return {"loops": TEXT_LOOPS, "bits_per_byte": scores, **_sample(console, model, trainer.tokenizer)}


def _sample(console: Console, model: OpenMythos, tokenizer: Tokenizer) -> dict[str, Any]:
    prompt, most = tokenizer.encode(PROMPT), 8
    ids, loops = model.generate(
        prompt, 200, n_loops=most, temperature=0.8, exit="kl", exit_threshold=0.01, seed=0, return_loops=True
    )
    stream = TextStream(tokenizer)
    pieces = [(stream.push(token), n) for token, n in zip(ids[len(prompt) :], loops, strict=True)]
    console.print("A sample; each letter stops looping when one more loop would hardly change its prediction:")
    console.print(PROMPT, end="")
    console.print(Text.assemble(*((piece, loop_style(n, most)) for piece, n in pieces)))
    console.print(loop_summary(console, loops, most))
    return {"sample": tokenizer.decode(ids), "sample_loops": loops}
