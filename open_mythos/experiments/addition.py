"""Addition: does a model that loops more often than it was trained to stay right, and what keeps it so?"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.accounting import count_parameters
from open_mythos.experiments.addition_report import report
from open_mythos.experiments.study import Experiment, Lab, Result, seeded
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.recipes import load_recipe
from open_mythos.tasks import Addition
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE, Batch
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.metrics import read_metrics

LOOPS = (1, 2, 4, 8, 16, 32)
COSINE_ROWS = 200
CHUNK = 250
PUBLISHED_STEPS = 3000


@dataclass(frozen=True)
class Arm:
    """A way of training."""

    title: str
    cfg: TrainConfig
    n_seeds: int | None = None
    """How many of the seeds it gets; None: all."""


def arms(quick: bool) -> dict[str, Arm]:
    """What is compared. The quick form has few steps: enough to see everything work."""
    recipe = load_recipe("tiny-addition")
    steps = 150 if quick else recipe.steps
    sampled = dataclasses.replace(recipe, steps=steps, eval=EvalConfig(every=25, rows=512, loops=(4,)))
    deep_model = dataclasses.replace(sampled.model, max_loop_iters=16)
    deep = dataclasses.replace(
        sampled, model=deep_model, loops=LoopsConfig("poisson", 16, max_loops=32), steps=50 if quick else steps
    )
    four = dataclasses.replace(sampled, data=Addition(2, 4), steps=100 if quick else 2 * steps)
    return {
        "sampled": Arm("sampled depth, mean 4", sampled),
        "fixed": Arm("its twin at fixed depth 4", dataclasses.replace(sampled, loops=LoopsConfig("fixed", 4))),
        "published": Arm("published protocol, this size", published(100 if quick else PUBLISHED_STEPS)),
        "deep": Arm("sampled depth, mean 16", deep, n_seeds=1),
        "four": Arm("sampled depth, up to 4 digits", four, n_seeds=1),
    }


def published(steps: int) -> TrainConfig:
    """The recipe `addition-dgx` at half its width, on 2 and 3 digits; the warm-up keeps its share of the steps."""
    cfg = load_recipe("addition-dgx")
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, dim=128, n_heads=4, n_kv_heads=1, expert_dim=256),
        data=Addition(2, 3),
        steps=steps,
        schedule=dataclasses.replace(cfg.schedule, warmup_steps=cfg.schedule.warmup_steps * steps // cfg.steps),
        eval=EvalConfig(every=25 if steps < 500 else 100, rows=512, loops=(4,)),
    )


def run(lab: Lab) -> Result:
    """Every arm of every seed: accuracy and cosines by digits and loops, accuracy over training."""
    rows = 500 if lab.quick else 1000
    runs: dict[str, list[Result]] = {name: [] for name in arms(lab.quick)}
    for i, seed in enumerate(lab.seeds):
        for name, arm in arms(lab.quick).items():
            if arm.n_seeds is not None and i >= arm.n_seeds:
                continue
            label, cfg = f"{name}-{seed}", seeded(arm.cfg, seed)

            def measure(model: OpenMythos, label: str = label, cfg: TrainConfig = cfg) -> Result:
                return measured(model, cfg, rows) | {"curve": curve(lab, label)}

            runs[name].append(lab.measured(label, cfg, measure, loops=LOOPS, rows=rows) | {"seed": seed})
    described = {
        name: {"title": arm.title, "parameters": count_parameters(arm.cfg.model).total}
        for name, arm in arms(lab.quick).items()
    }
    return {"loops": LOOPS, "rows": rows, "cosine_rows": COSINE_ROWS, "arms": described, "runs": runs}


def measured(model: OpenMythos, cfg: TrainConfig, rows: int) -> Result:
    """By digits: share of fresh problems that greedy decoding gets right and loops used, both by loops allowed; and
    cosines of consecutive states by loop. All arms of a seed answer the same problems.
    """
    task = cfg.data
    assert isinstance(task, Addition)
    found: Result = {"accuracy": {}, "used": {}, "cosine": {}}
    for digits in range(task.min_digits, task.max_digits + 1):
        batch = Addition(digits, digits).batch(stream(cfg.seed, digits, Purpose.VALIDATION), rows)
        found["accuracy"][digits], found["used"][digits] = by_loops(model, batch, LOOPS)
        found["cosine"][digits] = cosines(model, batch.take(slice(COSINE_ROWS)), max(LOOPS))
    return found


def by_loops(model: OpenMythos, batch: Batch, loops: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """Share of rows with every label right, and mean loops that the tokens of the answer used, by loops allowed.

    A row is right exactly when greedy decoding would write it: see `train.evaluate.Score`.
    """
    right, used = torch.zeros(2, len(loops), dtype=torch.float64)
    with evaluating(model):
        for part in _parts(batch):
            labelled = part.labels != IGNORE
            for i, (logits, n_used) in enumerate(_outputs(model, part.input_ids, loops)):
                right[i] += ((logits.argmax(-1) == part.labels) | ~labelled).all(-1).sum()
                used[i] += n_used[labelled].sum()
    return (right / len(batch.labels)).tolist(), (used / (batch.labels != IGNORE).sum()).tolist()


def _outputs(model: OpenMythos, ids: Tensor, loops: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    if model.cfg.halting != "none":
        for n in loops:
            trace = model(ids, n, trace=True)
            yield trace.logits, trace.exit_loop + 1
        return
    # One pass of the deepest call serves all: its state after loop n is the last state of a call with n loops.
    hidden = model(ids, max(loops), trace=True).hidden
    view = model.make_view((ids.shape[0], ids.shape[1]))
    for n in loops:
        yield model.readout(hidden[n - 1], view), torch.full_like(ids, n)


def cosines(model: OpenMythos, batch: Batch, n_loops: int) -> list[float | None]:
    """Mean cosine of the states after loops t and t - 1, t from 1, where the answer is predicted; no token halts.

    None where the state before the first loop is zero, which has no direction.
    """
    with evaluating(model):
        ids = batch.input_ids
        hidden = model(ids, n_loops, exit="fixed", trace=True).hidden
        if model.cfg.initial_state == "e":
            first = model.encode(ids, model.make_view((ids.shape[0], ids.shape[1])))
            hidden = torch.cat([first[None], hidden])
        states = hidden[:, batch.labels != IGNORE]
        values = F.cosine_similarity(states[1:], states[:-1], dim=-1).mean(-1).tolist()
    return [None] * (n_loops - len(values)) + values


def curve(lab: Lab, label: str) -> list[tuple[int, float]]:
    """(steps done, exact match at 4 loops) over training."""
    lines = read_metrics(lab.runs / label / "metrics.jsonl")
    return [(int(line["step"]), line["val/accuracy@4"]) for line in lines if "val/accuracy@4" in line]


def _parts(batch: Batch) -> Iterator[Batch]:
    return (batch.take(slice(i, i + CHUNK)) for i in range(0, len(batch.labels), CHUNK))


PROTOCOL = """\
Task: `A+B=R$`, both operands of the same number of digits d, d uniform, R the sum with its digits reversed; the loss is
on R and `$`. Measured: exact match of greedy decoding on fresh problems, by digits and by loops allowed (1 to 32);
cosine of consecutive states; exact match at 4 loops over training. The arms, all of width 128:

