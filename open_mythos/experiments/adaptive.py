"""Do tokens that may leave the loop early leave it where more loops would not have helped?

Shapes: B rows, T tokens, S seeds, W windows.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_mythos.analysis.per_loop import by_loop
from open_mythos.experiments.given_depths import shuffled, with_exits
from open_mythos.experiments.study import Result, Results, Run, Study, curve
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
    return {ARM: dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **SMALL), steps=30) if quick else cfg}


def measure(run: Run) -> Result:
    """Measure bits by window at every depth, with every rule and its control, and by group of tokens."""
    model = run.model
    # The windows come from a stream of their own, and from held-out text, which starts after that of training.
    batch = run.config.data.validation_batch(stream(run.seed, 1, Purpose.VALIDATION), run.settings["rows"])
    loops = range(1, model.cfg.max_loop_iters + 1)
    by_depth = by_loop(model, batch, loops, token_bits, CHUNK)
    exits, groups = [], {}
    for rule, threshold in ((name, at) for name, thresholds in run.settings["rules"].items() for at in thresholds):
        bits, used = with_exits(model, batch, model.exit_rule(rule, threshold), token_bits, rows=CHUNK)
        controls = [
            with_exits(model, batch, shuffled(used, seed), token_bits, rows=CHUNK)[0]
            for seed in range(run.settings["shuffles"])
        ]
        exits.append(
            {
                "rule": rule,
                "threshold": threshold,
                "loops": used.double().mean().item(),
                "bits": _windows(bits),
                "shuffled": [_windows(x) for x in controls],
                "tokens_by_loops": torch.bincount(used.flatten(), minlength=len(loops) + 1)[1:].tolist(),
            }
        )
        if (rule, threshold) == SHOWN:
            groups["by_exit"] = _groups(by_depth, bits, used, used)
            groups["by_kind"] = _groups(by_depth, bits, used, kinds(batch))
    train_ce = read_metrics(run.folder / "metrics.jsonl")[-1]["train/ce"]
    fixed = [_windows(x) for x in by_depth]
    return {"train_ce": train_ce, "tokens": batch.labels.numel(), "fixed": fixed, "exits": exits, **groups}


def _windows(bits: Tensor) -> list[float]:
    return bits.double().mean(1).tolist()


def _groups(by_depth: Tensor, bits: Tensor, loops: Tensor, key: Tensor) -> list[Result]:
    """Summarise tokens by `key`: their number, their loops and bits with exits, and their bits at every depth."""
    return [
        {
            "key": value,
            "tokens": int(here.sum()),
            "loops": loops[here].double().mean().item(),
            "bits": bits[here].double().mean().item(),
            "bits_by_depth": by_depth[:, here].double().mean(1).tolist(),
        }
        for value in key.unique().tolist()
        for here in [key == value]
    ]


def points(r: Results) -> list[dict[str, Any]]:
    """Return a row for every rule and threshold, its numbers of bits over seeds and windows, (S, W)."""
    rows = []
    for exits in zip(*(run["exits"] for run in r.runs[ARM]), strict=True):
        loops, bits, control, tokens = (
            np.array([found[name] for found in exits]) for name in ("loops", "bits", "shuffled", "tokens_by_loops")
        )
        # One depth for all at the same mean loops, window by window; between whole numbers a mix of two depths.
        same = [
            [np.interp(n, range(1, len(run["fixed"]) + 1), window) for window in zip(*run["fixed"], strict=True)]
            for n, run in zip(loops, r.runs[ARM], strict=True)
        ]
        estimates = {"bits": bits, "same": same, "shuffled": control.mean(1)}
        estimates = {name: TextEstimate(x) for name, x in estimates.items()}
        rows.append(
            estimates
            | {"rule": exits[0]["rule"], "threshold": exits[0]["threshold"], "loops": loops.mean()}
            | {"against": estimates["same"] - estimates["bits"], "gain": estimates["shuffled"] - estimates["bits"]}
            | {"tokens": ", ".join(map(str, tokens.sum(0)))}
        )
    return rows


def by_rule(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Sort `points` by rule."""
    return {rule: [row for row in found if row["rule"] == rule] for rule in dict.fromkeys(row["rule"] for row in found)}


def fill(r: Results) -> dict[str, Any]:
    """Return the rows by rule and threshold, what each rule's exits are worth, and the groups of tokens."""
    runs, found = r.runs[ARM], points(r)
    fixed = np.array([run["fixed"] for run in runs])
    spread = [row["shuffled"].mean - row["same"].mean for row in found]
    said = []
    for rule, own in by_rule(found).items():
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
    for rule, rows in by_rule(points(r)).items():
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
    curves = [
        curve([row["loops"] for row in rows], [row["gain"] for row in rows], rule)
        for rule, rows in by_rule(found).items()
    ]
    loops = [row["loops"] for row in found]
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
