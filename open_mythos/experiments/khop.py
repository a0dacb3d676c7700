"""Does a looped model follow more pointers than it was trained on, when it may loop more?

`mythos demo` measures its small model with the functions of this file, too.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from open_mythos.accounting import count_parameters
from open_mythos.analysis.per_loop import by_loop, is_right, named_by_loop
from open_mythos.experiments.study import Result, Results, Run, Study
from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.reports.figures import Curve, draw_curves, heat_map
from open_mythos.reports.stats import Estimate
from open_mythos.tasks import KHop
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE, Batch
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.losses import LossConfig

DISTANCES = tuple(range(1, 17))
LOOPS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 96)
STEPS = tuple(range(1, LOOPS[-1] + 1))
ROWS = 500
"""Questions of each distance, and questions on cycles, by seed; the quick form asks a tenth of them."""
INJECTIONS = ("diagonal", "lti", "concat", "add")
OWN = INJECTIONS[0]
"""The recipe's injection."""
PLAIN = {"plain-depth": "plain, equal depth", "plain-parameters": "plain, equal parameters"}
HOPS = (8, 16, 32, 64)
"""Distances on the cycle that the tables show."""
FAR = 16
"""Distance in the forest at which arms are compared; training asks for 4 hops at most."""
RIGHT = 0.9
"""Accuracy from which a distance counts as reached."""
HARM = 0.02
"""A fall of accuracy beyond this is called harm; one changed answer alone makes the largest fall positive."""


def khop_task(cfg: TrainConfig) -> KHop:
    """Return the task of a k-hop run."""
    if not isinstance(cfg.data, KHop):
        raise TypeError(f"the recipe tiny-khop trains on {cfg.data.name!r}, not on k-hop questions; fix the recipe")
    return cfg.data


def accuracy_grid(
    model: OpenMythos, task: KHop, rows: int, seed: int, distances: Sequence[int], loops: Sequence[int]
) -> list[list[float]]:
    """Return the accuracy for every distance and number of loops, on `rows` fresh forests for each distance."""
    asked = {d: dataclasses.replace(task, min_distance=d, max_distance=d) for d in distances}
    batches = (asked[d].batch(stream(seed, d, Purpose.VALIDATION), rows) for d in distances)
    return [accuracy_by_loops(model, batch, loops) for batch in batches]


def accuracy_by_loops(model: OpenMythos, batch: Batch, loops: Sequence[int]) -> list[float]:
    """Return the share of labelled tokens predicted right at each number of loops; equal ones for a plain model."""
    # No symbol equals IGNORE, so a token without a label never counts as right.
    share = by_loop(model, batch, loops, is_right).sum((1, 2)).double() / (batch.labels != IGNORE).sum()
    return share.expand(len(loops)).tolist()


