"""Is loop t doing something different from loop t+1? See `open_mythos.analysis.loop_roles` for the measurement."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.analysis.loop_roles import (
    LoopRoles,
    across,
    cells,
    draw_effects,
    draw_split,
    effect_table,
    interchangeable,
    last_loop,
    loop_roles,
    shuffle,
    split_table,
    verdict,
)
from open_mythos.experiments.study import Experiment, Lab, Result, seeded
from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.reports.document import Figure, Part, Report, Table
from open_mythos.reports.stats import shown
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
"""Loops that are looked at: those of training, its deeper half, and one for each hop of the questions."""
INDEX_PARTS: dict[str, Any] = {"loop_embedding": True, "lora_rank": 8}
NO_INDEX_PARTS: dict[str, Any] = {"loop_embedding": False, "lora_rank": 0}
PLANTED = ("diagonal", "khop")
"""Models in whose twins a loop is made different: one whose answers stand long before the last loop, one where each
loop is needed."""
PLANTED_LOOP = 2
PLANTED_ROWS = 32
STRENGTHS = (0.01, 0.1, 1.0)
"""Of what is planted, in units of the update that it would be added to."""


def arms(quick: bool) -> dict[str, tuple[TrainConfig, TrainConfig]]:
    """Three models with parts that see the loop index, and the twin without them of each."""
    addition, published, khop = (load_recipe(name) for name in ("tiny-addition", "addition-dgx", "tiny-khop"))
    changes = {"dim": 128, "n_heads": 4, "expert_dim": 256, "rope_theta": 100.0, "halting": "none"}
    lti = dataclasses.replace(published.model, **changes)
    own = {
        # The published optimiser learns nothing in minutes, so the recipe's trains this one too.
        "published": dataclasses.replace(
            addition,
            model=lti,
            data=Addition(2, 2),
            loops=LoopsConfig("fixed", LOOPS["published"]),
            batch_size=64,
            steps=400,
        ),
        "diagonal": dataclasses.replace(
            addition, model=dataclasses.replace(addition.model, max_loop_iters=LOOPS["diagonal"])
        ),
        "khop": khop,
    }

    def arm(cfg: TrainConfig, parts: dict[str, Any]) -> TrainConfig:
        steps = 60 if quick else cfg.steps
        loops = dataclasses.replace(cfg.loops, ramp_steps=min(cfg.loops.ramp_steps, steps // 4))
        model = dataclasses.replace(cfg.model, **parts)
        return dataclasses.replace(cfg, model=model, steps=steps, loops=loops, eval=EvalConfig())

    return {name: (arm(cfg, INDEX_PARTS), arm(cfg, NO_INDEX_PARTS)) for name, cfg in own.items()}


def questions(cfg: TrainConfig, rows: int, seed: int) -> Batch:
    """Fresh ones; pointers are followed as far as training went, so that every loop is needed."""
    task = cfg.data
    if isinstance(task, KHop):
        task = dataclasses.replace(task, min_distance=task.max_distance)
    return task.batch(stream(seed + 1_000_000, 0, Purpose.VALIDATION), rows)


def measure(model: OpenMythos, batch: Batch, n_loops: int) -> Result:
    """What the loops do at the positions that have labels, and how many rows come out right."""
    roles = loop_roles(model, batch.input_ids, n_loops, batch.labels != IGNORE)
    return {"accuracy": evaluate(model, batch, n_loops).accuracy, "roles": roles.to_dict()}


def plant(model: OpenMythos, batch: Batch, loop: int, strength: float) -> OpenMythos:
    """A copy of a model whose loops are all the same, but for one with a random depth LoRA that no other loop uses.

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
        # The LoRA is linear in B, and what the diagonal injection makes of its sum with the block is the sum itself.
        lora.B.mul_(strength / _strength(loop_roles(planted, batch.input_ids, loop + 1, batch.labels != IGNORE), loop))
    return planted


def _strength(roles: LoopRoles, loop: int) -> float:
    return roles.other[:, loop - 1, loop].mean().item()


