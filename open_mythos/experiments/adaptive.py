"""Do tokens that may leave the loop early leave it where more loops would not have helped?"""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from open_mythos.accounting import count_parameters
from open_mythos.analysis.per_loop import by_loop
from open_mythos.experiments.adaptive_report import KINDS, SHOWN, adaptive_report
from open_mythos.experiments.study import Experiment, Lab, Result, seeded
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.halting import Decision, HaltingRule, State
from open_mythos.recipes import load_recipe
from open_mythos.reports.stats import token_bits
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import Batch
from open_mythos.train.config import TrainConfig
from open_mythos.train.metrics import read_metrics

RULES = {"kl": (0.001, 0.003, 0.01, 0.03, 0.1), "latent_diff": (0.05, 0.1, 0.2, 0.3, 0.4)}
"""Thresholds of each rule."""
SHUFFLES = 2
CHUNK = 4
"""Rows at a time."""
SMALL = {"dim": 64, "n_heads": 2, "n_kv_heads": 2, "kv_lora_rank": 32, "q_lora_rank": 32, "n_experts": 4}
"""What the quick form's model has in place of the recipe's."""


class Dealt(HaltingRule):
    """Depths given from outside, (B, T) int64: the null control's."""

    def __init__(self, depths: Tensor) -> None:
        super().__init__(0.0)
        self.depths = depths

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        return {"depth": self.depths.to(h.device)}

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        return state, (loop_index + 1)[:, None] >= state["depth"]


def shuffled(depths: Tensor, seed: int) -> Tensor:
    """The same depths in the same numbers, at other tokens."""
    order = torch.randperm(depths.numel(), generator=torch.Generator().manual_seed(seed))
    return depths.flatten()[order].view_as(depths)


def with_exits(model: OpenMythos, batch: Batch, rule: str, threshold: float) -> tuple[Tensor, Tensor]:
    """(B, T) bits of every token, and the loops it ran, when it leaves where the rule says so."""
    return _read(model, batch, lambda _: model.exit_rule(rule, threshold))


def at_depths(model: OpenMythos, batch: Batch, depths: Tensor) -> tuple[Tensor, Tensor]:
    """The same when every token leaves after the loops that `depths` (B, T) names."""
    return _read(model, batch, lambda rows: Dealt(depths[rows]))


def _read(model: OpenMythos, batch: Batch, rule: Callable[[slice], HaltingRule | None]) -> tuple[Tensor, Tensor]:
    bits, loops = [], []
    with evaluating(model):
        for start in range(0, len(batch.labels), CHUNK):
            rows = slice(start, start + CHUNK)
            out = model(batch.input_ids[rows], exit=rule(rows), trace=True)
            bits.append(token_bits(out.logits, batch.labels[rows]))
            loops.append(out.exit_loop + 1)
    return torch.cat(bits), torch.cat(loops)


def kinds(batch: Batch) -> Tensor:
    """(B, T) int64, which of KINDS the byte is that each token predicts; bytes beyond ASCII count as letters."""
    before, byte = _is_letter(batch.input_ids), _is_letter(batch.labels)
    blank = (batch.labels == ord(" ")) | (batch.labels == ord("\n"))
    kind = torch.full_like(batch.labels, 3)
    kind[byte & ~before], kind[byte & before], kind[blank] = 0, 1, 2
    return kind


def _is_letter(ids: Tensor) -> Tensor:
    lower = ids | 32
    return ((lower >= ord("a")) & (lower <= ord("z"))) | (ids >= 128)


def measure(model: OpenMythos, batch: Batch) -> Result:
    """Bits by window at every depth, by every rule and threshold, and by its control; and by group of tokens."""
    loops = range(1, model.cfg.max_loop_iters + 1)
    by_depth = by_loop(model, batch, loops, token_bits, CHUNK)
    exits, groups = [], {}
    for rule, thresholds in RULES.items():
        for threshold in thresholds:
            bits, used = with_exits(model, batch, rule, threshold)
            dealt = [at_depths(model, batch, shuffled(used, seed))[0] for seed in range(SHUFFLES)]
            exits.append(
                {
                    "rule": rule,
                    "threshold": threshold,
                    "loops": used.double().mean().item(),
                    "bits": _windows(bits),
                    "shuffled": [_windows(x) for x in dealt],
                    "tokens_by_loops": torch.bincount(used.flatten(), minlength=len(loops) + 1)[1:].tolist(),
                }
            )
            if (rule, threshold) == SHOWN:
                groups = {
                    "by_exit": _groups(by_depth, bits, used, used, loops),
                    "by_kind": _groups(by_depth, bits, used, kinds(batch), range(len(KINDS))),
                }
    return {
        "parameters": count_parameters(model.cfg).total,
        "tokens": batch.labels.numel(),
        "fixed": [_windows(x) for x in by_depth],
        "exits": exits,
        **groups,
    }


def _windows(bits: Tensor) -> list[float]:
    return bits.double().mean(1).tolist()


def _groups(by_depth: Tensor, bits: Tensor, loops: Tensor, key: Tensor, values: Iterable[int]) -> list[Result]:
    """Tokens by `key`: how many, their loops and bits with exits, and their bits at every depth."""
    groups = []
    for value in values:
        here = key == value
        if here.any():
            groups.append(
                {
                    "key": value,
                    "tokens": int(here.sum()),
                    "loops": loops[here].double().mean().item(),
                    "bits": bits[here].double().mean().item(),
                    "bits_by_depth": by_depth[:, here].double().mean(1).tolist(),
                }
            )
    return groups


def recipe(quick: bool) -> TrainConfig:
    """The recipe `adaptive-text`; for the quick form a small one with few steps."""
    cfg = load_recipe("adaptive-text")
    if not quick:
        return cfg
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **SMALL), steps=30)


def run(lab: Lab) -> Result:
    rows, runs = 8 if lab.quick else 32, []
    for seed in lab.seeds:
        cfg, label = seeded(recipe(lab.quick), seed), f"seed-{seed}"
        # Windows drawn from a stream of their own, none of them one of training's: those end before the held-out text.
        batch = cfg.data.validation_batch(stream(seed, 1, Purpose.VALIDATION), rows)

        def measured(model: OpenMythos, batch: Batch = batch, label: str = label) -> Result:
            train = read_metrics(lab.runs / label / "metrics.jsonl")[-1]["train/ce"]
            return {"train_ce": train} | measure(model, batch)

        runs.append(lab.measured(label, cfg, measured, rows=rows, rules=RULES, shuffles=SHUFFLES))
    return {"runs": runs}


EXPERIMENT = Experiment(
    title="Adaptive depth on text: what exits save, and whether they mean something",
    question="Do tokens that may leave the loop early leave it where more loops would not have helped?",
    protocol=f"""The recipe `adaptive-text`: every token at the same depth in training, the loss after the last loop. On
held-out text: bits per byte with every token at each depth, then with exits at several thresholds of two rules. Null
control: the same depths in the same numbers, dealt to the tokens at random, mean of {SHUFFLES} deals. Then what the
exits say: the bits that more loops save a token, and the loops that it takes, by exit and by the kind of byte it
predicts. The recipe takes long to train, so there is one seed: this is the model that the benchmark of exits runs, and
no claim about the quality of adaptive models beyond it.""",
    cost=("1 min", "27 min"),
    run=run,
    report=adaptive_report,
    n_parts=lambda lab: len(lab.seeds),
    seeds=(0,),
)
