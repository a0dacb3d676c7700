"""Does a looped model answer questions with more hops than it was trained on, when it may loop more?

    python -m open_mythos.experiments.khop --out docs/results/khop

Protocol: the recipe `tiny-khop` for each seed; it sees distances up to 4 with few loops. Then exact accuracy of fresh
questions at every distance and number of loops. Null control, in the same grid: with fewer loops than hops the answer
is out of reach. Baseline: a plain transformer with a block of its own for every loop the looped one runs in training,
trained for as many steps on questions of the same distances. It is not told the hops on the way to the answer, as it
has no loops to learn them in. Two more arms undo one choice of the recipe each: the loss after every loop, and the
missing prelude.
"""

import dataclasses
import json
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from open_mythos.accounting import count_parameters
from open_mythos.evaluating import evaluating
from open_mythos.model import OpenMythos
from open_mythos.plots import heat_map
from open_mythos.recipes import load_recipe
from open_mythos.train.config import TrainConfig
from open_mythos.train.data import IGNORE, Batch
from open_mythos.train.loops import LoopsConfig
from open_mythos.train.losses import LossConfig
from open_mythos.train.rng import Purpose, stream
from open_mythos.train.tasks import KHop
from open_mythos.train.trainer import Trainer

DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16)
LOOPS = (1, 2, 4, 8, 12, 16, 24, 32)
Grid = list[list[float]]
"""Accuracy by distance (outer) and loops (inner)."""


def khop_task(cfg: TrainConfig) -> KHop:
    """The task of a k-hop recipe."""
    if not isinstance(cfg.data, KHop):
        raise TypeError(f"the recipe tiny-khop trains on {cfg.data.name!r}, not on k-hop questions; mend the recipe")
    return cfg.data


def accuracy_grid(model: OpenMythos, task: KHop, rows: int, seed: int) -> Grid:
    """Share of right answers for every distance and number of loops, on `rows` fresh forests a distance."""
    grid = []
    for distance in DISTANCES:
        asked = dataclasses.replace(task, min_distance=distance, max_distance=distance)
        batch = asked.batch(stream(seed, distance, Purpose.VALIDATION), rows)
        grid.append(accuracy_by_loops(model, batch, LOOPS))
    return grid


def accuracy_by_loops(model: OpenMythos, batch: Batch, loops: tuple[int, ...]) -> list[float]:
    """Share of labelled tokens predicted right at each number of loops.

    One pass of the deepest call serves all: its state after loop n is the last state of a call with n loops.
    """
    ids, labels = batch.input_ids.to(model.device), batch.labels.to(model.device)
    asked = labels != IGNORE
    with evaluating(model):
        if model.recurrent is None:
            right = [model(ids).argmax(-1) == labels] * len(loops)
        else:
            hidden = model(ids, n_loops=max(loops), trace=True).hidden
            view = model.make_view((ids.shape[0], ids.shape[1]))
            right = [model.readout(hidden[n - 1], view).argmax(-1) == labels for n in loops]
    return [hit[asked].sum().item() / asked.sum().item() for hit in right]


def guessing(task: KHop, rows: int = 10_000) -> float:
    """What naming one of the prompt's roots at random scores: knowing what a root is, and following no chain."""
    table = task.batch(stream(0, 0, Purpose.VALIDATION), rows).input_ids[:, :-1]
    n_roots = (table == torch.arange(task.n_symbols)).sum(1)
    return (1 / n_roots).mean().item()


def worst_reachable(grid: Grid) -> float:
    """The lowest accuracy among cells with at least as many loops as hops: what the model has to get right."""
    return min(a for d, row in zip(DISTANCES, grid, strict=True) for n, a in zip(LOOPS, row, strict=True) if n >= d)


def best_unreachable(grid: Grid) -> float:
    """The highest accuracy among cells with fewer loops than hops: the control."""
    return max(a for d, row in zip(DISTANCES, grid, strict=True) for n, a in zip(LOOPS, row, strict=True) if n < d)


def plain_twin(cfg: TrainConfig) -> TrainConfig:
    """The same run for a plain transformer with a block of its own for every loop of training, asked for the root."""
    model = dataclasses.replace(cfg.model, prelude_layers=cfg.loops.max_loops or 1, recurrent_layers=0, halting="none")
    data = dataclasses.replace(khop_task(cfg), target="root")
    return dataclasses.replace(cfg, model=model, data=data, loops=LoopsConfig(), losses=LossConfig())


def arms(base: TrainConfig) -> dict[str, TrainConfig]:
    """The recipe, the baseline, and the recipe with one of its choices undone."""
    root = dataclasses.replace(base, data=dataclasses.replace(khop_task(base), target="root"), losses=LossConfig())
    prelude = dataclasses.replace(base, model=dataclasses.replace(base.model, prelude_layers=1))
    return {"looped": base, "plain": plain_twin(base), "root": root, "prelude": prelude}