def run(lab: Lab) -> Result:
    """Roles in each model and its twin, and in twins with a planted loop, by seed."""
    rows = 32 if lab.quick else 64
    results: Result = {"own": {name: [] for name in TITLES}, "twin": {name: [] for name in TITLES}}
    results["planted"] = {name: [] for name in PLANTED}
    for seed in lab.seeds:
        for name, pair in arms(lab.quick).items():
            for kind, cfg in zip(("own", "twin"), pair, strict=True):
                cfg, n = seeded(cfg, seed), LOOPS[name]
                batch = questions(cfg, rows, seed)
                result = lab.measured(
                    f"{name}-{kind}-{seed}", cfg, lambda model, batch=batch, n=n: measure(model, batch, n), rows=rows
                )
                results[kind][name].append({"seed": seed} | result)
        for name in PLANTED:
            cfg = seeded(arms(lab.quick)[name][1], seed)

            def planted(name: str = name, cfg: TrainConfig = cfg, seed: int = seed) -> Result:
                model, batch = lab.trained(f"{name}-twin-{seed}", cfg), questions(cfg, PLANTED_ROWS, seed)
                return {
                    str(strength): measure(plant(model, batch, PLANTED_LOOP, strength), batch, LOOPS[name])
                    for strength in STRENGTHS
                }

            asked = {"config": cfg.to_dict(), "rows": PLANTED_ROWS, "strengths": STRENGTHS}
            results["planted"][name].append(lab.computed(f"planted-{name}-{seed}", planted, **asked))
    return results


def report(results: Result) -> Report:
    """Tables, figures, and what follows from the intervals."""
    own, twin = ({name: _roles(results[kind][name]) for name in TITLES} for kind in ("own", "twin"))
    planted = {
        name: {s: _roles([run[str(s)] for run in results["planted"][name]]) for s in STRENGTHS} for name in PLANTED
    }
    parts: list[Part] = [
        "## What it shows",
        " ".join(f"*{title[0].upper()}{title[1:]}*: {verdict(own[name])}" for name, title in TITLES.items()),
        Figure(
            "function",
            "The function's share of the change between two consecutive updates, with 95 % intervals over seeds. "
            f"In a twin of {TITLES['diagonal']}, loop {PLANTED_LOOP} was made different on purpose, by a tenth of its "
            "update.",
            lambda path: draw_split(
                {TITLES[name]: own[name] for name in TITLES}
                | {f"planted at loop {PLANTED_LOOP}": planted["diagonal"][0.1]},
                path,
                "twins without index-dependent parts",
            ),
        ),
        Figure(
            "interventions",
            "KL at the output when one loop is left out, run twice or swapped with the next, with 95 % intervals.",
            lambda path: draw_effects({TITLES[name]: own[name] for name in TITLES}, path),
        ),
        "## Controls",
        _null(twin),
        *(part for name in PLANTED for part in _planted(TITLES[name], planted[name])),
    ]
    for name, title in TITLES.items():
        right = {kind: shown([run["accuracy"] for run in results[kind][name]]) for kind in ("own", "twin")}
        parts += [
            f"## {title[0].upper()}{title[1:]}",
            f"Right at {LOOPS[name]} loops: {right['own']} of the questions; the twin without loop embedding and depth "
            f"LoRA {right['twin']}.",
            split_table(own[name]),
            effect_table(own[name]),
            "The twin: " + verdict(twin[name]),
        ]
    return Report(_finding(own), parts)


def _finding(own: dict[str, list[LoopRoles]]) -> str:
    """Whether the loops of each model are interchangeable, and the range of the function's share."""
    words = {False: "have roles of their own", True: "are interchangeable", None: "leave it open"}
    found = []
    for name, runs in own.items():
        share = across(runs, lambda r: r.share).mean
        shuffled, needed = (cells(across(runs, pick("changed")))[0] for pick in (shuffle, last_loop))
        found.append(
            f"the loops of the model '{TITLES[name]}' {words[interchangeable(runs)]} (shuffling them changes "
            f"{shuffled} of the answers, one loop fewer {needed}; the function's share is "
            f"{share.min():.2f} to {share.max():.2f})"
        )
    return f"By what happens to the answers, {'; '.join(found)}."


def _roles(runs: list[Result]) -> list[LoopRoles]:
    return [LoopRoles.from_dict(run["roles"]) for run in runs]


