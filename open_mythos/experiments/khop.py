"""Does a looped model follow more pointers than it was trained on, when it may loop more?

Also what `mythos demo` measures its small model with.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from open_mythos.accounting import count_parameters
from open_mythos.analysis.per_loop import named_by_loop, right_by_loop
from open_mythos.experiments.khop_report import Grid, report
from open_mythos.experiments.study import Experiment, Lab, Result, seeded
from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.tasks import KHop
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE, Batch
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.losses import LossConfig

DISTANCES = tuple(range(1, 17))
LOOPS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 96)
INJECTIONS = ("diagonal", "lti", "concat", "add")
ROWS = 500
"""Questions of each distance, and questions on cycles, by seed; the quick form asks a tenth of them."""
QUICK_STEPS = 100


def khop_task(cfg: TrainConfig) -> KHop:
    """The task of a k-hop run."""
    if not isinstance(cfg.data, KHop):
        raise TypeError(f"the recipe tiny-khop trains on {cfg.data.name!r}, not on k-hop questions; mend the recipe")
    return cfg.data


def accuracy_grid(
    model: OpenMythos, task: KHop, rows: int, seed: int, distances: Sequence[int], loops: Sequence[int]
) -> Grid:
    """Share of right answers for every distance and number of loops, on `rows` fresh forests a distance."""
    grid = []
    for distance in distances:
        asked = dataclasses.replace(task, min_distance=distance, max_distance=distance)
        batch = asked.batch(stream(seed, distance, Purpose.VALIDATION), rows)
        grid.append(accuracy_by_loops(model, batch, loops))
    return grid


def accuracy_by_loops(model: OpenMythos, batch: Batch, loops: Sequence[int]) -> list[float]:
    """Share of labelled tokens predicted right at each number of loops; a plain model's are all the same."""
    # No symbol is IGNORE, so what is not asked is never right.
    hits = right_by_loop(model, batch, max(loops)).sum((1, 2)).tolist()
    asked = int((batch.labels != IGNORE).sum())
    return [hits[min(n, len(hits)) - 1] / asked for n in loops]


