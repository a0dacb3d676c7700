"""Does a bounded A keep training alive where a free one dies? And how does the state grow under a forced A?

Shapes: B rows, T tokens, D width, L loops, V vocabulary.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.experiments.study import Result, Results, Run, Study
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.init import STD
from open_mythos.nn.injection import LTIInjection
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import Estimate
from open_mythos.variants import mythos_1b, sized

DECAYS = {"bounded": None, "free from .368": math.exp(-1), "free from .95": 0.95}
FORMS = ("published", "normalised", "ours")
"""Initial values and output of the ablation; the page explains them."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEAD = 1e-8
"""A gradient norm below this is zero but for rounding."""
STEPS = (0, 20, 60, 100, 200, 299)
"""Steps whose largest A the page shows, beside the published ones."""
GROWTH = {
    "0.37": (91, 124, 136, 141, 143, 143, 144, 144),
    "0.9": (91, 172, 246, 312, 371, 425, 473, 517),
    "1.0": (91, 182, 272, 363, 454, 544, 635, 726),
    "1.2": (91, 200, 330, 487, 675, 901, 1172, 1498),
    "1.5": (91, 228, 432, 738, 1199, 1889, 2924, 4476),
    "2.0": (92, 274, 638, 1367, 2825, 5740, 11570, 23232),
}
"""The published norm of the state after loops 1 to 8, by A."""
SMALL = sized(512, 128, 4, 2, 64, 8, 1, 4, 1, 2, 64, lora_rank=4)


class FreeLTI(LTIInjection):
    """h' = A*h + B*e + y, where A itself is the parameter, so that nothing bounds it."""

    def __init__(self, dim: int, a: float) -> None:
        super().__init__(dim)
        del self.log_A, self.log_dt
        self.A = nn.Parameter(torch.full((dim,), a))

    def get_A(self) -> Tensor:
        return self.A


def published_act(hidden: Tensor, p: Tensor, threshold: float) -> Tensor:
    """Return the output of 0.5.0's ACT, (B, T, D), from states (L, B, T, D) and probabilities (L, B, T).

    Where the sum never reaches the threshold the weights add up to less than one; with p near 0, to nothing.
    """
    before = p.cumsum(0) - p
    weight = torch.where(before + p >= threshold, 1 - before, p) * (before < threshold)
    return (weight[..., None] * hidden).sum(0)


def untrained(cfg: MythosConfig, seed: int, init: str = "our") -> OpenMythos:
    """Return a fresh model in eval mode, with our initial values or those of "0.5.0's".

    Those are N(0, 0.02) for every matrix, the halting layer's too, whose bias is uniform.
    """
    torch.manual_seed(seed)
    model = OpenMythos(cfg).eval()
    if init == "0.5.0's":
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=STD)
        if model.recurrent is not None and model.recurrent.act is not None:
            nn.init.uniform_(model.recurrent.act.halt.bias, -(cfg.dim**-0.5), cfg.dim**-0.5)
    return model


def tokens(cfg: MythosConfig, seed: int, n: int = 128) -> Tensor:
    """Draw random tokens (1, n)."""
    return torch.randint(cfg.vocab_size, (1, n), generator=torch.Generator().manual_seed(seed))


def spectral_radius(dim: int) -> Result:
    """Return A at the start, and the largest value that any parameter gives it."""
    injection = LTIInjection(dim)
    start = injection.get_A().detach()
    injection.log_A = nn.Parameter(torch.tensor([-math.inf, -1e4, -20.0, 0.0, 20.0, 1e4, math.inf]))
    most = {str(dtype)[6:]: injection.to(dtype).get_A().to(dtype).max().item() for dtype in DTYPES}
    return {"start": [start.min().item(), start.max().item()], "most": most}


def ablation(form: str, decay: str, seed: int, steps: int, lr: float = 0.05) -> Result:
    """Train on random tokens; return by step the largest A after the update, the loss and the gradient's norm."""
    model = untrained(SMALL, seed, "our" if form == "ours" else "0.5.0's").train()
    assert model.recurrent is not None and model.recurrent.act is not None
    start = DECAYS[decay]
    if start is not None:
        model.recurrent.injection = FreeLTI(SMALL.dim, start)
    injection = model.recurrent.injection
    assert isinstance(injection, LTIInjection)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    found: Result = {"A": [], "loss": [], "gradient": []}
    for _ in range(steps):
        ids = torch.randint(SMALL.vocab_size, (4, 33), generator=generator)
        inputs, labels = ids[:, :-1], ids[:, 1:]
        if form == "published":
            hidden = model(inputs, exit="fixed", trace=True).hidden
            out = published_act(hidden, model.recurrent.act(hidden), SMALL.act_threshold)
            logits = model.readout(out, model.make_view((4, 32)))
        else:
            logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        optimizer.step()
        for values, value in zip(found.values(), (injection.get_A().max(), loss, norm), strict=True):
            values.append(float(f"{value.item():.6g}"))
    return found


def growth(seed: int) -> Result:
    """Return the norm of the state of 64 tokens after each of 8 loops, by the A that is forced."""
    norms = {}
    for rho in map(float, GROWTH):
        model = untrained(SMALL, seed, "0.5.0's")
        assert model.recurrent is not None
        model.recurrent.injection = FreeLTI(SMALL.dim, rho)
        with evaluating(model):
            hidden = model(tokens(SMALL, seed, 64), exit="fixed", trace=True).hidden
        norms[str(rho)] = hidden.flatten(1).norm(dim=1).tolist()
    return norms


