"""Does depth follow difficulty? Accuracy against mean loops for every halting rule, an oracle, and learned halting.

Shapes: B rows, T tokens, D width, L loops.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from open_mythos.evaluating import evaluating
from open_mythos.experiments.adaptive import Dealt, shuffled
from open_mythos.experiments.exits_report import exits_report
from open_mythos.experiments.lab import Experiment, Lab, Result, seeded
from open_mythos.experiments.settling import rank_correlation, right_by_loop, settled
from open_mythos.model import OpenMythos
from open_mythos.nn.halting import ACT, ACTHalting, Decision, HaltingRule, State
from open_mythos.recipes import load_recipe
from open_mythos.train.config import TrainConfig
from open_mythos.train.data import IGNORE, Batch
from open_mythos.train.loops import LoopsConfig
from open_mythos.train.losses import LossConfig
from open_mythos.train.rng import Purpose, stream
from open_mythos.train.tasks import Addition, KHop
from open_mythos.train.tasks.addition import PLUS

THRESHOLDS = {
    "latent_diff": (0.03, 0.1, 0.2, 0.4, 0.8),
    "second_difference": (0.03, 0.1, 0.2, 0.4, 0.8),
    "kl": (1e-4, 1e-3, 1e-2, 0.1, 1.0),
}
ACT_THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.99)
PONDER = 0.01
ACT_LOOPS = 6
DEEPEST = 12
"""Loops of the evaluation."""
DISTANCES = range(1, 9)


class DealtACT(ACT):
    """ACT's weights, at depths given from outside, (B, T) int64: the null control's of learned halting."""

    def __init__(self, act: ACTHalting, depths: Tensor) -> None:
        super().__init__(act, 1.0)
        self.depths = depths

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        return {**super().init(h, n_loops), "depth": self.depths.to(h.device)}

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        before = state["sum"]
        after = (before + self.act(h)).clamp(max=1)
        exit_mask = self._exit((loop_index + 1)[:, None] >= state["depth"], loop_index, state["n_loops"])
        return {**state, "sum": after}, exit_mask, torch.where(exit_mask, 1 - before, after - before)


def arms(quick: bool) -> dict[str, TrainConfig]:
    """What is trained: each task's recipe, and the same with learned halting, without and with a ponder cost."""
    found = {}
    for task, steps in (("khop", 200), ("addition", 60)):
        base = load_recipe(f"tiny-{task}")
        base = dataclasses.replace(
            base,
            steps=steps if quick else base.steps,
            eval=dataclasses.replace(base.eval, every=0),
            loops=dataclasses.replace(base.loops, ramp_steps=steps // 4 if quick else 150)
            if task == "khop"
            else base.loops,
        )
        found[f"{task}, rules"] = base
        # One loss at the end, and one cap for all rows: how deep a token goes is for the model to say.
        data = dataclasses.replace(base.data, target="root") if task == "khop" else base.data
        for ponder in (0.0, PONDER):
            found[f"{task}, ACT, ponder {ponder:g}"] = dataclasses.replace(
                base,
                model=dataclasses.replace(base.model, halting="act", max_loop_iters=ACT_LOOPS),
                data=data,
                loops=LoopsConfig("fixed", ACT_LOOPS, max_loops=ACT_LOOPS, ramp_steps=base.steps // 4),
                losses=LossConfig(ponder=ponder),
            )
    return found


def questions(task: KHop | Addition, rows: int, seed: int) -> tuple[Batch, Tensor]:
    """Fresh questions, and how hard each labelled token is, (B, T) int64: hops to the answer, or carries on the way.

    A digit of a sum is as hard as the chain of carries that ends in it is long; 0: none arrives.
    """
    rng = stream(seed, 0, Purpose.VALIDATION)
    if isinstance(task, Addition):
        batch = task.validation_batch(rng, rows)
        return batch, carries(batch.input_ids)
    parts = []
    for distance in DISTANCES:
        asked = dataclasses.replace(task, target="root", min_distance=distance, max_distance=distance)
        parts.append(asked.batch(rng, rows // len(DISTANCES)))
    ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("input_ids", "labels"))
    distance = torch.arange(DISTANCES[0], DISTANCES[-1] + 1).repeat_interleave(rows // len(DISTANCES))
    return Batch(ids, labels), distance[:, None].expand_as(ids).contiguous()


def carries(ids: Tensor) -> Tensor:
    """For "A+B=R" with R reversed: at each token that predicts a digit of R the carries in a row that end there."""
    found = torch.zeros_like(ids)
    for row, text in zip(found, ids.tolist(), strict=True):
        d = text.index(PLUS)
        a, b = text[:d][::-1], text[d + 1 : 2 * d + 1][::-1]
        chain, carry = 0, 0
        for place in range(d + 1):
            row[2 * d + 1 + place] = chain
            if place < d:
                carry = int(a[place] + b[place] + carry > 9)
                chain = chain + 1 if carry else 0
    return found


def stays_right(right: Tensor) -> Tensor:
    """The loops after which an answer stays right, (L, ...) -> (...); 1 where it never does, which costs the least."""
    return torch.from_numpy(settled(right.numpy())).clamp(min=1)


def first_right(right: Tensor) -> Tensor:
    """The fewest loops after which an answer is right, (L, ...) -> (...); 1 where it never is."""
    return right.to(torch.uint8).argmax(0) + 1


def answered(model: OpenMythos, batch: Batch, rule: HaltingRule | None, n_loops: int) -> tuple[Tensor, Tensor]:
    """(B, T) whether each token is right, and the loops that it ran."""
    with evaluating(model):
        out = model(batch.input_ids, n_loops, exit=rule, trace=True)
    return out.logits.argmax(-1) == batch.labels, out.exit_loop + 1


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Rank correlation with ties at their mean rank; None where one of the two is constant."""
    rho = rank_correlation(x.tolist(), y.tolist())
    return None if math.isnan(rho) else rho


def measure(model: OpenMythos, task: KHop | Addition, n_loops: int, rows: int, seed: int) -> Result:
    """Accuracy and loops of the labelled tokens: at fixed depth, by the oracles, and by every rule and threshold."""
    batch, difficulty = questions(task, rows, seed)
    asked = batch.labels != IGNORE
    hard = difficulty[asked]
    right = right_by_loop(model, batch, n_loops)
    act = None if model.recurrent is None else model.recurrent.act

    def dealt(depths: Tensor) -> HaltingRule:
        return Dealt(depths) if act is None else DealtACT(act, depths)

    def point(name: str, threshold: float | None, rule: HaltingRule) -> Result:
        hit, loops = answered(model, batch, rule, n_loops)
        other = loops.clone()
        other[asked] = shuffled(loops[asked], seed)
        control = answered(model, batch, dealt(other), n_loops)[0]
        used = loops[asked]
        return {
            "rule": name,
            "threshold": threshold,
            "loops": used.double().mean().item(),
            "loops_of_all_tokens": loops.double().mean().item(),
            "accuracy": hit[asked].double().mean().item(),
            "shuffled": control[asked].double().mean().item(),
            "rho": spearman(used, hard),
            "shuffled_rho": spearman(other[asked], hard),
            "by_difficulty": _by(hard, used),
            "accuracy_by_difficulty": _by(hard, hit[asked]),
        }

    points = []
    if act is None:
        for name, choose in (("oracle, stays right", stays_right), ("oracle, first right", first_right)):
            depths = torch.full_like(batch.labels, n_loops)
            depths[asked] = choose(right)[asked]
            points.append(point(name, None, Dealt(depths)))
    for name, thresholds in (THRESHOLDS if act is None else {"act": ACT_THRESHOLDS}).items():
        for threshold in thresholds:
            rule = model.exit_rule(name, threshold)
            assert rule is not None
            points.append(point(name, threshold, rule))
    return {
        "fixed": right[:, asked].double().mean(1).tolist(),
        "fixed_by_difficulty": [_by(hard, hit[asked]) for hit in right],
        "commonest": (batch.labels[asked].bincount().max() / len(hard)).item(),
        "points": points,
    }


def _by(hard: Tensor, values: Tensor) -> dict[str, float]:
    return {str(level): values[hard == level].double().mean().item() for level in hard.unique().tolist()}


def run(lab: Lab) -> Result:
    rows = 400 if lab.quick else 1000
    results: dict[str, list[Any]] = {name: [] for name in arms(lab.quick)}
    for seed in lab.seeds:
        for name, cfg in arms(lab.quick).items():
            assert isinstance(cfg.data, KHop | Addition)
            found = partial(measure, task=cfg.data, n_loops=DEEPEST, rows=rows, seed=seed + 1_000_000)
            label = f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
            results[name].append(lab.measured(label, seeded(cfg, seed), found, rows=rows, loops=DEEPEST))
    return results


EXPERIMENT = Experiment(
    title="Does depth follow difficulty?",
    question="When a rule or a learned halting decides how many loops an answer gets, do the hard ones get more, and "
    "what does that buy over one depth for all?",
    protocol=f"""Two tasks whose difficulty is known, up to {DEEPEST} loops: `khop` (questions {DISTANCES[0]} to
{DISTANCES[-1]} hops from their answer, trained on 1 to 4) and `addition` (2 and 3 digits, each digit of the answer by
itself). For each seed three models a task: the recipe `tiny-khop` or `tiny-addition`, on which the rules that need no
training are swept over thresholds, and the same with ACT, trained at up to {ACT_LOOPS} loops without a ponder cost and
with {PONDER:g}. With ACT khop has the root after the last loop as its only label, for losses after every loop need a
last state.

Every token of a row follows the rule, the prompt's too; accuracy and loops are of the labelled ones. Oracles know the
answers: an answer gets the loops after which it stays right, or the fewest after which it is right (1 if never); the
prompt gets all. Baseline: every token at the same depth. Null control: the depths of the same answers in the same
numbers, dealt to other answers at random.""",
    cost=("3 min", "65 min (estimated from the quick form)"),
    run=run,
    report=exits_report,
)