@dataclass
class Args:
    """Train the k-hop recipe over several seeds, with a plain transformer as baseline, and record what each answers."""

    out: Path
    """Folder for results.json, heatmap.png and report.md."""
    runs: Path = Path("runs/khop")
    """Folder for the runs themselves; a run of the same configuration that is there already is not repeated."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rows: int = 1000
    """Fresh questions per distance in the evaluation."""
    threads: int = 1


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    base = load_recipe("tiny-khop")
    results: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
    }
    for name, recipe in arms(base).items():
        results[name] = [_one_seed(recipe, seed, args.runs / f"{name}-{seed}", args) for seed in args.seeds]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    mean = _over_seeds(results["looped"])
    heat_map(
        mean,
        DISTANCES,
        LOOPS,
        args.out / "heatmap.png",
        f"Accuracy, mean of {len(args.seeds)} seeds; trained on 1 to 4 hops",
    )
    (args.out / "report.md").write_text(_report(results, base, args))
    print(f"Wrote {args.out}/results.json, heatmap.png and report.md.")


def _one_seed(recipe: TrainConfig, seed: int, folder: Path, args: Args) -> dict[str, Any]:
    """Train and evaluate one seed, or read the result of an earlier call that did exactly this."""
    cfg = dataclasses.replace(recipe, seed=seed)
    file = folder / "result.json"
    if file.exists():
        result = json.loads(file.read_text())
        if result["rows"] == args.rows and (folder / "config.yaml").read_text() == cfg.to_yaml():
            return result
    # What is left is of another recipe, or was cut off.
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    trainer = Trainer(cfg, folder, device="cpu", threads=args.threads)
    trainer.run()
    seconds = time.perf_counter() - started
    # Questions drawn from a seed of their own: none is one of training's.
    grid = accuracy_grid(trainer.model, khop_task(cfg), args.rows, seed + 1_000_000)
    result = {
        "seed": seed,
        "commit": _commit(),
        "rows": args.rows,
        "train_s": seconds,
        "accuracy": grid,
        "worst_reachable": worst_reachable(grid),
        "best_unreachable": best_unreachable(grid),
    }
    file.write_text(json.dumps(result) + "\n")
    return result


def _over_seeds(runs: list[dict[str, Any]], worst: bool = False) -> Grid:
    grids = torch.tensor([run["accuracy"] for run in runs], dtype=torch.float64)
    return (grids.amin(0) if worst else grids.mean(0)).tolist()


def _report(results: dict[str, Any], cfg: TrainConfig, args: Args) -> str:
    looped, plain = results["looped"], results["plain"]
    task = khop_task(cfg)
    by_distance = [
        (d, mean[0], worst[0])
        for d, mean, worst in zip(DISTANCES, _over_seeds(plain), _over_seeds(plain, worst=True), strict=True)
    ]
    commits = ", ".join(sorted({run["commit"] for arm in arms(cfg) for run in results[arm]}))
    blocks = [count_parameters(c.model) for c in (cfg, plain_twin(cfg))]
    larger = (blocks[1].total - blocks[1].embedding) / (blocks[0].total - blocks[0].embedding)
    lines = [
        "# k-hop pointer chasing: more loops answer longer questions",
        "",
        "Question: does a looped model answer questions with more hops than it was trained on, when it may loop more?",
        "",
        f"Command: `python -m open_mythos.experiments.khop --out {args.out}`, commit {commits}, {results['machine']}, "
        f"{args.threads} thread.",
        f"Recipe `tiny-khop`: {cfg.steps} steps of {cfg.batch_size} rows, forests of {task.n_symbols} symbols,",
        f"questions of 1 to {task.max_distance} hops, at most {cfg.loops.max_loops} loops. The loss is taken after",
        "every loop: after loop l the model is to name the symbol l hops on, or the root once it is reached. So the",
        "hops on the way are supervised, up to the distances of training; the evaluation asks for the root.",
        f"Seeds {', '.join(map(str, args.seeds))}; each cell {args.rows} fresh questions.",
        "",
        "![accuracy by hops and loops](heatmap.png)",
        "",
        "| seed | lowest accuracy with loops >= hops | highest with loops < hops (control) | training s |",
        "|---|---|---|---|",
        *[
            f"| {r['seed']} | {r['worst_reachable']:.3f} | {r['best_unreachable']:.3f} | {r['train_s']:.0f} |"
            for r in looped
        ],
        "",
        f"Naming one of the prompt's roots at random scores {guessing(task):.3f}. The control is below that because",
        "the model names the symbol it has reached, which is no root yet.",
        "",
        "## Mean over seeds",
        "",
        *_markdown(_over_seeds(looped)),
        "",
        "## Worst seed of each cell",
        "",
        *_markdown(_over_seeds(looped, worst=True)),
        "",
        "## Baseline: a plain transformer of as many blocks",
        "",
        f"{cfg.loops.max_loops} blocks, {larger:.1f} times the looped model's parameters without the embedding, and as",
        "many steps, on the roots of questions of the same distances. It has no loss on the hops on the way, as it has",
        "no loops to take it after: a baseline for the answer, not for the supervision. Accuracy by hops:",
        "",
        "| hops | mean over seeds | worst seed |",
        "|---|---|---|",
        *[f"| {d} | {mean:.3f} | {worst:.3f} |" for d, mean, worst in by_distance],
        "",
        "## What the recipe's choices do",
        "",
        "Each row undoes one. Lowest accuracy among cells with loops >= hops, and highest with loops < hops:",
        "",
        "| | lowest, by seed | highest control, by seed |",
        "|---|---|---|",
        *[
            f"| {what} | {_by_seed(results[arm], 'worst_reachable')} | {_by_seed(results[arm], 'best_unreachable')} |"
            for arm, what in (
                ("looped", "the recipe"),
                ("root", "the root after the last loop as the only label: no hop on the way is supervised"),
                ("prelude", "one prelude layer instead of none"),
            )
        ],
        "",
    ]
    return "\n".join(lines)


def _by_seed(runs: list[dict[str, Any]], key: str) -> str:
    return ", ".join(f"{run[key]:.3f}" for run in runs)


def _markdown(grid: Grid) -> list[str]:
    rows = [
        f"| {d} | " + " | ".join(f"{value:.3f}" for value in row) + " |" for d, row in zip(DISTANCES, grid, strict=True)
    ]
    return ["| hops \\ loops | " + " | ".join(map(str, LOOPS)) + " |", "|---" * (len(LOOPS) + 1) + "|", *rows]


def _commit() -> str:
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    main(tyro.cli(Args))
