"""Do tokens that may leave the loop early leave it where more loops would not have helped?

    python -m open_mythos.experiments.adaptive --out docs/results/adaptive

Protocol: the recipe `adaptive-text`, one seed. On held-out text: bits per byte with every token at depths 1 to 8, then
with exits at several thresholds. Null control: the same depths in the same numbers, dealt out to the tokens at random.
Then what the exits say: the bits that more loops save a token, and the loops that it takes, by exit and by the kind of
byte it predicts.
"""

import json
import math
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from open_mythos.accounting import count_parameters
from open_mythos.evaluating import evaluating
from open_mythos.model import OpenMythos
from open_mythos.nn.halting import Decision, HaltingRule, State
from open_mythos.nn.numerics import wide
from open_mythos.plots import require_matplotlib, xy_curves
from open_mythos.recipes import load_recipe
from open_mythos.train.config import TrainConfig
from open_mythos.train.data import Batch
from open_mythos.train.metrics import read_metrics
from open_mythos.train.rng import Purpose, stream
from open_mythos.train.trainer import Trainer

RECIPE = "adaptive-text"
RULES = {"kl": (0.001, 0.003, 0.01, 0.03, 0.1), "latent_diff": (0.05, 0.1, 0.2, 0.3, 0.4)}
"""Thresholds of each rule."""
SHOWN = ("kl", 0.01)
"""The rule that the tables by exit and by kind of byte are about."""
SHUFFLES = 2
KINDS = ("first letter of a word", "later letter of a word", "space or line break", "anything else")


@dataclass(frozen=True)
class Reading:
    """What one pass over held-out text gave, by token."""

    bits: Tensor
    """(B, T), cross-entropy of the next byte."""
    loops: Tensor
    """(B, T) int64, loops run."""

    def mean(self) -> tuple[float, float]:
        """Mean loops, and bits per byte."""
        return self.loops.double().mean().item(), self.bits.double().mean().item()


class Dealt(HaltingRule):
    """Depths given from outside, (B, T) int64: the null control's."""

    def __init__(self, depths: Tensor) -> None:
        super().__init__(0.0)
        self.depths = depths

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        return {"n_loops": n_loops, "depth": self.depths.to(h.device)}

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        done = (loop_index + 1)[:, None] >= state["depth"]
        return state, self._exit(done, loop_index, state["n_loops"]), None


def by_depth(model: OpenMythos, batch: Batch) -> Tensor:
    """(L, B, T) bits of every token when all run 1 to L = `max_loop_iters` loops.

    One pass of the deepest call serves all: its state after loop n is the last state of a call with n loops.
    """
    chunks = []
    with evaluating(model):
        for ids, labels in _rows(batch):
            hidden = model(ids, exit="fixed", trace=True).hidden
            view = model.make_view((ids.shape[0], ids.shape[1]))
            chunks.append(torch.stack([_bits(model.readout(h, view), labels) for h in hidden]))
    return torch.cat(chunks, dim=1)


def with_exits(model: OpenMythos, batch: Batch, rule: str, threshold: float) -> Reading:
    """Every token leaves when the rule says so."""
    return _read(model, batch, lambda _: model.exit_rule(rule, threshold))


def at_depths(model: OpenMythos, batch: Batch, depths: Tensor) -> Reading:
    """Every token leaves after the loops that `depths` (B, T) names."""
    return _read(model, batch, lambda rows: Dealt(depths[rows]))


def shuffled(depths: Tensor, seed: int) -> Tensor:
    """The same depths in the same numbers, at other tokens."""
    order = torch.randperm(depths.numel(), generator=torch.Generator().manual_seed(seed))
    return depths.flatten()[order].view_as(depths)


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


def _read(model: OpenMythos, batch: Batch, rule: Callable[[slice], HaltingRule | None]) -> Reading:
    bits, loops, start = [], [], 0
    with evaluating(model):
        for ids, labels in _rows(batch):
            out = model(ids, exit=rule(slice(start, start + len(ids))), trace=True)
            bits.append(_bits(out.logits, labels))
            loops.append(out.exit_loop + 1)
            start += len(ids)
    return Reading(torch.cat(bits), torch.cat(loops))


def _rows(batch: Batch, n: int = 4) -> Any:
    return zip(batch.input_ids.split(n), batch.labels.split(n), strict=True)


def _bits(logits: Tensor, labels: Tensor) -> Tensor:
    nats = F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), reduction="none")
    return nats.view_as(labels) / math.log(2)


