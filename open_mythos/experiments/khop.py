"""Does a looped model answer questions with more hops than it was trained on, when it may loop more?

Also what `mythos demo` measures its small model with.
"""

import dataclasses
from collections.abc import Sequence

import torch

from open_mythos.accounting import count_parameters
from open_mythos.evaluating import evaluating
from open_mythos.experiments.khop_report import Grid, report
from open_mythos.experiments.lab import Experiment, Lab, Result, seeded
from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.train.config import TrainConfig
from open_mythos.train.data import IGNORE, Batch
from open_mythos.train.loops import LoopsConfig
from open_mythos.train.losses import LossConfig
from open_mythos.train.rng import Purpose, stream
from open_mythos.train.tasks import KHop

DISTANCES = (1, 2, 4, 8, 16, 32, 64)
LOOPS = (1, 2, 4, 8, 16, 32, 64, 96)
INJECTIONS = ("diagonal", "lti", "concat", "add")
N_SYMBOLS, LONG_CHAIN = 72, 65
AT_ONCE = 125
"""Rows of one evaluating call, whose states after all loops are held: 0.22 GB at 72 symbols and 96 loops."""
STEPS, QUICK_STEPS, RAMP_STEPS = 420, 60, 240
"""Muon finds the one hop in 80 steps of 512 rows (and in 430 of 128 rows it had not). The first quarter of the ramp
runs one loop, which costs little; the quick form is cut off after it."""
BATCH, MAX_LOOPS = 512, 4
ROPE_THETA = 10.0
"""Faster turns than the recipe's 100 tell 72 places apart sooner: after 130 steps the loss on one hop is 0.06, not
0.29 (one seed)."""


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
    """Share of labelled tokens predicted right at each number of loops.

    One pass of the deepest call serves all: its state after loop n is the last state of a call with n loops.
    """
    hits, asked = torch.zeros(len(loops), dtype=torch.int64), 0
    for ids, labels in zip(batch.input_ids.split(AT_ONCE), batch.labels.split(AT_ONCE), strict=True):
        ids, labels = ids.to(model.device), labels.to(model.device)
        with evaluating(model):
            if model.recurrent is None:
                named = [model(ids).argmax(-1)] * len(loops)
            else:
                hidden = model(ids, n_loops=max(loops), trace=True).hidden
                view = model.make_view((ids.shape[0], ids.shape[1]))
                named = [model.readout(hidden[n - 1], view).argmax(-1) for n in loops]
        # No symbol is IGNORE, so what is not asked is never hit.
        hits += torch.stack([(name == labels).sum() for name in named]).cpu()
        asked += (labels != IGNORE).sum().item()
    return (hits / asked).tolist()


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
    """`tiny-khop` on tables that hold a chain of 65 symbols; the quick form is cut off before it learns."""
    base = load_recipe("tiny-khop")
    task = dataclasses.replace(khop_task(base), n_symbols=N_SYMBOLS, long_chain=LONG_CHAIN)
    sizes = {"vocab_size": task.vocab_size, "max_seq_len": task.seq_len, "max_loop_iters": MAX_LOOPS}
    model = dataclasses.replace(base.model, rope_theta=ROPE_THETA, **sizes)
    mean = (1 + MAX_LOOPS) / 2
    loops = LoopsConfig("uniform", mean, per="batch", max_loops=MAX_LOOPS, ramp_steps=RAMP_STEPS)
    steps = QUICK_STEPS if quick else STEPS
    return dataclasses.replace(base, model=model, data=task, loops=loops, steps=steps, batch_size=BATCH)


def run(lab: Lab) -> Result:
    configs = arms(recipe(lab.quick))
    task, rows = khop_task(configs[INJECTIONS[0]]), 50 if lab.quick else 250
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
                return {"accuracy": accuracy_grid(model, task, rows, seed + 1_000_000, DISTANCES, loops)}

            asked = {"rows": rows, "distances": DISTANCES, "loops": loops}
            results[name]["runs"].append(lab.measured(f"{name}-{seed}", seeded(cfg, seed), measure, **asked))
    return {
        "distances": DISTANCES,
        "loops": LOOPS,
        "trained": (task.min_distance, task.max_distance),
        "guessing": guessing(task),
        "injections": INJECTIONS,
        "arms": results,
    }


EXPERIMENT = Experiment(
    title="k-hop pointer chasing beyond the distances of training",
    question="Does a looped model answer questions with more hops than it was trained on, when it may loop more?",
    protocol=f"""
A prompt is a table of {N_SYMBOLS} pointers, a random forest with one chain of {LONG_CHAIN} symbols, and a question; the
answer is the root of the question's chain. The recipe `tiny-khop` at this size: one block of width 64, no prelude,
rotary base {ROPE_THETA:g}, {STEPS} steps of {BATCH} rows on questions of 1 to 4 hops with 1 to {MAX_LOOPS} loops.
The loss is taken after every loop: after loop l the model is to name the symbol l hops on, or the root once it is
reached. So the hops on the way are supervised, up to the distances of training. The evaluation asks for the root, on
250 fresh forests for each distance and seed, with up to {LOOPS[-1]} loops.

- **Injections** `diagonal` (the recipe's), `lti`, `concat` and `add`: nothing else differs.
- **Plain twins**, transformers of {MAX_LOOPS} blocks, one for each loop of training, with as many steps and rows on
  questions of the same distances: one of the same width, so of equal depth; and one of the width that gives the looped
  model's number of parameters, so of equal depth and equal parameters. Their label is the root alone, as they have no
  loops to take others after.
- **`root`** is the recipe with that label too, the looped model to hold them against.
  Without labels of every hop a question is no farther than its row's loops.
- **`prelude`** is the recipe with one prelude layer.
- **Null control**, in the same grid: with fewer loops than hops the answer is out of reach.
""".strip(),
    cost=("5 min", "about 2 h 25 min, reckoned from the quick form"),
    run=run,
    report=report,
)
