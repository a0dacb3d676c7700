"""Do tokens that may leave the loop early leave it where more loops would not have helped?

Shapes: B rows, T tokens, S seeds, W windows.
"""

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_mythos.analysis.per_loop import by_loop
from open_mythos.experiments.given_depths import shuffled, with_exits
from open_mythos.experiments.study import Result, Results, Run, Study, curve, vary
from open_mythos.recipes import load_recipe
from open_mythos.reports.document import Table
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import TextEstimate, token_bits
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import Batch
from open_mythos.train.config import TrainConfig
from open_mythos.train.metrics import read_metrics

RULES = {"kl": (0.001, 0.003, 0.01, 0.03, 0.1), "latent_diff": (0.05, 0.1, 0.2, 0.3, 0.4)}
"""Thresholds of each rule."""
SHOWN = ("kl", 0.01)
"""The rule and threshold of the tables by exit and by kind of byte."""
KINDS = ("first letter of a word", "later letter of a word", "space or line break", "anything else")
SHUFFLES = 2
CHUNK = 4
"""Rows of one call."""
ARM = "adaptive-text"
SMALL = {"dim": 64, "n_heads": 2, "n_kv_heads": 2, "kv_lora_rank": 32, "q_lora_rank": 32, "n_experts": 4}
"""Changes to the recipe's model for the quick form."""


def kinds(batch: Batch) -> Tensor:
    """Return the index in KINDS, (B, T), of the byte that each token predicts; bytes beyond ASCII count as letters."""

    def is_letter(ids: Tensor) -> Tensor:
        lower = ids | 32
        return ((lower >= ord("a")) & (lower <= ord("z"))) | (ids >= 128)

    before, byte = is_letter(batch.input_ids), is_letter(batch.labels)
    blank = (batch.labels == ord(" ")) | (batch.labels == ord("\n"))
    kind = torch.full_like(batch.labels, 3)
    kind[byte & ~before], kind[byte & before], kind[blank] = 0, 1, 2
    return kind


def arms(quick: bool) -> dict[str, TrainConfig]:
    """Return the recipe; for the quick form a small model with few steps."""
    cfg = load_recipe(ARM)
    return {ARM: vary(cfg, model=SMALL, steps=30) if quick else cfg}


