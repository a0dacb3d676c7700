"""Do tokens that may leave the loop early leave it where more loops would not have helped?

Shapes: B rows, T tokens, S seeds, W windows.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_mythos.analysis.per_loop import by_loop
from open_mythos.experiments.study import Result, Results, Run, Study
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.halting import ACT, Decision, HaltingRule, State
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


class GivenDepths(HaltingRule):
    """Exits after depths given from outside, (B, T) int64, for null controls; `act` gives the states its weights."""

    def __init__(self, depths: Tensor, act: ACT | None = None) -> None:
        super().__init__(0.0)
        self.depths, self.act, self.weighted = depths, act, act is not None

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        return {"depth": self.depths.to(h.device)} | (self.act.init(h, n_loops) if self.act else {})

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        after = self.act.update(state, h_prev, h, loop_index)[0] if self.act else {}
        return {**state, **after}, (loop_index + 1)[:, None] >= state["depth"]

    def weigh(self, before: State, after: State, exit_mask: Tensor) -> Tensor:
        assert self.act is not None
        return self.act.weigh(before, after, exit_mask)


def shuffled(depths: Tensor, seed: int) -> Tensor:
    """Give the same depths, in the same numbers, to other tokens."""
    order = torch.randperm(depths.numel(), generator=torch.Generator().manual_seed(seed))
    return depths.flatten()[order].view_as(depths)


def with_rule(model: OpenMythos, batch: Batch, rule: Callable[[slice], HaltingRule | None]) -> tuple[Tensor, Tensor]:
    """Return the bits of every token and the loops that it ran, (B, T) each, when it exits by the rule for its rows."""
    found = []
    with evaluating(model):
        for start in range(0, len(batch.labels), CHUNK):
            rows = slice(start, start + CHUNK)
            out = model(batch.input_ids[rows], exit=rule(rows), trace=True)
            found.append((token_bits(out.logits, batch.labels[rows]), out.exit_loop + 1))
    bits, loops = map(torch.cat, zip(*found, strict=True))
    return bits, loops


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
    for rule, thresholds in run.settings["rules"].items():
        for threshold in thresholds:
            bits, used = with_rule(model, batch, lambda _, name=rule, at=threshold: model.exit_rule(name, at))
            controls = [shuffled(used, seed) for seed in range(run.settings["shuffles"])]
            others = [with_rule(model, batch, lambda rows, d=depths: GivenDepths(d[rows]))[0] for depths in controls]
            exits.append(
                {
                    "rule": rule,
                    "threshold": threshold,
                    "loops": used.double().mean().item(),
                    "bits": _windows(bits),
                    "shuffled": [_windows(x) for x in others],
                    "tokens_by_loops": torch.bincount(used.flatten(), minlength=len(loops) + 1)[1:].tolist(),
                }
            )
            if (rule, threshold) == SHOWN:
                groups["by_exit"] = _groups(by_depth, bits, used, used, loops)
                groups["by_kind"] = _groups(by_depth, bits, used, kinds(batch), range(len(KINDS)))
    train_ce = read_metrics(run.lab.runs / run.label / "metrics.jsonl")[-1]["train/ce"]
    fixed = [_windows(x) for x in by_depth]
    return {"train_ce": train_ce, "tokens": batch.labels.numel(), "fixed": fixed, "exits": exits, **groups}


def _windows(bits: Tensor) -> list[float]:
    return bits.double().mean(1).tolist()


def _groups(by_depth: Tensor, bits: Tensor, loops: Tensor, key: Tensor, values: Iterable[int]) -> list[Result]:
    """Summarise tokens by `key`: their number, their loops and bits with exits, and their bits at every depth."""
    return [
        {
            "key": value,
            "tokens": int(here.sum()),
            "loops": loops[here].double().mean().item(),
            "bits": bits[here].double().mean().item(),
            "bits_by_depth": by_depth[:, here].double().mean(1).tolist(),
        }
        for value in values
        for here in [key == value]
        if here.any()
    ]


def points(r: Results) -> list[dict[str, Any]]:
    """Return a row for every rule and threshold, its numbers of bits over seeds and windows, (S, W)."""
    runs, rows = r.runs[ARM], []
    for exits in zip(*(run["exits"] for run in runs), strict=True):
        bits, control = np.array([e["bits"] for e in exits]), np.array([e["shuffled"] for e in exits]).mean(1)
        # One depth for all at the same mean loops, window by window; between whole numbers a mix of two depths.
        depths = range(1, len(runs[0]["fixed"]) + 1)
        same = [
            [np.interp(e["loops"], depths, window) for window in zip(*run["fixed"], strict=True)]
            for e, run in zip(exits, runs, strict=True)
        ]
        gain = TextEstimate(control - bits)
        rows.append(
            {
                "rule": exits[0]["rule"],
                "threshold": exits[0]["threshold"],
                "loops": np.mean([e["loops"] for e in exits]),
                "bits": TextEstimate(bits),
                "same": TextEstimate(same),
                "shuffled": TextEstimate(control),
                "against": TextEstimate(same - bits),
                "gain": gain,
                "between": gain.between("+.4f"),
                "verdict": gain.verdict(),
                "tokens": ", ".join(map(str, np.sum([e["tokens_by_loops"] for e in exits], axis=0))),
            }
        )
    return rows


def fill(r: Results) -> dict[str, Any]:
    """Return the rows by rule and threshold, what each rule's exits are worth, and the groups of tokens."""
    runs, found = r.runs[ARM], points(r)
    first, fixed = runs[0], np.array([run["fixed"] for run in runs])
    spread = [row["shuffled"].mean - row["same"].mean for row in found]
    said = []
    for rule in dict.fromkeys(row["rule"] for row in found):
        own = [row for row in found if row["rule"] == rule]
        gain, same = (Counter(row[key].verdict() for row in own) for key in ("gain", "against"))
        against = [row["against"].mean for row in own]
        said.append(
            f"Exits by {rule}, {len(own)} thresholds: {gain['higher']} predict text better than the same depths at "
            f"random tokens ({gain['lower']} worse), {same['higher']} better than one depth for all "
            f"({same['lower']} worse; {min(against):+.4f} to {max(against):+.4f} bits per byte)."
        )
    groups = {
        name: [
            group
            | {"name": KINDS[group["key"]] if name == "by_kind" else group["key"]}
            | {"two": group["bits_by_depth"][1], "deepest": group["bits_by_depth"][-1]}
            | {"worth": group["bits_by_depth"][1] - group["bits_by_depth"][-1]}
            for group in first[name]
        ]
        for name in ("by_exit", "by_kind")
    }
    return groups | {
        "arm": r.arm(ARM),
        "exits": found,
        "deepest": fixed.shape[1],
        "n_windows": fixed.shape[2],
        "n_tokens": first["tokens"],
        "train_ce": ", ".join(f"{run['train_ce']:.2f}" for run in runs),
        "fixed": Table(
            ["loops", *map(str, range(1, fixed.shape[1] + 1))],
            [["bits per byte", *(f"{x:.3f}" for x in fixed.mean((0, 2)))]],
        ),
        "spread": f"{min(spread):+.4f} to {max(spread):+.4f}",
        "shown": next(row for row in found if (row["rule"], row["threshold"]) == SHOWN),
        "clearest": max(found, key=lambda row: row["gain"].interval[1]),
        "said": " ".join([*said, *["One model only."] * (len(runs) == 1)]),
    }