- **sampled depth, mean 4**: the recipe `tiny-addition`. Each row loops 1 + Poisson(3) times, at most 12; the answer is
  read off the last state.
- **its twin at fixed depth 4**: nothing else differs, the order of the data included.
- **published protocol, this size**: the recipe `addition-dgx` at half its width, on 2 and 3 digits, 3,000 steps instead
  of 30,000: `lti` injection, ACT, depth LoRA, loop embedding, 4 experts (2 and a shared one run), AdamW at 3e-4 with
  warm-up and cosine, fixed depth 4. Its ACT is this project's: weights sum to 1, and a token that halts stays as it is.
  Beyond 4 loops its depth LoRA and loop embedding stay at their last index.
- **sampled depth, mean 16**, one seed: what more loops in training buy. 1 + Poisson(15) loops, at most 32.
- **sampled depth, up to 4 digits**, one seed: the recipe on 2 to 4 digits with twice the steps.

All arms of a seed answer the same problems. The control for sampled depth is the twin. The published figures beside
ours are of one model for 2 to 5 digits of twice the width.
"""
EXPERIMENT = Experiment(
    title="Addition: more loops than in training",
    question="Does a model that loops more often than it was trained to stay right, and what keeps it so?",
    protocol=PROTOCOL,
    cost=("3 min", "90 min"),
    run=run,
    report=report,
    n_parts=lambda lab: sum(min(len(lab.seeds), arm.n_seeds or len(lab.seeds)) for arm in arms(lab.quick).values()),
)
