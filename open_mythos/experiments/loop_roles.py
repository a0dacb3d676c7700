"""Does loop t do something different from loop t+1? See `open_mythos.analysis.loop_roles` for the measurement."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from open_mythos.analysis.loop_roles import LoopRoles, loop_roles
from open_mythos.analysis.loop_roles_section import (
    across,
    cells,
    draw_effects,
    draw_split,
    effect_table,
    interchangeable,
    split_table,
    verdict,
    without_order_or_last,
)
from open_mythos.experiments.study import Result, Results, Run, Study, vary
from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.tasks import Addition, KHop
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE, Batch
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.evaluate import evaluate

TITLES = {
    "published": "published architecture, addition",
    "diagonal": "diagonal injection at sampled depth, addition",
    "khop": "diagonal injection, a hop per loop, k-hop",
}
LOOPS = {"published": 4, "diagonal": 6, "khop": 4}
"""Loops to analyse: those of training, its deeper half, and one for each hop of the questions."""
INDEX_PARTS: dict[str, Any] = {"loop_embedding": True, "lora_rank": 8}
NO_INDEX_PARTS: dict[str, Any] = {"loop_embedding": False, "lora_rank": 0}
PLANTED = ("diagonal", "khop")
"""Models in whose null controls a loop is made different: one whose answers stand long before the last loop, one where
each loop is needed."""
PLANTED_LOOP = 2
PLANTED_ROWS = 32
STRENGTHS = (0.01, 0.1, 1.0)
"""Size of the planted difference, in units of the update that it would be added to."""


def arms(quick: bool) -> dict[str, TrainConfig]:
    """Return three models with parts that see the loop index, and the null control without them of each."""
    addition, published, khop = (load_recipe(name) for name in ("tiny-addition", "addition-dgx", "tiny-khop"))
    changes = {"dim": 128, "n_heads": 4, "expert_dim": 256, "rope_theta": 100.0, "halting": "none"}
    model, fixed = dataclasses.replace(published.model, **changes), LoopsConfig("fixed", LOOPS["published"])
    # The published optimiser learns nothing in minutes, so the recipe's trains that architecture too.
    own = {
        "published": vary(addition, model=model, data=Addition(2, 2), loops=fixed, batch_size=64, steps=400),
        "diagonal": vary(addition, model={"max_loop_iters": LOOPS["diagonal"]}),
        "khop": khop,
    }
    found = {}
    for name, cfg in own.items():
        steps = 60 if quick else cfg.steps
        loops = {"ramp_steps": min(cfg.loops.ramp_steps, steps // 4)}
        for arm, parts in ((name, INDEX_PARTS), (f"{name}-null", NO_INDEX_PARTS)):
            found[arm] = vary(cfg, model=parts, steps=steps, loops=loops, eval=EvalConfig())
    return found


def questions(cfg: TrainConfig, rows: int, seed: int) -> Batch:
    """Draw fresh questions; pointers are followed as far as training went, so that every loop is needed."""
    task = cfg.data
    if isinstance(task, KHop):
        task = dataclasses.replace(task, min_distance=task.max_distance)
    return task.batch(stream(seed + 1_000_000, 0, Purpose.VALIDATION), rows)


def roles_of(model: OpenMythos, batch: Batch, n_loops: int) -> Result:
    """Measure the loops at the positions that have labels, and the share of rows that come out right."""
    roles = loop_roles(model, batch.input_ids, n_loops, batch.labels != IGNORE)
    return {"accuracy": evaluate(model, batch, n_loops).accuracy, "roles": roles.to_dict()}


def plant(model: OpenMythos, batch: Batch, loop: int, strength: float) -> OpenMythos:
    """Copy a model whose loops are all the same, and give one loop a random depth LoRA that no other loop uses.

    Its size is set at the state before the loop ahead of it: there the planted index adds `strength` of an update.
    """
    assert not (model.cfg.loop_embedding or model.cfg.lora_rank) and model.cfg.injection == "diagonal"
    planted = OpenMythos(dataclasses.replace(model.cfg, lora_rank=INDEX_PARTS["lora_rank"])).eval()
    planted.load_state_dict(model.state_dict(), strict=False)
    assert planted.recurrent is not None and planted.recurrent.lora is not None
    lora, generator = planted.recurrent.lora, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in (lora.down.weight, lora.B):
            x.copy_(torch.randn(x.shape, generator=generator))
        lora.scale.weight.copy_(nn.functional.one_hot(torch.tensor(loop), len(lora.scale.weight))[:, None])
        # The LoRA is linear in B, and the diagonal injection passes its sum with the block on unchanged.
        lora.B.mul_(strength / _strength(loop_roles(planted, batch.input_ids, loop + 1, batch.labels != IGNORE), loop))
    return planted


def _strength(roles: LoopRoles, loop: int) -> float:
    return roles.other[:, loop - 1, loop].mean().item()


def measure(run: Run) -> Result:
    """Measure the roles of a model's loops, and of those of copies with a planted loop."""
    n_loops = LOOPS[run.arm.removesuffix("-null")]
    found = roles_of(run.model, questions(run.config, run.settings["rows"], run.seed), n_loops)
    if "strengths" in run.settings:
        batch = questions(run.config, run.settings["planted_rows"], run.seed)
        found["planted"] = {
            str(strength): roles_of(plant(run.model, batch, PLANTED_LOOP, strength), batch, n_loops)
            for strength in run.settings["strengths"]
        }
    return found


