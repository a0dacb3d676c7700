"""Where a bracket string first breaks: does deeper nesting take more loops? And does a task have its own number?"""

import dataclasses

import numpy as np

from open_mythos.accounting import count_parameters
from open_mythos.analysis.per_loop import right_by_loop, rows_right, settled
from open_mythos.config import MythosConfig
from open_mythos.experiments.brackets_report import report
from open_mythos.experiments.study import Experiment, Lab, Result, seeded
from open_mythos.model import OpenMythos
from open_mythos.tasks import Addition, Brackets, Mixed
from open_mythos.tasks.brackets import KINDS, first_break, nesting
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.optim import OptimConfig
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.variants import RECIPE

LENGTH = 12
MEAN_LOOPS = 4
LOOPS = 16
"""The most at test."""


def arms(quick: bool) -> dict[str, TrainConfig]:
    """Sampled depth, its twins, and a model of several tasks."""
    steps = 200 if quick else 1000
    model = MythosConfig(
        vocab_size=Brackets().vocab_size,
        dim=64,
        n_heads=4,
        n_kv_heads=4,
        max_seq_len=32,
        max_loop_iters=MEAN_LOOPS,
        prelude_layers=1,
        coda_layers=0,
        attn_type="gqa",
        n_experts=0,
        expert_dim=128,
        rope_theta=3.0,
        initial_state="zero",
        qk_norm=True,
        **RECIPE,
    )
    sampled = TrainConfig(
        model=model,
        data=Brackets(2, LENGTH, 1, LENGTH // 2),
        steps=steps,
        batch_size=128,
        optim=OptimConfig("muon", lr=2.5e-3, weight_decay=0.0, muon_lr=5e-3),
        schedule=ScheduleConfig(warmup_steps=20, shape="linear", cooldown=0.5),
        loops=LoopsConfig("poisson", MEAN_LOOPS, max_loops=12),
    )
    fixed = dataclasses.replace(sampled, loops=LoopsConfig("fixed", MEAN_LOOPS))

    def plain(blocks: int) -> TrainConfig:
        return dataclasses.replace(
            fixed, model=dataclasses.replace(model, prelude_layers=blocks, recurrent_layers=0, prelude_norm=False)
        )

    mixed = dataclasses.replace(
        sampled,
        model=dataclasses.replace(model, vocab_size=Mixed().vocab_size),
        data=Mixed(max_bits=8, max_digits=2, max_length=LENGTH),
        # A third of the rows are brackets, which are learned last.
        steps=steps * 3 // 2,
        loops=LoopsConfig("poisson", 5, max_loops=12),
    )
    return {"sampled": sampled, "fixed": fixed, "deep": plain(1 + MEAN_LOOPS), "small": plain(2), "mixed": mixed}


def run(lab: Lab) -> Result:
    """Every arm of every seed: what was right after every loop, and when each row settled."""
    rows = 400 if lab.quick else 2000
    runs: dict[str, list[Result]] = {name: [] for name in arms(lab.quick)}
    for seed in lab.seeds:
        for name, arm in arms(lab.quick).items():
            cfg = seeded(arm, seed)

            def measure(model: OpenMythos, cfg: TrainConfig = cfg) -> Result:
                data = cfg.data
                return (
                    by_task(model, data, rows, cfg.seed) if isinstance(data, Mixed) else by_row(model, rows, cfg.seed)
                )

            runs[name].append(lab.measured(f"{name}-{seed}", cfg, measure, rows=rows, loops=LOOPS) | {"seed": seed})
    parameters = {name: count_parameters(arm.model).total for name, arm in arms(lab.quick).items()}
    steps = {name: arm.steps for name, arm in arms(lab.quick).items()}
    return {"rows": rows, "length": LENGTH, "loops": LOOPS, "parameters": parameters, "steps": steps, "runs": runs}


def by_row(model: OpenMythos, rows: int, seed: int) -> Result:
    """Strings of one length, the longest of training: of each its nesting, its break and the loop that settles it.

    `right` has, by nesting and break or none, the share of rows that are right by loop.
    """
    task = Brackets(LENGTH, LENGTH, 1, LENGTH // 2)
    strings, lengths = task.draw(stream(seed, 0, Purpose.VALIDATION), rows)
    batch = task.encode(strings, lengths)
    right = rows_right(right_by_loop(model, batch, LOOPS), batch)
    deep, place = nesting(strings, lengths), first_break(strings, lengths)
    shares = {
        name: {int(d): right[:, which & (deep == d)].mean(axis=1).round(4).tolist() for d in np.unique(deep[which])}
        for name, which in (("broken", place >= 0), ("balanced", place < 0))
    }
    # What the first bracket's kind has to do with it is nothing: the null control.
    rows_of = {"nesting": deep, "place": place, "settled": settled(right), "kind": strings[:, 0] % KINDS}
    return {"right": shares, "rows": {name: values.tolist() for name, values in rows_of.items()}}


def by_task(model: OpenMythos, data: Mixed, rows: int, seed: int) -> Result:
    """Fresh rows of each task, the longest of training: share right by loop, and rows by the loop that settles them.

    Of brackets those that break: "--" is what a model says before it has looked.
    """
    found = {}
    for i, part in enumerate(data.parts):
        rng = stream(seed, 1 + i, Purpose.VALIDATION)
        if isinstance(part, Brackets):
            part = Brackets(LENGTH, LENGTH, 1, LENGTH // 2)
            strings, lengths = part.draw(rng, rows)
            broken = first_break(strings, lengths) >= 0
            batch = part.encode(strings[broken], lengths[broken])
        elif isinstance(part, Addition):
            batch = dataclasses.replace(part, min_digits=part.max_digits).batch(rng, rows)
        else:
            batch = part.batch(rng, rows)
        batch = data.translate(part, batch)
        right = rows_right(right_by_loop(model, batch, LOOPS), batch)
        found[part.name] = {
            "right": right.mean(axis=1).round(4).tolist(),
            "settled": np.bincount(settled(right), minlength=LOOPS + 1).tolist(),
        }
    return {"tasks": found}


PROTOCOL = f"""\
Task: a string over `()[]{{}}`, then `=`; the answer is the place of the leftmost break in two digits, or `--`, and
`$`. A closing bracket that finds another opening one, or none, breaks the string at its place; one never closed, at
the string's end. Strings have 2 to {LENGTH} brackets and are nested 1 to {LENGTH // 2} deep; half are balanced, in
the others one bracket was replaced. Measured on fresh strings of exactly {LENGTH} brackets, so that length and
nesting cannot be mistaken for each other, after every loop up to {LOOPS}. A row is right when all three tokens are.
It *settles* at the first loop after which it stays right. Nesting is what the reader's stack holds at most before the
break. Arms, with the same rows and optimizer:

- **sampled depth**: one prelude layer and one looped block of width 64, `diagonal` injection, each row at 1 +
  Poisson({MEAN_LOOPS - 1}) loops, at most 12; loss after the last loop only.
- **fixed depth**: its twin at {MEAN_LOOPS} loops. **plain, {1 + MEAN_LOOPS} blocks**: as deep as that. **plain, 2
  blocks**: about equal parameters.
- **mixed**: as sampled depth, with 1 + Poisson(4) loops and half as many steps again, each row being parity of 1 to 8
  bits (asked after every bit, of no more bits than loops), addition of 1 or 2 digits (answer reversed) or brackets.
  A row of parity is right when all its 8 answers are; a task with fewer than half of its rows right is not compared.

Does nesting go with the loop that settles a row? Rank correlation over the broken strings that settle, by seed, raw
and among strings that break at the same place: a deep string also breaks late. Null control: the same with the kind
of the first bracket, which cannot matter. Balanced strings stand apart, as half of training says `--` and a guess needs
no loop.
"""
EXPERIMENT = Experiment(
    title="Brackets: does nesting need loops?",
    question="Do more deeply nested strings take more loops to be read, and does each task settle at its own loop?",
    protocol=PROTOCOL,
    cost=("2 min", "35 min"),
    run=run,
    report=report,
    n_parts=lambda lab: len(arms(lab.quick)) * len(lab.seeds),
)