def _curve(label: str, points: Iterable[tuple[float, TextEstimate]]) -> Curve:
    xs, ys, low, high = zip(*sorted((x, *estimate.interval) for x, estimate in points), strict=True)
    return Curve(xs, ys, label, 0, low, high)


def draw_cost(r: Results, path: Path) -> None:
    fixed = np.array([run["fixed"] for run in r.runs[ARM]])
    deepest = fixed[:, -1]
    costs = {"every token at the same depth": [(n, fixed[:, n - 1]) for n in range(1, fixed.shape[1])]}
    for row in points(r):
        for key, label in (("bits", f"exits by {row['rule']}"), ("shuffled", f"depths of {row['rule']}, shuffled")):
            costs.setdefault(label, []).append((row["loops"], row[key].by_seed))
    # A logarithmic axis has no place for what is not above zero.
    curves = [
        _curve(label, [(n, TextEstimate(bits - deepest)) for n, bits in found if bits.mean() > deepest.mean()])
        for label, found in costs.items()
    ]
    labels = ("mean loops per token", f"bits per byte above {fixed.shape[1]} loops, held out")
    draw_curves({"What fewer loops cost": curves}, path, labels, log="y")


def draw_gain(r: Results, path: Path) -> None:
    gains: dict[str, list[tuple[float, TextEstimate]]] = {}
    for row in points(r):
        gains.setdefault(row["rule"], []).append((row["loops"], row["gain"]))
    curves = [_curve(rule, found) for rule, found in gains.items()]
    loops = [n for found in gains.values() for n, _ in found]
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
