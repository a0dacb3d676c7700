"""Parity of more bits than in training: does it take as many loops as bits, and do they suffice?"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from open_mythos.analysis.per_loop import right_by_loop
from open_mythos.experiments.study import Result, Results, Run, Study, curve, plain
from open_mythos.recipes import load_recipe
from open_mythos.reports.figures import Curve, draw_curves, heat_map
from open_mythos.reports.stats import Estimate
from open_mythos.tasks import Parity
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.losses import LossConfig
from open_mythos.variants import small_model

TRAINED = 12
"""Most bits and loops in training."""
FARTHEST = 4 * TRAINED
BITS = tuple(range(1, FARTHEST + 1))
LENGTHS = (1, 4, 8, 12, 14, 16, 18, 24, 36, 48)
LOOPS = (1, 2, 4, 8, 12, 16, 24, 36, 48)
"""Places of the tables and the heat map."""
CHANCE = 0.5
SOLVED = 0.95
Loops = Callable[[int], int]
"""Loops by number of bits."""
LINES: dict[str, tuple[str, str, Loops]] = {
    "coupled": ("coupled", "loops = bits", lambda n: n),
    "twelve": ("coupled", "the same, at 12 loops", lambda n: TRAINED),
    "base100": ("base100", "rotary base 100, loops = bits", lambda n: n),
    "fixed": ("fixed", "fixed depth, at 12 loops", lambda n: TRAINED),
    "deeper": ("fixed", "fixed depth, loops = bits, 12 or more", lambda n: max(n, TRAINED)),
    "deep": ("deep", "plain, 12 blocks", lambda n: 1),
    "small": ("small", "plain, 1 block", lambda n: 1),
}
"""A model at some loops for each length, which is a line of the figure: arm, title, loops."""


def arms(quick: bool) -> dict[str, TrainConfig]:
    """The looped model whose loops bound the bits it is asked about, and its baselines; optimizer of tiny-khop."""
    steps, shape = 250 if quick else 600, {"max_seq_len": FARTHEST + 1, "max_loop_iters": TRAINED}
    model = small_model(3, 64, 2, 128, rope_theta=3.0, qk_norm=True, prelude_layers=0, coda_layers=0, **shape)
    loops = LoopsConfig("uniform", (TRAINED + 1) / 2, per="batch", max_loops=TRAINED, ramp_steps=steps // 3)
    task = {"data": Parity(TRAINED), "losses": LossConfig(), "steps": steps, "batch_size": 128}
    coupled = dataclasses.replace(load_recipe("tiny-khop"), model=model, loops=loops, **task)
    fixed = dataclasses.replace(coupled, loops=LoopsConfig("fixed", TRAINED))
    base100 = dataclasses.replace(coupled, model=dataclasses.replace(model, rope_theta=100.0))
    return {
        "coupled": coupled,
        "base100": base100,
        "fixed": fixed,
        "deep": plain(fixed, TRAINED),
        "small": plain(fixed, 1),
    }


def measure(run: Run) -> Result:
    """Return the accuracy by bits and loops, on the same bits for all arms; a plain model has one column."""
    batch = Parity(FARTHEST).batch(stream(run.seed, 0, Purpose.VALIDATION), run.settings["rows"])
    share = right_by_loop(run.model, batch, FARTHEST)[:, :, 1:].double().mean(1)
    return {"accuracy": [[round(x, 4) for x in by_loops] for by_loops in share.T.tolist()]}


def by_bits(r: Results, arm: str, loops: Loops) -> np.ndarray:
    """Return (S, bits) the accuracy at the loops of each number of bits."""
    return np.stack([r[arm, "accuracy"].at(bits=n, loops=loops(n)).by_seed for n in BITS], axis=1)


def fill(r: Results) -> dict[str, Any]:
    """Return the numbers of each line, and what the grid of the looped model says."""
    lines: dict[str, Result] = {}
    for name, (arm, title, loops) in LINES.items():
        accuracy = by_bits(r, arm, loops)
        # The most bits up to which every length is solved, by seed.
        longest = Estimate((accuracy >= SOLVED).cumprod(1).sum(1), ".1f")
        by_seed = ", ".join(f"{n:.0f}" for n in longest.by_seed)
        at = {n: Estimate(accuracy[:, n - 1], ".2f") for n in BITS}
        lines[name] = r.arm(arm) | {"title": title, "at": at, "longest": longest, "by_seed": by_seed}
    grid, coupled = r["coupled", "accuracy"].values, lines["coupled"]
    inside = Estimate(by_bits(r, *LINES["coupled"][::2])[:, :TRAINED].min(1))
    past = Estimate(grid[:, :TRAINED, -1].min(1))
    half = r["coupled", "accuracy"].at(bits=TRAINED, loops=TRAINED // 2)
    bought = coupled["at"][2 * TRAINED] - lines["twelve"]["at"][2 * TRAINED]
    return {
        "lines": lines.values(),
        "rows": [{"bits": n} | {name: line["at"][n] for name, line in lines.items()} for n in LENGTHS],
        "coupled": coupled,
        "baselines": "; ".join(f"{line['title']} {line['longest']}" for line in [*lines.values()][2:]),
        "twice": coupled["at"][2 * TRAINED],
        "twice_side": coupled["at"][2 * TRAINED].side(CHANCE),
        "inside": inside,
        "past": past,
        "harm": "harm" if (past - inside).side(0) == "below" else "are not seen to harm",
        "half": half,
        "half_side": half.side(CHANCE),
        "bought": bought,
        "bought_side": bought.side(0),
    }


def draw_lines(r: Results, path: Path) -> None:
    text = "chance; longest in training"
    levels = [Curve((1, FARTHEST), (CHANCE, CHANCE), text, None), Curve((TRAINED, TRAINED), (0, 1), text, None)]
    # Six lines, as the figure has six colours.
    drawn = [line for name, line in LINES.items() if name != "base100"]
    curves = [curve(BITS, [*map(Estimate, by_bits(r, arm, loops).T)], title) for arm, title, loops in drawn]
    panels = {"trained with loops = bits": levels + curves[:2], "the baselines": levels + curves[2:]}
    draw_curves(panels, path, ("bits", "accuracy"), shares=True)


def draw_grid(r: Results, path: Path) -> None:
    cells = [[r["coupled", "accuracy"].at(bits=n, loops=k).mean for k in LOOPS] for n in LENGTHS]
    heat_map(cells, LENGTHS, LOOPS, path, f"Accuracy; trained on 1 to {TRAINED} bits", "bits")


STUDY = Study(
    title="Parity: more bits than in training",
    question="With as many loops as bits, does a looped model answer longer rows than it was trained on?",
    page=Path(__file__).with_suffix(".md"),
    cost=("2 min", "20 min"),
    arms=arms,
    settings=lambda config, quick: {"rows": 200 if quick else 1000, "far": FARTHEST},
    measure=measure,
    axes={"accuracy": {"bits": BITS, "loops": BITS}},
    fill=fill,
    figures={"parity": draw_lines, "grid": draw_grid},
)
