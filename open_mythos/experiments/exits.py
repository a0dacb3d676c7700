"""Does depth follow difficulty? Accuracy against mean loops for every halting rule, an oracle, and learned halting.

Shapes: B rows, T tokens, D width, L loops.
"""

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_mythos.analysis.per_loop import right_by_loop, settled
from open_mythos.experiments.adaptive import GivenDepths, shuffled
from open_mythos.experiments.brackets import LENGTH
from open_mythos.experiments.brackets import arms as bracket_arms
from open_mythos.experiments.exits_report import END_ONLY, exits_report
from open_mythos.experiments.study import Experiment, Lab, Result, seeded
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.halting import ACT, ACTHalting, Decision, HaltingRule, State
from open_mythos.recipes import load_recipe
from open_mythos.reports.stats import rank_correlation
from open_mythos.tasks import Addition, Brackets, KHop
from open_mythos.tasks.addition import PLUS
from open_mythos.tasks.brackets import END, first_break, nesting
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE, Batch
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.losses import LossConfig

Task = KHop | Addition | Brackets

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


class GivenDepthsACT(ACT):
    """ACT's weights, at depths given from outside, (B, T) int64: the null control's of learned halting."""

    def __init__(self, act: ACTHalting, depths: Tensor) -> None:
        super().__init__(act, 1.0)
        self.depths = depths

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        return {**super().init(h, n_loops), "depth": self.depths.to(h.device)}

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        after, _ = super().update(state, h_prev, h, loop_index)
        return {**state, **after}, (loop_index + 1)[:, None] >= state["depth"]