def cycles(n_symbols: int, rows: int, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
    """Tables whose pointers form one cycle through all symbols, with a question each.

    Returns:
        (B, N + 1) the prompts, as `KHop` writes them, and (N, B) the symbol 0, 1, 2, ... hops from the question.
    """
    order = rng.permuted(np.broadcast_to(np.arange(n_symbols), (rows, n_symbols)), axis=1)
    table = np.empty_like(order)
    np.put_along_axis(table, order, np.roll(order, -1, axis=1), axis=1)
    return torch.from_numpy(np.concatenate([table, order[:, :1]], axis=1)), order.T


def cycle_accuracy(model: OpenMythos, n_symbols: int, rows: int, seed: int, n_loops: int) -> Result:
    """By loops l from 1: how often the l-th successor is named, and the one before it, and the one after it."""
    ids, successor = cycles(n_symbols, rows, stream(seed, 0, Purpose.VALIDATION))
    named = named_by_loop(model, ids, n_loops)[:, :, -1].numpy()
    hops = np.arange(1, n_loops + 1)
    shifts = {"right": 0, "one_before": -1, "one_after": 1}
    return {
        name: (named == successor[(hops + shift) % n_symbols]).mean(1).round(4).tolist()
        for name, shift in shifts.items()
    }


def guessing(task: KHop, rows: int = 10_000) -> float:
    """What naming one of the prompt's roots at random scores: knowing what a root is, and following no chain."""
    table = task.batch(stream(0, 0, Purpose.VALIDATION), rows).input_ids[:, :-1]
    n_roots = (table == torch.arange(task.n_symbols)).sum(1)
    return (1 / n_roots).mean().item()


def narrowed(cfg: TrainConfig, parameters: int) -> TrainConfig:
    """The run at the width that comes nearest to so many parameters."""
    step = 2 * cfg.model.n_heads
    widths = [dataclasses.replace(cfg.model, dim=dim) for dim in range(step, cfg.model.dim + 1, step)]
    model = min(widths, key=lambda model: abs(count_parameters(model).total - parameters))
    return dataclasses.replace(cfg, model=model)


def plain_twin(cfg: TrainConfig) -> TrainConfig:
    """The same run for a plain transformer with a block of its own for every loop of training, asked for the root."""
    task = khop_task(cfg)
    model = dataclasses.replace(cfg.model, prelude_layers=cfg.loops.max_loops or 1, recurrent_layers=0, halting="none")
    # Without loops the depth only says how far the root may be.
    loops = LoopsConfig("fixed", task.max_distance)
    data = dataclasses.replace(task, target="root")
    return dataclasses.replace(cfg, model=model, data=data, loops=loops, losses=LossConfig())


def arms(base: TrainConfig) -> dict[str, TrainConfig]:
    """Four injections; two plain twins; and the recipe with one of its choices undone, twice."""
    injections = {
        name: dataclasses.replace(base, model=dataclasses.replace(base.model, injection=name)) for name in INJECTIONS
    }
    deep = plain_twin(base)
    task = dataclasses.replace(khop_task(base), target="root")
    return injections | {
        "plain-depth": deep,
        "plain-parameters": narrowed(deep, count_parameters(base.model).total),
        "root": dataclasses.replace(base, data=task, losses=LossConfig()),
        "prelude": dataclasses.replace(base, model=dataclasses.replace(base.model, prelude_layers=1)),
    }


def recipe(quick: bool) -> TrainConfig:
    """`tiny-khop`; the quick form stops before it has learned much."""
    base = load_recipe("tiny-khop")
    if not quick:
        return base
    loops = dataclasses.replace(base.loops, ramp_steps=QUICK_STEPS // 2)
    return dataclasses.replace(base, steps=QUICK_STEPS, loops=loops)


def run(lab: Lab) -> Result:
    configs = arms(recipe(lab.quick))
    task, rows = khop_task(configs[INJECTIONS[0]]), ROWS // 10 if lab.quick else ROWS
    results: dict[str, Result] = {
        name: {
            "parameters": count_parameters(cfg.model).total,
            "dim": cfg.model.dim,
            "blocks": cfg.model.prelude_layers + cfg.model.recurrent_layers,
            "labels": "each hop, after each loop" if cfg.losses.per_loop else "the root, at the end",
            "runs": [],
        }
        for name, cfg in configs.items()
    }
    for seed in lab.seeds:
        for name, cfg in configs.items():
            loops = LOOPS if cfg.model.recurrent_layers else LOOPS[:1]

            def measure(model: OpenMythos, seed: int = seed, loops: tuple[int, ...] = loops) -> Result:
                # Questions drawn from a seed of their own: none is one of training's.
                fresh = seed + 1_000_000
                forest = accuracy_grid(model, task, rows, fresh, DISTANCES, loops)
                if model.recurrent is None:
                    return {"forest": forest}
                return {"forest": forest, "cycle": cycle_accuracy(model, task.n_symbols, rows, fresh, max(loops))}

            asked = {"rows": rows, "distances": DISTANCES, "loops": loops}
            results[name]["runs"].append(lab.measured(f"{name}-{seed}", seeded(cfg, seed), measure, **asked))
    return {
        "distances": DISTANCES,
        "loops": LOOPS,
        "trained": (task.min_distance, task.max_distance),
        "trained_loops": configs[INJECTIONS[0]].loops.max_loops,
        "n_symbols": task.n_symbols,
        "guessing": guessing(task),
        "injections": INJECTIONS,
        "arms": results,
    }


EXPERIMENT = Experiment(
    title="k-hop pointer chasing beyond the distances of training",
    question="Does a looped model follow more pointers than it was trained on, when it may loop more?",
    protocol=f"""
A prompt is a table of 24 pointers and a question. In training, with the recipe `tiny-khop` (600 steps of 256 rows, one
block of width 64, at most 6 loops), the pointers form a random forest, and questions are 1 to 4 hops from their root.
The loss is taken after every loop: after loop l the model is to name the symbol l hops on, or the root once it is
reached. So the hops on the way are supervised, up to the distances of training. The choices of the recipe were made
on seed 0, before this protocol; seed 0 is among the seeds here. What is asked afterwards, on tables drawn anew for each
seed, {ROWS} for each distance and {ROWS} cycles:

- **Forest**, as in training, but with questions up to 16 hops from the root and with up to {LOOPS[-1]} loops: is the
  root named with enough loops, and still with more? The long chain has 17 of the 24 symbols. A longer one would leave
  few other roots to take for the answer, and one of 24 none.
- **Cycle**: the pointers form one cycle through all 24 symbols, and after l loops the model is to name the l-th
  successor, for every l up to {LOOPS[-1]}. Training showed no table without roots and no more than 6 loops. A single
  cycle, and not a random permutation, so that chance is 1/24 at every l, and so that the successors l - 1, l and l + 1
  always differ: a hop missed or made twice is never made good. After 24, 48, 72 and 96 hops the answer is the question
  itself, which a model may name without following anything; those loops are told apart from the others.

Arms:

- **Injections** `diagonal` (the recipe's), `lti`, `concat` and `add`: nothing else differs.
- **Plain twins**, transformers of 6 blocks, one for each loop of training, with as many steps and rows on questions of
  the same distances: one of the same width, so of equal depth; and one of the width that gives the looped model's
  number of parameters, so of equal depth and equal parameters. Their label is the root alone, as they have no loops to
  take others after. They are asked about forests only: a plain model has no loops to count hops with, so nothing tells
  it how far to go on a cycle.
- **`root`** is the recipe with that label too, the looped model to hold them against.
  Without labels of every hop a question is no farther than its row's loops.
- **`prelude`** is the recipe with one prelude layer.

Null controls, in the same numbers: in a forest, fewer loops than hops; on the cycle, the l-th successor asked for after
l - 1 and after l + 1 loops.
""".strip(),
    cost=("2 min", "65 min"),
    run=run,
    report=report,
    n_parts=lambda lab: len(arms(recipe(lab.quick))) * len(lab.seeds),
)