def cycles(n_symbols: int, rows: int, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
    """Draw tables whose pointers form one cycle through all symbols, with a question each.

    Returns:
        (B, N + 1) the prompts, as `KHop` writes them, and (N, B) the symbol 0, 1, 2, ... hops from the question.
    """
    order = rng.permuted(np.broadcast_to(np.arange(n_symbols), (rows, n_symbols)), axis=1)
    table = np.empty_like(order)
    np.put_along_axis(table, order, np.roll(order, -1, axis=1), axis=1)
    return torch.from_numpy(np.concatenate([table, order[:, :1]], axis=1)), order.T


def cycle_accuracy(model: OpenMythos, n_symbols: int, rows: int, seed: int, n_loops: int) -> Result:
    """Return by loops l from 1 how often the l-th successor is named, the one before it, and the one after it."""
    ids, successor = cycles(n_symbols, rows, stream(seed, 0, Purpose.VALIDATION))
    named = named_by_loop(model, ids, n_loops)[:, :, -1].numpy()
    hops = np.arange(1, n_loops + 1)
    asked = {"right": hops, "one_before": hops - 1, "one_after": hops + 1}
    return {name: (named == successor[n % n_symbols]).mean(1).round(4).tolist() for name, n in asked.items()}


def guessing(task: KHop, rows: int = 10_000) -> float:
    """Return the accuracy of naming one of the prompt's roots at random, without following any chain."""
    table = task.batch(stream(0, 0, Purpose.VALIDATION), rows).input_ids[:, :-1]
    return (1 / (table == torch.arange(task.n_symbols)).sum(1)).mean().item()


def measure(run: Run) -> Result:
    """Return the accuracy in forests by distance and loops, and on cycles by loops."""
    # Questions drawn from a seed of their own: none is one of training's.
    fresh, task, rows = run.seed + 1_000_000, khop_task(run.config), run.settings["rows"]
    found: Result = {"forest": accuracy_grid(run.model, task, rows, fresh, DISTANCES, run.settings["loops"])}
    if run.model.recurrent is not None:
        found["cycle"] = cycle_accuracy(run.model, task.n_symbols, rows, fresh, max(LOOPS))
    return found


def narrowed(cfg: TrainConfig, parameters: int) -> TrainConfig:
    """Return the run at the width whose number of parameters comes nearest."""
    step = 2 * cfg.model.n_heads
    widths = [dataclasses.replace(cfg.model, dim=dim) for dim in range(step, cfg.model.dim + 1, step)]
    model = min(widths, key=lambda model: abs(count_parameters(model).total - parameters))
    return dataclasses.replace(cfg, model=model)


def plain_baseline(cfg: TrainConfig) -> TrainConfig:
    """Return the run for a plain transformer with a block for every loop of training, asked for the root only."""
    task = khop_task(cfg)
    model = dataclasses.replace(cfg.model, prelude_layers=cfg.loops.max_loops or 1, recurrent_layers=0, halting="none")
    # Without loops the depth only says how far the root may be.
    loops = LoopsConfig("fixed", task.max_distance)
    data = dataclasses.replace(task, target="root")
    return dataclasses.replace(cfg, model=model, data=data, loops=loops, losses=LossConfig())


def arms(quick: bool) -> dict[str, TrainConfig]:
    """Four injections; two plain baselines; and the recipe with one of its choices undone, twice."""
    base = load_recipe("tiny-khop")
    if quick:
        base = dataclasses.replace(base, steps=100, loops=dataclasses.replace(base.loops, ramp_steps=50))
    deep, root = plain_baseline(base), dataclasses.replace(khop_task(base), target="root")
    injections = {name: dataclasses.replace(base.model, injection=name) for name in INJECTIONS}
    return {name: dataclasses.replace(base, model=model) for name, model in injections.items()} | {
        "plain-depth": deep,
        "plain-parameters": narrowed(deep, count_parameters(base.model).total),
        "root": dataclasses.replace(base, data=root, losses=LossConfig()),
        "prelude": dataclasses.replace(base, model=dataclasses.replace(base.model, prelude_layers=1)),
    }


def settings(cfg: TrainConfig, quick: bool) -> dict[str, Any]:
    loops = LOOPS if cfg.model.recurrent_layers else LOOPS[:1]
    return {"rows": ROWS // 10 if quick else ROWS, "distances": DISTANCES, "loops": loops}


def enough(distances: Sequence[int] = DISTANCES, loops: Sequence[int] = LOOPS) -> np.ndarray:
    """(distances, loops) bool: at least as many loops as hops, so that the answer is within reach."""
    return np.array(loops) >= np.array(distances)[:, None]


def largest_fall(grid: np.ndarray, suffices: np.ndarray) -> np.ndarray:
    """Return by seed of (S, distances, loops) the most accuracy that more loops than needed cost at any distance."""
    reached = np.where(suffices, grid, np.nan)
    # fmax ignores the cells with too few loops, which come first in each row.
    return np.nanmax(np.fmax.accumulate(reached, -1) - reached, (-2, -1))


def reach(right: np.ndarray) -> int:
    """Return the most hops up to which every seed of (S, hops) reaches RIGHT without a gap."""
    return int((right.min(0) >= RIGHT).cumprod().sum())


def numbers(r: Results, arm: str) -> dict[str, Any]:
    """Return what the page states of an arm."""
    found, forest, far = r.arm(arm), r[arm, "forest"], {"hops": FAR, "loops": LOOPS[-1]}
    model, ahead = found["config"]["model"], r[OWN, "forest"].at(**far) - forest.at(**far)
    change = Estimate(-ahead.by_seed)
    found |= {
        "forest": forest.where(loops=LOOPS[-1]),
        "ahead": "" if arm == OWN else f"{ahead}, {ahead.side(0)} 0",
        "change": f"{change} against the recipe: {change.side(0, 'better', 'worse', 'not told apart')}",
        "blocks": model["prelude_layers"] + model["recurrent_layers"],
        "labels": "each hop, after each loop" if found["config"]["losses"]["per_loop"] else "the root, at the end",
    }
    if arm in PLAIN:
        return found
    right, few, many = (r[arm, f"cycle.{name}"] for name in ("right", "one_after", "one_before"))
    n_symbols = found["config"]["data"]["n_symbols"]
    later = np.array(STEPS[n_symbols:])
    prime = np.array([all(n % k for k in range(2, n)) for n in later])
    kinds = {"primes": prime, "rounds": later % n_symbols == 0, "others": ~prime & (later % n_symbols > 0)}
    falls = Estimate(largest_fall(forest.values, enough()))
    return found | {
        "cycle": right,
        "side": right[HOPS[-1]].side(1 / n_symbols),
        "reach": reach(right.values),
        "few": {"mean": few.at(), "most": Estimate(few.values.max(1))},
        "many": {"mean": many.at(), "most": Estimate(many.values.max(1))},
        "falls": falls,
        "harm": falls.side(HARM, "they hurt", "they do not hurt", "not told apart"),
        "unreachable": Estimate(forest.values[:, ~enough()].max(1)),
        "reachable": Estimate(forest.values[:, enough()].min(1)),
        "n": {kind: chosen.sum() for kind, chosen in kinds.items()},
        **{kind: Estimate(right.values[:, n_symbols:][:, chosen].mean(1)) for kind, chosen in kinds.items()},
    }


def fill(r: Results) -> dict[str, Any]:
    """Return what fills the page: the numbers of every arm, and what sets arms against each other."""
    arms = {arm: numbers(r, arm) for arm in r.runs}
    # Loops against blocks with the same labels, over all distances.
    loops, blocks = (r[arm, "forest"].where(loops=LOOPS[-1]).at() for arm in ("root", "plain-depth"))
    more, less = (f"the loops are worth {word}" for word in ("more", "less"))
    return arms | {
        "arms": arms.values(),
        "looped": [arms[arm] for arm in arms if arm not in PLAIN],
        "own": arms[OWN],
        "task": arms[OWN]["config"]["data"],
        "chance": 1 / arms[OWN]["config"]["data"]["n_symbols"],
        "others": ", ".join(f"{arm} {arms[arm]['cycle'][HOPS[-1]]}" for arm in INJECTIONS[1:]),
        "baselines": "; ".join(f"{r.title(arm)} {arms[arm]['forest'][FAR]}, {arms[arm]['ahead']}" for arm in PLAIN),
        "worth": loops - blocks,
        "worth_side": (loops - blocks).side(0, more, less, "not told apart"),
    }


def draw_hops(r: Results, path: Path) -> None:
    task = r.runs[OWN][0]["asked"]["config"]["data"]

    def levels(share: float, last: int) -> list[Curve]:
        text, trained = "chance; longest in training", (task["max_distance"],) * 2
        return [Curve((1, last), (share, share), text, None), Curve(trained, (0, 1), text, None)]

    on_cycle = [r[arm, "cycle.right"].curve(r.title(arm)) for arm in INJECTIONS]
    in_forests = [r[arm, "forest"].where(loops=LOOPS[-1]).curve(r.title(arm)) for arm in (*INJECTIONS, *PLAIN)]
    cycle, forest = (
        f"Cycle of {task['n_symbols']} symbols, as many loops as hops",
        f"Forest, {LOOPS[-1]} loops (plain: none)",
    )
    panels = {cycle: levels(1 / task["n_symbols"], STEPS[-1]) + on_cycle,
              forest: levels(r.raw["guessing"], DISTANCES[-1]) + in_forests}  # fmt: skip
    draw_curves(panels, path, ("hops", "accuracy"), shares=True)


def draw_heat_map(r: Results, path: Path) -> None:
    cfg = r.runs[OWN][0]["asked"]["config"]
    trained = f"trained on 1 to {cfg['data']['max_distance']} hops, {cfg['loops']['max_loops']} loops at most"
    title = f"Forests, mean of {r.n_seeds(OWN)}; {trained}"
    heat_map(r[OWN, "forest"].values.mean(0).tolist(), DISTANCES, LOOPS, path, title)


STUDY = Study(
    title="k-hop pointer chasing beyond the distances of training",
    question="Does a looped model follow more pointers than it was trained on, when it may loop more?",
    page=Path(__file__).with_suffix(".md"),
    cost=("2 min", "65 min"),
    arms=arms,
    titles=PLAIN | {"root": "diagonal, root label only", "prelude": "diagonal, one prelude layer"},
    settings=settings,
    prepare=lambda lab, arms: {"guessing": guessing(khop_task(arms[OWN]))},
    measure=measure,
    axes={"forest": {"hops": DISTANCES, "loops": LOOPS}}
    | {f"cycle.{name}": {"hops": STEPS} for name in ("right", "one_before", "one_after")},
    fill=fill,
    figures={"hops": draw_hops, "heatmap": draw_heat_map},
)