def arms(quick: bool) -> dict[str, TrainConfig]:
    """What is trained: each task's recipe, and the same with learned halting, without and with a ponder cost."""
    khop, addition = load_recipe("tiny-khop"), load_recipe("tiny-addition")
    bases = {
        "khop": dataclasses.replace(
            khop,
            steps=200 if quick else khop.steps,
            loops=dataclasses.replace(khop.loops, ramp_steps=50 if quick else 150),
        ),
        "addition": dataclasses.replace(addition, steps=60 if quick else addition.steps),
        "brackets": bracket_arms(quick)["sampled"],
    }
    found = {}
    for task, base in bases.items():
        base = dataclasses.replace(base, eval=dataclasses.replace(base.eval, every=0))
        found[f"{task}, rules"] = base
        # One loss at the end, and one cap for all rows: how deep a token goes is for the model to say.
        data = dataclasses.replace(base.data, target="root") if isinstance(base.data, KHop) else base.data
        if data != base.data:
            found[f"{task}, rules, {END_ONLY}"] = dataclasses.replace(base, data=data, losses=LossConfig())
        for ponder in (0.0, PONDER):
            found[f"{task}, ACT, ponder {ponder:g}"] = dataclasses.replace(
                base,
                model=dataclasses.replace(base.model, halting="act", max_loop_iters=ACT_LOOPS),
                data=data,
                loops=LoopsConfig("fixed", ACT_LOOPS, max_loops=ACT_LOOPS, ramp_steps=base.steps // 4),
                losses=LossConfig(ponder=ponder),
            )
    return found


def questions(task: Task, rows: int, seed: int) -> tuple[Batch, Tensor, Tensor]:
    """Fresh questions, how hard each token is, and where it stands, (B, T) int64 both.

    Hard: hops to the answer, carries on the way (see `carries`), or the nesting of a string that breaks. Where: tokens
    of one value differ in nothing that a rule might go by without solving; those of brackets have one answer too.
    """
    rng = stream(seed, 0, Purpose.VALIDATION)
    if isinstance(task, Brackets):
        strings, lengths = dataclasses.replace(task, min_length=task.max_length).draw(rng, rows)
        batch = task.encode(strings, lengths)
        deep, broken = nesting(strings, lengths), first_break(strings, lengths)
        # Balanced strings have an answer that needs no reading; the replaced bracket makes a few of other nesting.
        deep = np.where((broken < 0) | (deep > task.max_nesting) | (deep < 1), -1, deep)
        at = torch.arange(task.seq_len)
        hard = torch.from_numpy(deep)[:, None].expand_as(batch.labels).masked_fill(batch.labels == END, -1)
        return batch, hard, 100 * torch.from_numpy(broken)[:, None] + at
    if isinstance(task, Addition):
        batch = task.validation_batch(rng, rows)
        digits = (batch.input_ids == PLUS).int().argmax(1)
        return batch, carries(batch.input_ids), 100 * digits[:, None] + torch.arange(task.seq_len)
    parts = []
    for distance in DISTANCES:
        asked = dataclasses.replace(task, target="root", min_distance=distance, max_distance=distance)
        parts.append(asked.batch(rng, rows // len(DISTANCES)))
    ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("input_ids", "labels"))
    distance = torch.arange(DISTANCES[0], DISTANCES[-1] + 1).repeat_interleave(rows // len(DISTANCES))
    return Batch(ids, labels), distance[:, None].expand_as(ids).contiguous(), torch.zeros_like(ids)


def carries(ids: Tensor) -> Tensor:
    """For "A+B=R" with R reversed: at each token that predicts a digit of R the carries in a row that end there.

    -1 where no digit is predicted: the end is known by its place, and is no easy digit.
    """
    found = torch.full_like(ids, -1)
    for row, text in zip(found, ids.tolist(), strict=True):
        d = text.index(PLUS)
        a, b = text[:d][::-1], text[d + 1 : 2 * d + 1][::-1]
        chain, carry = 0, 0
        for place in range(d):
            row[2 * d + 1 + place] = chain
            carry = int(a[place] + b[place] + carry > 9)
            chain = chain + 1 if carry else 0
        if carry:
            row[3 * d + 1] = chain
    return found


def answered(model: OpenMythos, batch: Batch, rule: HaltingRule | None, n_loops: int) -> tuple[Tensor, Tensor]:
    """(B, T) whether each token is right, and the loops that it ran."""
    with evaluating(model):
        out = model(batch.input_ids, n_loops, exit=rule, trace=True)
    return out.logits.argmax(-1) == batch.labels, out.exit_loop + 1


def measure(model: OpenMythos, task: Task, n_loops: int, rows: int, seed: int) -> Result:
    """Accuracy and loops of the labelled tokens: at fixed depth, by the oracles, and by every rule and threshold."""
    batch, difficulty, place = questions(task, rows, seed)
    asked = batch.labels != IGNORE
    graded = asked & (difficulty >= 0)
    hard, where = difficulty[graded], place[graded].tolist()
    right = right_by_loop(model, batch, n_loops)
    act = None if model.recurrent is None else model.recurrent.act

    def dealt(depths: Tensor) -> HaltingRule:
        return GivenDepths(depths) if act is None else GivenDepthsACT(act, depths)

    def point(name: str, threshold: float | None, rule: HaltingRule) -> Result:
        hit, loops = answered(model, batch, rule, n_loops)
        other = loops.clone()
        other[asked] = shuffled(loops[asked], seed)
        control = answered(model, batch, dealt(other), n_loops)[0]
        used, dealt_to = loops[graded].tolist(), other[graded].tolist()
        return {
            "rule": name,
            "threshold": threshold,
            "loops": loops[asked].double().mean().item(),
            "loops_of_all_tokens": loops.double().mean().item(),
            "accuracy": hit[asked].double().mean().item(),
            "shuffled": control[asked].double().mean().item(),
            "rho": rank_correlation(used, hard.tolist(), where),
            "rho_of_any_place": rank_correlation(used, hard.tolist()),
            "shuffled_rho": rank_correlation(dealt_to, hard.tolist(), where),
            "by_difficulty": _by(hard, loops[graded]),
            "accuracy_by_difficulty": _by(hard, hit[graded]),
        }

    points = []
    if act is None:
        # What is never right gets 1, which costs the least.
        stays = torch.from_numpy(settled(right[:, asked].numpy())).clamp(min=1)
        first = right[:, asked].int().argmax(0) + 1
        for name, chosen in (("oracle, stays right", stays), ("oracle, first right", first)):
            depths = torch.full_like(batch.labels, n_loops)
            depths[asked] = chosen
            points.append(point(name, None, GivenDepths(depths)))
    for name, thresholds in (THRESHOLDS if act is None else {"act": ACT_THRESHOLDS}).items():
        for threshold in thresholds:
            rule = model.exit_rule(name, threshold)
            assert rule is not None
            points.append(point(name, threshold, rule))
    return {
        "fixed": right[:, asked].double().mean(1).tolist(),
        "commonest": (batch.labels[asked].bincount().max() / asked.sum()).item(),
        "points": points,
    }


def _by(hard: Tensor, values: Tensor) -> dict[str, float]:
    return {str(level): values[hard == level].double().mean().item() for level in hard.unique().tolist()}


def run(lab: Lab) -> Result:
    rows = 400 if lab.quick else 1000
    results: dict[str, list[Any]] = {name: [] for name in arms(lab.quick)}
    for seed in lab.seeds:
        for name, cfg in arms(lab.quick).items():
            assert isinstance(cfg.data, Task)
            found = partial(measure, task=cfg.data, n_loops=DEEPEST, rows=rows, seed=seed + 1_000_000)
            label = f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
            asked = {
                "rows": rows,
                "loops": DEEPEST,
                "distances": [*DISTANCES],
                "thresholds": [THRESHOLDS, ACT_THRESHOLDS],
            }
            results[name].append(lab.measured(label, seeded(cfg, seed), found, **asked))
    return results


EXPERIMENT = Experiment(
    title="Does depth follow difficulty?",
    question="When a rule or a learned halting decides how many loops an answer gets, do the hard ones get more, and "
    "what does that buy over one depth for all?",
    protocol=f"""Three tasks whose difficulty is known, up to {DEEPEST} loops: `khop` (questions {DISTANCES[0]} to
{DISTANCES[-1]} hops from their answer, trained on 1 to 4), `addition` (2 and 3 digits, each digit of the answer by
itself) and `brackets` (where a string of {LENGTH} breaks, each digit of the place by itself; half of the strings are
balanced). For each seed three models a task: the recipe `tiny-khop` or `tiny-addition`, or the model of sampled depth
of the experiment `brackets`, on which the rules that need no training are swept over thresholds, and the same with
ACT, trained at up to {ACT_LOOPS} loops without a ponder cost and with {PONDER:g}. With ACT khop has the root after the
last loop as its only label, for losses after every loop need a last state; what that label does to the rules is told
by a fourth model, the recipe with it (*{END_ONLY}*).

Every token of a row follows the rule, the prompt's too; accuracy and loops are of the labelled ones. Oracles know the
answers: an answer gets the loops after which it stays right, or the fewest after which it is right (1 if never); the
prompt gets all. Correlations are among the answers of one place and number of digits, and the end of a sum, which has
no carries to wait for, is left out: else a rule that knew the place alone, and nothing of carries, would reach 0.7. So
with brackets: among digits of one place, of strings that break at the same place; balanced strings and the end are left
out.
Baseline: every token at the same depth. Null control: the depths of the same answers in the same numbers, dealt to
other answers at random.""",
    cost=("4 min", "80 min"),
    run=run,
    report=exits_report,
    n_parts=lambda lab: len(arms(lab.quick)) * len(lab.seeds),
)
