"""Parity of more bits than in training: does it take as many loops as bits, and do they suffice?"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from open_mythos.accounting import count_parameters
from open_mythos.analysis.per_loop import right_by_loop
from open_mythos.config import MythosConfig
from open_mythos.experiments.study import Experiment, Lab, Result, seeded
from open_mythos.model import OpenMythos
from open_mythos.reports.document import Figure, Part, Report, Table
from open_mythos.reports.figures import Curve, heat_map, stacked
from open_mythos.reports.stats import against, interval, shown
from open_mythos.tasks import Parity
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.optim import OptimConfig
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.variants import RECIPE

TRAINED = 12
"""Longest in training, in bits and in loops."""
FARTHEST = 4 * TRAINED
LENGTHS = (1, 4, 8, 12, 14, 16, 18, 24, 36, 48)
LOOPS = (1, 2, 4, 8, 12, 16, 24, 36, 48)
CHANCE = 0.5
SOLVED = 0.95


@dataclass(frozen=True)
class Reading:
    """A model at some loops for each length: a line of the figure."""

    arm: str
    title: str
    loops: Callable[[int], int]


READINGS = (
    Reading("coupled", "loops = bits", lambda n: n),
    Reading("coupled", "the same, at 12 loops", lambda n: TRAINED),
    Reading("base100", "rotary base 100, loops = bits", lambda n: n),
    Reading("fixed", "fixed depth, at 12 loops", lambda n: TRAINED),
    Reading("fixed", "fixed depth, loops = bits, 12 or more", lambda n: max(n, TRAINED)),
    Reading("deep", "plain, 12 blocks", lambda n: 1),
    Reading("small", "plain, 1 block", lambda n: 1),
)
"""A plain model is the same at any loops: it has one column."""
PANELS = {"trained with loops = bits": READINGS[:2], "the twins": READINGS[3:]}
"""Of the figure, which has six colours."""


def arms(quick: bool) -> dict[str, TrainConfig]:
    """The looped model whose loops bound the bits it is asked about, and its twins."""
    steps = 250 if quick else 600
    model = MythosConfig(
        vocab_size=3,
        dim=64,
        n_heads=2,
        n_kv_heads=2,
        max_seq_len=FARTHEST + 1,
        max_loop_iters=TRAINED,
        prelude_layers=0,
        coda_layers=0,
        attn_type="gqa",
        n_experts=0,
        expert_dim=128,
        rope_theta=3.0,
        initial_state="zero",
        qk_norm=True,
        **RECIPE,
    )
    coupled = TrainConfig(
        model=model,
        data=Parity(TRAINED),
        steps=steps,
        batch_size=128,
        optim=OptimConfig("muon", lr=5e-3, weight_decay=0.0, muon_lr=2e-2),
        schedule=ScheduleConfig(warmup_steps=20, shape="linear", cooldown=0.5),
        loops=LoopsConfig("uniform", (TRAINED + 1) / 2, per="batch", max_loops=TRAINED, ramp_steps=steps // 3),
    )
    fixed = dataclasses.replace(coupled, loops=LoopsConfig("fixed", TRAINED))

    def plain(blocks: int) -> TrainConfig:
        return dataclasses.replace(
            fixed, model=dataclasses.replace(model, prelude_layers=blocks, recurrent_layers=0, prelude_norm=False)
        )

    base100 = dataclasses.replace(coupled, model=dataclasses.replace(model, rope_theta=100.0))
    return {"coupled": coupled, "base100": base100, "fixed": fixed, "deep": plain(TRAINED), "small": plain(1)}


def run(lab: Lab) -> Result:
    """Every arm of every seed: the share of right answers by bits (from 1) and loops (from 1)."""
    rows = 200 if lab.quick else 1000
    runs: dict[str, list[Result]] = {name: [] for name in arms(lab.quick)}
    for seed in lab.seeds:
        for name, arm in arms(lab.quick).items():
            cfg = seeded(arm, seed)

            def measure(model: OpenMythos, seed: int = seed) -> Result:
                return {"accuracy": accuracy(model, rows, seed)}

            runs[name].append(lab.measured(f"{name}-{seed}", cfg, measure, rows=rows, far=FARTHEST) | {"seed": seed})
    parameters = {name: count_parameters(arm.model).total for name, arm in arms(lab.quick).items()}
    return {"rows": rows, "parameters": parameters, "runs": runs}


def accuracy(model: OpenMythos, rows: int, seed: int) -> list[list[float]]:
    """Share of right answers by bits (outer) and loops; a plain model has one column. All arms see the same bits."""
    batch = Parity(FARTHEST).batch(stream(seed, 0, Purpose.VALIDATION), rows)
    share = right_by_loop(model, batch, FARTHEST)[:, :, 1:].double().mean(1)
    return [[round(x, 4) for x in by_loops] for by_loops in share.T.tolist()]


def read(runs: list[Result], reading: Reading, bits: int) -> list[float]:
    """By seed: accuracy at so many bits."""
    return [run["accuracy"][bits - 1][reading.loops(bits) - 1] for run in runs]


def reach(runs: list[Result], reading: Reading) -> list[int]:
    """By seed: the most bits up to which all lengths are answered with SOLVED or more; 0 for none."""
    values = np.array([read(runs, reading, n) for n in range(1, FARTHEST + 1)])
    solved = (values >= SOLVED).cumprod(axis=0)
    return solved.sum(axis=0).tolist()


def report(results: Result) -> Report:
    """What the grids say."""
    runs, trained_with = results["runs"], READINGS[0]
    coupled = runs["coupled"]
    inside = [min(read([run], trained_with, n)[0] for n in range(1, TRAINED + 1)) for run in coupled]
    twice = read(coupled, trained_with, 2 * TRAINED)
    few = read(coupled, READINGS[1], 2 * TRAINED)
    bought = [a - b for a, b in zip(twice, few, strict=True)]
    past = [min(run["accuracy"][n - 1][FARTHEST - 1] for n in range(1, TRAINED + 1)) for run in coupled]
    half = [run["accuracy"][TRAINED - 1][TRAINED // 2 - 1] for run in coupled]
    harm = against([a - b for a, b in zip(past, inside, strict=True)], 0) == "below"
    longest = {r.title: shown(reach(runs[r.arm], r), ".1f") for r in READINGS}
    twins = "; ".join(f"{r.title} {longest[r.title]}" for r in READINGS[2:])
    finding = (
        f"Trained on up to {TRAINED} bits, the looped model with loops = bits answers without a gap up to "
        f"{longest[trained_with.title]} bits; its twins: {twins}. "
        f"At {2 * TRAINED} bits it is right {shown(twice, '.2f')} of the time, {against(twice, CHANCE)} chance."
    )
    parts: list[Part] = [
        Figure("parity", "Accuracy by bits: mean and 95 % interval over seeds.", lambda path: _draw(runs, path)),
        "## Inside the trained lengths, and the control\n\n"
        f"Lowest accuracy over 1 to {TRAINED} bits with loops = bits: {shown(inside)}. The same with {FARTHEST} loops: "
        f"{shown(past)}: loops past the answer {'harm' if harm else 'are not seen to harm'} it. "
        f"Control, too few loops: {TRAINED} bits at {TRAINED // 2}: {shown(half)}, {against(half, CHANCE)} chance.",
        f"## Beyond\n\nAt {2 * TRAINED} bits, {2 * TRAINED} loops are worth {shown(bought, '+.2f')} over {TRAINED} "
        f"({against(bought, 0)} nothing). Lengths answered without a gap, {SOLVED:.0%} or more each:",
        Table(
            ("model", "parameters", "longest, by seed", "mean [95 % interval]"),
            [
                (r.title, f"{results['parameters'][r.arm]:,}", _list(reach(runs[r.arm], r)), longest[r.title])
                for r in READINGS
            ],
        ),
        "Accuracy by bits; chance is 0.5.",
        Table(
            ("bits", *(r.title for r in READINGS)),
            [(str(n), *(shown(read(runs[r.arm], r, n), ".2f") for r in READINGS)) for n in LENGTHS],
        ),
        Figure(
            "grid",
            f"Loops = bits in training, mean over seeds ({len(coupled)}). Left of the line are fewer loops than bits.",
            lambda path: heat_map(
                [[float(np.mean([run["accuracy"][n - 1][k - 1] for run in coupled])) for k in LOOPS] for n in LENGTHS],
                LENGTHS,
                LOOPS,
                path,
                f"Accuracy; trained on 1 to {TRAINED} bits",
                "bits",
            ),
        ),
    ]
    return Report(finding, parts)


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _draw(runs: Result, path: Path) -> None:
    xs = range(1, FARTHEST + 1)
    lines = [
        Curve((1, FARTHEST), (CHANCE, CHANCE), "chance; longest in training", None),
        Curve((TRAINED, TRAINED), (0, 1), "chance; longest in training", None),
    ]
    panels, color = {}, 0
    for title, readings in PANELS.items():
        panels[title] = list(lines)
        for reading in readings:
            mean, low, high = zip(*(interval(read(runs[reading.arm], reading, n)) for n in xs), strict=True)
            panels[title].append(Curve(xs, mean, reading.title, color, low, high))
            color += 1
    stacked(panels, path, ("bits", "accuracy"))


PROTOCOL = f"""\
Task: uniform bits behind a start mark; after every bit the model is asked for the parity of the bits so far, so that
one row asks about every length. Trained on up to {TRAINED} bits, tested on up to {FARTHEST}, after every loop up to
{FARTHEST}; fresh bits, the same for all arms of a seed. One block of width 64, no prelude or coda, `diagonal`
injection, h = 0 at the start, loss after the last loop only. Arms, with the same steps, rows and optimizer:

- **loops = bits**: each step's depth is drawn from 1 to {TRAINED} (rising over the first third), and no position is
  asked about more bits than there are loops. No loss names a bit on the way.
- **rotary base 100**: the same with the base of our other small recipes. With base 3 every rotary channel has gone
  through a full turn within 18 bits, so longer rows show attention few angles that it has not seen.
- **fixed depth**: {TRAINED} loops always, every length asked.
- **plain, {TRAINED} blocks**: equal depth, {TRAINED} times the block. **plain, 1 block**: about equal parameters.

Null control, in the same grid: fewer loops than bits, where one loop per bit cannot have reached the answer. Chance
is 0.5. Source of the question: Fan et al. 2024, arXiv 2409.15647, who train to 20 bits and test to 40 without
positions.
"""
EXPERIMENT = Experiment(
    title="Parity: more bits than in training",
    question="With as many loops as bits, does a looped model answer longer rows than it was trained on?",
    protocol=PROTOCOL,
    cost=("2 min", "20 min"),
    run=run,
    report=report,
    n_parts=lambda lab: len(arms(lab.quick)) * len(lab.seeds),
)