def double_bits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the bits of every token in float64, for means over many."""
    return token_bits(logits, labels).double()


def measure(run: Run) -> Result:
    """Measure bits by window at every depth, with every rule and its control, and by group of tokens."""
    model = run.model
    # The windows come from a stream of their own, and from held-out text, which starts after that of training.
    batch = run.config.data.validation_batch(stream(run.seed, 1, Purpose.VALIDATION), run.settings["rows"])
    loops = range(1, model.cfg.max_loop_iters + 1)
    by_depth = by_loop(model, batch, loops, double_bits, CHUNK)
    scored = functools.partial(with_exits, model, batch, score=double_bits, rows=CHUNK)
    exits, groups = [], {}
    for rule, threshold in ((name, at) for name, thresholds in run.settings["rules"].items() for at in thresholds):
        bits, used = scored(model.exit_rule(rule, threshold))
        controls = [scored(shuffled(used, seed))[0] for seed in range(run.settings["shuffles"])]
        exits.append(
            {
                "rule": rule,
                "threshold": threshold,
                "loops": used.double().mean().item(),
                "bits": bits.mean(1).tolist(),
                "shuffled": [x.mean(1).tolist() for x in controls],
                "tokens_by_loops": torch.bincount(used.flatten(), minlength=len(loops) + 1)[1:].tolist(),
            }
        )
        if (rule, threshold) == SHOWN:
            groups["by_exit"] = _groups(by_depth, bits, used, used)
            groups["by_kind"] = _groups(by_depth, bits, used, kinds(batch))
    train_ce = read_metrics(run.folder / "metrics.jsonl")[-1]["train/ce"]
    fixed = by_depth.mean(2).tolist()
    return {"train_ce": train_ce, "tokens": batch.labels.numel(), "fixed": fixed, "exits": exits, **groups}


def _groups(by_depth: Tensor, bits: Tensor, loops: Tensor, key: Tensor) -> list[Result]:
    """Summarise tokens by `key`: their number, their loops and bits with exits, and their bits at every depth."""
    return [
        {
            "key": value,
            "tokens": int(here.sum()),
            "loops": loops[here].double().mean().item(),
            "bits": bits[here].mean().item(),
            "bits_by_depth": by_depth[:, here].mean(1).tolist(),
        }
        for value in key.unique().tolist()
        for here in [key == value]
    ]


def points(r: Results) -> dict[str, list[dict[str, Any]]]:
    """Return by rule a row for every threshold, its numbers of bits over seeds and windows, (S, W)."""
    fixed = np.array([run["fixed"] for run in r.runs[ARM]])
    rows: dict[str, list[dict[str, Any]]] = {}
    for exits in zip(*(run["exits"] for run in r.runs[ARM]), strict=True):
        loops, bits, control, tokens = (
            np.array([found[name] for found in exits]) for name in ("loops", "bits", "shuffled", "tokens_by_loops")
        )
        # One depth for all at the same mean loops, window by window; between whole numbers a mix of two depths.
        mix = np.maximum(0, 1 - np.abs(loops[:, None] - np.arange(1, fixed.shape[1] + 1)))
        same, chance = np.einsum("sl,slw->sw", mix, fixed), control.mean(1)
        each = {"bits": bits, "same": same, "shuffled": chance, "against": same - bits, "gain": chance - bits}
        rows.setdefault(exits[0]["rule"], []).append(
            {name: TextEstimate(x) for name, x in each.items()}
            | {"rule": exits[0]["rule"], "threshold": exits[0]["threshold"], "loops": loops.mean()}
            | {"tokens": ", ".join(map(str, tokens.sum(0)))}
        )
    return rows


def fill(r: Results) -> dict[str, Any]:
    """Return the rows by rule and threshold, what each rule's exits are worth, and the groups of tokens."""
    runs, rules = r.runs[ARM], points(r)
    found = [row for own in rules.values() for row in own]
    fixed = np.array([run["fixed"] for run in runs])
    spread = [row["shuffled"].mean - row["same"].mean for row in found]
    said = []
    for rule, own in rules.items():
        gain, same = (Counter(row[key].verdict for row in own) for key in ("gain", "against"))
        against = [row["against"].mean for row in own]
        said.append(
            f"Exits by {rule}, {len(own)} thresholds: {gain['higher']} predict text better than the same depths at "
            f"random tokens ({gain['lower']} worse), {same['higher']} better than one depth for all "
            f"({same['lower']} worse; {min(against):+.4f} to {max(against):+.4f} bits per byte)."
        )
    groups = {
        name: [
            group | {"name": names[group["key"]], "last": last, "worth": group["bits_by_depth"][1] - last}
            for group in runs[0][name]
            for last in group["bits_by_depth"][-1:]
        ]
        for name, names in (("by_exit", range(fixed.shape[1] + 1)), ("by_kind", KINDS))
    }
    return groups | {
        "arm": r.arm(ARM),
        "exits": found,
        "deepest": fixed.shape[1],
        "n_windows": fixed.shape[2],
        "train_ce": ", ".join(f"{run['train_ce']:.2f}" for run in runs),
        "fixed": Table(
            ["loops", *range(1, fixed.shape[1] + 1)], [["bits per byte", *(f"{x:.3f}" for x in fixed.mean((0, 2)))]]
        ),
        "spread": f"{min(spread):+.4f} to {max(spread):+.4f}",
        "shown": next(row for row in found if (row["rule"], row["threshold"]) == SHOWN),
        "clearest": max(found, key=lambda row: row["gain"].interval.low),
        "said": " ".join([*said, *["One model only."] * (len(runs) == 1)]),
    }


def draw_cost(r: Results, path: Path) -> None:
    *earlier, deepest = np.array([run["fixed"] for run in r.runs[ARM]]).swapaxes(0, 1)
    costs = {"every token at the same depth": {n: TextEstimate(bits) for n, bits in enumerate(earlier, 1)}}
    for rule, rows in points(r).items():
        costs[f"exits by {rule}"] = {row["loops"]: row["bits"] for row in rows}
        costs[f"depths of {rule}, shuffled"] = {row["loops"]: row["shuffled"] for row in rows}
    curves = []
    for label, bits in costs.items():
        # A logarithmic axis has no place for what is not above zero.
        above = {n: more for n, x in bits.items() if (more := x - TextEstimate(deepest)).mean > 0}
        curves.append(curve([*above], [*above.values()], label))
    labels = ("mean loops per token", f"bits per byte above {len(earlier) + 1} loops, held out")
    draw_curves({"What fewer loops cost": curves}, path, labels, log="y")


def draw_gain(r: Results, path: Path) -> None:
    found = points(r)
    curves = [curve([x["loops"] for x in rows], [x["gain"] for x in rows], rule) for rule, rows in found.items()]
    loops = [x["loops"] for rows in found.values() for x in rows]
    curves.append(Curve((min(loops), max(loops)), (0, 0), "at random tokens", None))
    labels = ("mean loops per token", "gain in bits per byte")
    draw_curves({"What the choice of tokens is worth": curves}, path, labels)


STUDY = Study(
    title="Adaptive depth on text: what exits save, and whether they mean something",
    question="Do tokens that may leave the loop early leave it where more loops would not have helped?",
    page=Path(__file__).with_suffix(".md"),
    cost=("1 min", "27 min"),
    arms=arms,
    settings=lambda cfg, quick: {"rows": 8 if quick else 32, "rules": RULES, "shuffles": SHUFFLES},
    measure=measure,
    fill=fill,
    figures={"exits": draw_cost, "gain": draw_gain},
    seeds=(0,),
)