@dataclass
class Args:
    """Train the recipe `adaptive-text`, unless that is done, and record what its exits save and what they mean."""

    out: Path
    """Folder for results.json, exits.png and report.md."""
    run: Path = Path("runs/adaptive-text")
    """Folder of the run; one of the same configuration that is there already is not repeated."""
    rows: int = 32
    """Held-out windows of the evaluation."""
    threads: int = 1


def main(args: Args) -> None:
    require_matplotlib()
    torch.set_num_threads(args.threads)
    cfg = load_recipe(RECIPE)
    model = _trained(cfg, args)
    # Windows drawn from a stream of their own, none of them one of training's: those end before the held-out text.
    batch = cfg.data.validation_batch(stream(cfg.seed, 1, Purpose.VALIDATION), args.rows)
    results = measure(model, batch) | {
        "commit": _commit(),
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "tokens": batch.labels.numel(),
        "metrics": read_metrics(args.run / "metrics.jsonl"),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    _draw(results, args.out / "exits.png")
    (args.out / "report.md").write_text(_report(results, cfg, args))
    print(f"Wrote {args.out}/results.json, exits.png and report.md.")


def measure(model: OpenMythos, batch: Batch) -> dict[str, Any]:
    """Everything the report says, as numbers."""
    depth_bits = by_depth(model, batch)
    curve = depth_bits.double().mean((1, 2)).tolist()
    exits = []
    for rule, thresholds in RULES.items():
        for threshold in thresholds:
            reading = with_exits(model, batch, rule, threshold)
            control = [at_depths(model, batch, shuffled(reading.loops, seed)) for seed in range(SHUFFLES)]
            loops, bpb = reading.mean()
            # By window, so that the error of the difference is that of independent samples.
            gain = (torch.stack([c.bits for c in control]).mean(0) - reading.bits).double().mean(1)
            exits.append(
                {
                    "rule": rule,
                    "threshold": threshold,
                    "loops": loops,
                    "bpb": bpb,
                    "fixed_bpb": float(np.interp(loops, range(1, len(curve) + 1), curve)),
                    "shuffled_bpb": [c.mean()[1] for c in control],
                    "gain": gain.mean().item(),
                    "gain_error": (gain.std() / math.sqrt(len(gain))).item(),
                    "tokens_by_loops": torch.bincount(reading.loops.flatten(), minlength=len(curve) + 1)[1:].tolist(),
                }
            )
            if (rule, threshold) == SHOWN:
                shown = reading
    return {
        "fixed_bpb": curve,
        "exits": exits,
        "by_exit": _groups(depth_bits, shown, shown.loops, range(1, len(curve) + 1)),
        "by_kind": _groups(depth_bits, shown, kinds(batch), range(len(KINDS))),
    }


def _groups(depth_bits: Tensor, reading: Reading, key: Tensor, values: range) -> list[dict[str, Any]]:
    """Tokens by `key`: how many, their loops and bits with exits, and their bits at every depth."""
    groups = []
    for value in values:
        here = key == value
        if here.any():
            groups.append(
                {
                    "key": value,
                    "tokens": int(here.sum()),
                    "loops": reading.loops[here].double().mean().item(),
                    "bits": reading.bits[here].double().mean().item(),
                    "bits_by_depth": depth_bits[:, here].double().mean(1).tolist(),
                }
            )
    return groups


def _trained(cfg: TrainConfig, args: Args) -> OpenMythos:
    config, final = args.run / "config.yaml", args.run / "final"
    if not final.exists():
        Trainer(cfg, args.run, device="cpu", threads=args.threads).run()
    elif TrainConfig.load(config) != cfg:
        raise ValueError(f"run={args.run} holds a run of another configuration; remove it or name another folder")
    return OpenMythos.from_pretrained(final)


def _draw(results: dict[str, Any], path: Path) -> None:
    curve = results["fixed_bpb"]
    points = {"every token at the same depth": list(enumerate(curve, 1))}
    for rule in RULES:
        exits = sorted((e for e in results["exits"] if e["rule"] == rule), key=lambda e: e["loops"])
        points[f"exits by {rule}"] = [(e["loops"], e["bpb"]) for e in exits]
        points[f"depths of {rule}, shuffled"] = [(e["loops"], float(np.mean(e["shuffled_bpb"]))) for e in exits]
    # What is no worse than the deepest has no place on a logarithmic axis.
    above = {name: [(x, y - curve[-1]) for x, y in xy if y > curve[-1]] for name, xy in points.items()}
    series = {name: ([x for x, _ in xy], [y for _, y in xy]) for name, xy in above.items()}
    labels = ("mean loops per token", f"bits per byte above {len(curve)} loops, held out")
    xy_curves(series, path, labels, "What fewer loops cost (adaptive-text)", log_y=True)


def _report(results: dict[str, Any], cfg: TrainConfig, args: Args) -> str:
    metrics = results["metrics"]
    against = [e["fixed_bpb"] - e["bpb"] for e in results["exits"] if e["rule"] == SHOWN[0]]
    best = max(results["exits"], key=lambda e: e["gain"] / e["gain_error"])
    shown = next(e for e in results["exits"] if (e["rule"], e["threshold"]) == SHOWN)
    deepest = cfg.model.max_loop_iters
    lines = [
        "# Adaptive depth on text: what exits save, and whether they mean something",
        "",
        f"Command: `python -m open_mythos.experiments.adaptive --out {args.out}`, commit {results['commit']}, "
        f"{results['machine']}, {args.threads} thread.",
        f"Recipe `{RECIPE}`: {count_parameters(cfg.model).total:,} parameters, {cfg.steps} steps of {cfg.batch_size} "
        f"windows of {cfg.data.seq_len} bytes, every token at {deepest} loops, loss after the last; training loss "
        f"{metrics[-1]['train/ce']:.2f} nats at the end. One seed: this is the model that the benchmark of exits "
        "runs, and no claim about the quality of adaptive models beyond it.",
        f"Evaluation: {results['tokens']:,} bytes of held-out text, up to {deepest} loops.",
        "",
        "![bits per byte by mean loops](exits.png)",
        "",
        "## Every token at the same depth",
        "",
        "| loops | " + " | ".join(str(n + 1) for n in range(deepest)) + " |",
        "|---" * (deepest + 1) + "|",
        "| bits per byte | " + " | ".join(f"{x:.3f}" for x in results["fixed_bpb"]) + " |",
        "",
        "## With exits",
        "",
        "*Same depth* is the curve above at the same mean loops; between whole numbers a mix of the two. *Shuffled* is "
        f"the control: the same depths dealt to the tokens at random, mean of {SHUFFLES} deals. *Gain* is shuffled "
        "less exits, with its standard error over windows.",
        "",
        "| rule | threshold | mean loops | bits per byte | same depth | shuffled | gain | tokens by loops 1 to 8 |",
        "|---|---|---|---|---|---|---|---|",
        *[
            f"| {e['rule']} | {e['threshold']:g} | {e['loops']:.2f} | {e['bpb']:.4f} | {e['fixed_bpb']:.4f} | "
            f"{np.mean(e['shuffled_bpb']):.4f} | {e['gain']:+.4f} +- {e['gain_error']:.4f} | "
            f"{', '.join(map(str, e['tokens_by_loops']))} |"
            for e in results["exits"]
        ],
        "",
        f"The clearest gain over the control is {best['gain']:.4f} bits per byte, "
        f"{best['gain'] / best['gain_error']:.1f} standard errors ({best['rule']} at {best['threshold']:g}). Against "
        f"one depth for all, exits by {SHOWN[0]} are {min(against):+.4f} to {max(against):+.4f} bits better: which "
        "tokens go deeper is chosen well, but a convex curve charges for every spread of depths.",
        "",
        f"## Who leaves when ({SHOWN[0]}, threshold {SHOWN[1]:g}: {shown['loops']:.2f} loops on average)",
        "",
        f"Bits per byte of the tokens that left after so many loops, had all tokens run 2 or {deepest} loops: what the "
        "loops beyond the second are worth to them.",
        "",
        "| loops | tokens | all at 2 | " + f"all at {deepest} | worth of more loops | with exits |",
        "|---|---|---|---|---|---|",
        *[
            f"| {g['key']} | {g['tokens']} | {g['bits_by_depth'][1]:.3f} | {g['bits_by_depth'][-1]:.3f} | "
            f"{g['bits_by_depth'][1] - g['bits_by_depth'][-1]:+.3f} | {g['bits']:.3f} |"
            for g in results["by_exit"]
        ],
        "",
        "| the byte predicted | tokens | mean loops | all at 2 | " + f"all at {deepest} | with exits |",
        "|---|---|---|---|---|---|",
        *[
            f"| {KINDS[g['key']]} | {g['tokens']} | {g['loops']:.2f} | {g['bits_by_depth'][1]:.3f} | "
            f"{g['bits_by_depth'][-1]:.3f} | {g['bits']:.3f} |"
            for g in results["by_kind"]
        ],
        "",
    ]
    return "\n".join(lines)


def _commit() -> str:
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    main(tyro.cli(Args))