def _null(twins: dict[str, list[LoopRoles]]) -> str:
    def most(values: list[Tensor]) -> float:
        # What was not measured is no zero: one NaN makes this NaN, which passes nowhere.
        return torch.cat([x.flatten() for x in values]).abs().max().item()

    runs = [run for each in twins.values() for run in each]
    function = most([run.function for run in runs])
    kl = most([run.kl[name] for run in runs for name in ("swap", "shuffle")])
    passed = function < 1e-5 and kl < 1e-5
    return (
        f"Null control: in {len(runs)} twins without loop embedding and depth LoRA the largest function part of any "
        f"sequence is {function:.1g} of the update, and the largest KL of a swap or shuffle {kl:.1g} nats: "
        f"{'float error at most' if passed else 'NOT zero, so the measurement is at fault'}."
    )


def _planted(title: str, planted: dict[float, list[LoopRoles]]) -> list[Part]:
    """How much of the planted loop is found, and where."""
    rows, found = [], True
    for strength, runs in planted.items():
        n = runs[0].distinct.shape[1]
        distinct, swap = across(runs, lambda r: r.distinct), across(runs, lambda r: r.kl["swap"])
        at = [t in (PLANTED_LOOP - 1, PLANTED_LOOP) for t in range(n - 1)]
        others = [t for t in range(n) if t != PLANTED_LOOP]
        # Elsewhere nothing but rounding, if that; here what may be little, but clear of it.
        elsewhere = (distinct.high[others].max(), swap.high[[not x for x in at]].max())
        here = (distinct.low[PLANTED_LOOP], swap.mean[at].min())
        found = found and all(e < 1e-5 and h > max(0.0, 100 * e) for h, e in zip(here, elsewhere, strict=True))
        there = cells(distinct)[PLANTED_LOOP]
        pair = [cells(swap, ".3g")[t] for t in (PLANTED_LOOP - 1, PLANTED_LOOP)]
        measured = sum(_strength(run, PLANTED_LOOP) for run in runs) / len(runs)
        rows.append(
            [
                f"{strength:g}",
                f"{measured:.5f}",
                there,
                *pair,
                f"{max(elsewhere):.1g}",
                cells(across(runs, shuffle("changed")))[0],
            ]
        )
    return [
        f"Planted case: loop {PLANTED_LOOP} of the twin of '{title}' is given a depth LoRA that no other "
        "loop has. It is "
        + ("found at every strength, and nothing is found elsewhere." if found else "NOT found at every strength."),
        Table(
            [
                "planted, of an update",
                "measured",
                f"distinctness of loop {PLANTED_LOOP}",
                f"KL of swap {PLANTED_LOOP - 1}, {PLANTED_LOOP}",
                f"KL of swap {PLANTED_LOOP}, {PLANTED_LOOP + 1}",
                "most anywhere else",
                "answers that a shuffle changes",
            ],
            rows,
        ),
    ]


PROTOCOL = f"""
The change between two consecutive updates is split exactly into a part from the function (same state, other loop index)
and a part from the state (same index, other state); the mean of both orders of the split is reported, each order of the
function part beside it, in units of the update. Loops are then left out, run twice, swapped with the next or all
shuffled (8 orders), and the KL at the output against the untouched run is taken; a loop more is there for comparison.
All of it at the positions of answers, in sequences of fresh questions.

Models: the published architecture at width 128 on 2-digit addition ({LOOPS["published"]} loops, the published fixed
depth; trained by Muon, since the published optimiser learns nothing in minutes; ACT is off, for in a pilot with it all
tokens learned to leave after a loop or two, which left no loops to compare); the recipe `tiny-addition` with loop
embedding and depth LoRA ({LOOPS["diagonal"]} loops); the recipe `tiny-khop` with both ({LOOPS["khop"]} loops on
questions of 4 hops). Null control: the twin of each without loop embedding and depth LoRA, trained alike; its function
part, swaps and shuffles have to come out as zero. Planted case: trained twins in which loop {PLANTED_LOOP} alone gets
a random depth LoRA of a known size; on k-hop, where every loop is needed, they also tell how large a role has to be
before answers show it. Intervals: Student's t over seeds; of a single seed, bootstrap over its
sequences.
"""

EXPERIMENT = Experiment(
    title="Is loop t doing something different from loop t+1?",
    question="Do the loops of a trained model have roles of their own, or is each the same function of another state?",
    protocol=PROTOCOL,
    cost=("1 min", "50 min"),
    run=run,
    report=report,
    n_parts=lambda lab: (2 * len(TITLES) + len(PLANTED)) * len(lab.seeds),
)