def settings(cfg: TrainConfig, quick: bool) -> dict[str, Any]:
    """Return the number of questions, and for the null controls of PLANTED those about planted loops."""
    planted = {"planted_rows": PLANTED_ROWS, "strengths": STRENGTHS}
    same_loops = not cfg.model.lora_rank and cfg.model.injection == "diagonal"
    return {"rows": 32 if quick else 64} | (planted if same_loops else {})


def roles(r: Results, arm: str, strength: float | None = None) -> list[LoopRoles]:
    """Return the roles of an arm by seed, or those of its copies with a loop planted at a strength."""
    runs = r.runs[arm] if strength is None else [run["planted"][str(strength)] for run in r.runs[f"{arm}-null"]]
    return [LoopRoles.from_dict(run["roles"]) for run in runs]


def null(controls: list[LoopRoles]) -> dict[str, Any]:
    """Return the largest function part and effect of an order in the null controls, and what they show."""
    values = [run.function for run in controls], [run.kl[name] for run in controls for name in ("swap", "shuffle")]
    # A number that was not measured is no zero: one NaN makes this NaN, which passes nowhere.
    function, kl = (torch.cat([x.flatten() for x in each]).abs().max().item() for each in values)
    passed = "float error at most" if function < 1e-5 and kl < 1e-5 else "NOT zero, so the measurement is at fault"
    return {"n": len(controls), "function": function, "kl": kl, "passed": passed}


def planted(r: Results, arm: str) -> dict[str, Any]:
    """Return how much of the planted loop is found, and where, by strength."""
    rows, found = [], True
    for strength in STRENGTHS:
        runs = roles(r, arm, strength)
        distinct, swap = across(runs, "distinct"), across(runs, "kl.swap")
        others = np.arange(len(distinct.mean)) != PLANTED_LOOP
        pairs = np.isin(np.arange(len(swap.mean)), (PLANTED_LOOP - 1, PLANTED_LOOP))
        # Elsewhere there may be rounding and no more; the planted loop's own effect may be small, but clear of that.
        elsewhere = distinct.high[others].max(), swap.high[~pairs].max()
        here = distinct.low[PLANTED_LOOP], swap.mean[pairs].min()
        found = found and all(e < 1e-5 and h > max(0.0, 100 * e) for h, e in zip(here, elsewhere, strict=True))
        rows.append(
            {
                "strength": strength,
                "measured": np.mean([_strength(run, PLANTED_LOOP) for run in runs]),
                "distinct": cells(distinct)[PLANTED_LOOP],
                "before": cells(swap, ".3g")[PLANTED_LOOP - 1],
                "after": cells(swap, ".3g")[PLANTED_LOOP],
                "elsewhere": max(elsewhere),
                "shuffled": without_order_or_last(runs)[0],
            }
        )
    words = "found at every strength, and nothing is found elsewhere" if found else "NOT found at every strength"
    return {"rows": rows, "found": words}


def fill(r: Results) -> dict[str, Any]:
    """Return what fills the page: the tables and the verdict of every model, and the controls."""
    words = {False: "have roles of their own", True: "are interchangeable", None: "leave it open"}
    models, finding = {}, []
    for arm, title in TITLES.items():
        runs, controls = roles(r, arm), roles(r, f"{arm}-null")
        share = across(runs, "share").mean
        shuffled, needed = without_order_or_last(runs)
        finding.append(
            f"the loops of the model '{title}' {words[interchangeable(runs)]} (shuffling them changes {shuffled} of "
            f"the answers, one loop fewer {needed}; the function's share is {share.min():.2f} to {share.max():.2f})"
        )
        models[arm] = {
            "verdict": verdict(runs),
            "loops": LOOPS[arm],
            "accuracy": r[arm, "accuracy"].at(),
            "null_accuracy": r[f"{arm}-null", "accuracy"].at(),
            "null_verdict": verdict(controls),
            "split": split_table(runs),
            "effects": effect_table(runs),
        }
    in_place = {arm: planted(r, arm) for arm in PLANTED}
    controls = [run for arm in TITLES for run in roles(r, f"{arm}-null")]
    return models | {
        "finding": "; ".join(finding),
        "one": " With one seed, intervals are over its sequences." * (len(r.runs["khop"]) == 1),
        "null": null(controls),
        "planted": {arm: found["found"] for arm, found in in_place.items()},
        **{f"planted_{arm}": found["rows"] for arm, found in in_place.items()},
    }


def draw_function(r: Results, path: Path) -> None:
    models = {title: roles(r, arm) for arm, title in TITLES.items()}
    models[f"planted at loop {PLANTED_LOOP}"] = roles(r, "diagonal", 0.1)
    draw_split(models, path)


def draw_interventions(r: Results, path: Path) -> None:
    draw_effects({title: roles(r, arm) for arm, title in TITLES.items()}, path)


STUDY = Study(
    title="Does loop t do something different from loop t+1?",
    question="Do the loops of a trained model have roles of their own, or is each the same function of another state?",
    page=Path(__file__).with_suffix(".md"),
    cost=("1 min", "50 min"),
    arms=arms,
    titles=TITLES,
    settings=settings,
    measure=measure,
    fill=fill,
    figures={"function": draw_function, "interventions": draw_interventions},
)