def arms(quick: bool) -> dict[str, Any]:
    """The runs of the ablation by form and decay, and the measures of untrained models."""
    steps = 60 if quick else 300
    trained = [{"form": form, "decay": decay, "steps": steps} for form in FORMS for decay in DECAYS]
    return {f"{x['form']}, {x['decay']}": x for x in trained} | {"growth": None, "spectral": mythos_1b().dim}


def measure(run: Run) -> Result:
    """Return the numbers of a run of the ablation, of the growth, or of the spectral radius."""
    if run.arm == "growth":
        return growth(run.seed)
    return spectral_radius(run.config) if run.arm == "spectral" else ablation(**run.config, seed=run.seed)


def dead(gradient: np.ndarray) -> np.ndarray:
    """Return which runs (S, steps) no longer learn at their end, with no gradient or one that is not a number."""
    return ~(gradient[:, -1] >= DEAD)


def verdict(count: Mapping[str, int], n: int) -> str:
    """Return what the numbers of dead runs by arm say, of `n` seeds each."""
    bounded = count["published, bounded"]
    free = sum(count[f"published, {decay}"] for decay in DECAYS) - bounded
    others = sum(count.values()) - bounded - free
    if n < 2:
        say = "Stability: one seed, so nothing is claimed"
    elif free and others >= free and not any(count[f"{form}, bounded"] for form in FORMS):
        say = "A bounded A trains on where a free one dies, as published"
    elif bounded and not others:
        say = "The published death of training is a fault of halting and not of A: it happens also with a bounded A, "
        say += "and never once ACT's weights sum to one"
    elif free and not others:
        say = "Training died only with a free A and 0.5.0's ACT together"
    else:
        say = "Death follows neither A nor halting alone" if others else "No run died here, bounded or free"
    published = f"{bounded} of {n} with a bounded A, {free} of {2 * n} with a free one"
    return f"{say} (dead runs with 0.5.0's ACT: {published}; with weights that sum to one: {others} of {6 * n})."


def norms_by_loop(r: Results, rho: str) -> np.ndarray:
    """Return (S, loops) the norms of the state under a forced A."""
    return np.array([run[rho] for run in r.runs["growth"]])


def fill(r: Results) -> dict[str, Any]:
    """Return the counts of dead runs, the largest A by step, and the norms beside the published ones."""
    lines, falls, count = [], [], {}
    for arm in (arm for arm in r.runs if arm not in ("growth", "spectral")):
        A, loss, gradient = (r[arm, name].values for name in ("A", "loss", "gradient"))
        died, n = dead(gradient), len(A)
        frozen = died & (abs(loss[:, -1] - math.log(SMALL.vocab_size)) < 1e-4)
        falls += [*(1 - A[:, -1] / A[:, -2])[died & ("free" in arm)]]
        count[arm] = int(died.sum())
        lines.append({
            "arm": arm,
            "A": [Estimate(A[:, step]) if step < A.shape[1] else "" for step in STEPS],
            "loss": Estimate(loss[:, -50:].mean(1)),
            "without": np.mean(gradient < DEAD),
            "dead": f"{count[arm]} of {n}",
            "frozen": f"{frozen.sum()} of {n}",
            "beyond": f"{(A.max(1) >= 1).sum()} of {n}",
        })  # fmt: skip
    norms = {rho: norms_by_loop(r, rho).mean(0) for rho in GROWTH}
    last = norms_by_loop(r, "2.0")
    return {
        "verdict": verdict(count, n),
        "off": max(np.abs(norms[rho] / theirs - 1).max() for rho, theirs in GROWTH.items()),
        "fall": f" Dead runs here: {np.mean(falls):.3%} a step." if falls else "",
        "lines": lines,
        "ratio": Estimate((last[:, 5:] / last[:, 4:-1]).mean(1)),
        "grown": [{"what": f"{rho} {who}", "norm": norm} for rho, theirs in GROWTH.items()
                  for who, norm in (("published", np.array(theirs)), ("here", norms[rho]))],
    }  # fmt: skip


def draw_stability(r: Results, path: Path) -> None:
    curves = []
    for arm in ("published, bounded", "published, free from .95", "normalised, bounded", "normalised, free from .95"):
        alive = (r[arm, "gradient"].values > DEAD).mean(0)
        at = range(0, len(alive), max(1, len(alive) // 12))
        curves.append(Curve(at, [float(alive[step]) for step in at], arm))
    draw_curves({"Stability ablation": curves}, path, ("step", "share of runs with a gradient"))


def draw_growth(r: Results, path: Path) -> None:
    curves = [Curve(range(1, 9), norms_by_loop(r, rho).mean(0).tolist(), rho) for rho in GROWTH]
    draw_curves({"Norm of the state by the A that is forced": curves}, path, ("loop", "norm"), log="y")


STUDY = Study(
    title="Stability: does a bounded A keep training alive?",
    question="Does a bounded A keep training alive where a free one dies, as published, and does the state grow with A "
    "as published?",
    page=Path(__file__).with_suffix(".md"),
    cost=("1 min", "12 min"),
    arms=arms,
    n_seeds={"spectral": 1},
    measure=measure,
    axes={name: {"step": range(300)} for name in ("A", "loss", "gradient")},
    fill=fill,
    figures={"stability": draw_stability, "growth": draw_growth},
)
