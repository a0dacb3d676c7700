"""Does a bounded A keep training alive where a free one dies? And how does the state grow under a forced A?

Shapes: B rows, T tokens, D width, L loops, V vocabulary.
"""

import math
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
A_MAX = {
    "bounded": (0.368, 0.496, 0.480, 0.477, 0.474, 0.469),
    "free from .368": (0.418, 0.719, 0.749, 0.736, 0.700, 0.666),
    "free from .95": (1.000, 1.319, 1.340, 1.315, 1.251, 1.190),
}
"""The published largest A at STEPS."""
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


def published_init(model: OpenMythos) -> None:
    """Draw the initial values of 0.5.0: N(0, 0.02) for every matrix, the halting layer's too, whose bias is uniform."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=STD)
    if model.recurrent is not None and model.recurrent.act is not None:
        nn.init.uniform_(model.recurrent.act.halt.bias, -(model.cfg.dim**-0.5), model.cfg.dim**-0.5)


def published_act(hidden: Tensor, p: Tensor, threshold: float) -> Tensor:
    """Return the output of 0.5.0's ACT, (B, T, D), from states (L, B, T, D) and probabilities (L, B, T).

    Where the sum never reaches the threshold the weights add up to less than one; with p near 0, to nothing.
    """
    before = p.cumsum(0) - p
    weight = torch.where(before + p >= threshold, 1 - before, p) * (before < threshold)
    return (weight[..., None] * hidden).sum(0)


def untrained(cfg: MythosConfig, seed: int, init: str = "our") -> OpenMythos:
    """Return a fresh model in eval mode, with our initial values or those of "0.5.0's"."""
    torch.manual_seed(seed)
    model = OpenMythos(cfg).eval()
    if init == "0.5.0's":
        published_init(model)
    return model


def tokens(cfg: MythosConfig, seed: int, n: int = 128) -> Tensor:
    """Draw random tokens (1, n)."""
    return torch.randint(cfg.vocab_size, (1, n), generator=torch.Generator().manual_seed(seed))


def spectral_radius(dim: int) -> Result:
    """Return A at the start, and the largest value that any parameter gives it."""
    injection = LTIInjection(dim)
    with torch.no_grad():
        start = injection.get_A()
        extremes = torch.tensor([-math.inf, -1e4, -20.0, 0.0, 20.0, 1e4, math.inf])
        injection.log_A = nn.Parameter(extremes)
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
    found: dict[str, list[float]] = {"A": [], "loss": [], "gradient": []}
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
        for key, value in (("A", injection.get_A().max()), ("loss", loss), ("gradient", norm)):
            found[key].append(float(f"{value.item():.6g}"))
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
    ablation = {
        f"{form}, {decay}": {"form": form, "decay": decay, "steps": steps} for form in FORMS for decay in DECAYS
    }
    return ablation | {"growth": None, "spectral": mythos_1b().dim}


def measure(run: Run) -> Result:
    """Return the numbers of a run of the ablation, of the growth, or of the spectral radius."""
    if run.arm == "growth":
        return growth(run.seed)
    return spectral_radius(run.config) if run.arm == "spectral" else ablation(**run.config, seed=run.seed)


def dead(run: Result) -> bool:
    """Return whether a run no longer learns at its end, with no gradient or one that is not a number."""
    return not run["gradient"][-1] >= DEAD


def verdict(runs: dict[str, list[Result]]) -> str:
    """Return what the numbers of dead runs say."""
    n = len(runs["published, bounded"])
    count = {form: [sum(map(dead, runs[f"{form}, {decay}"])) for decay in DECAYS] for form in FORMS}
    bounded, free = count["published"][0], sum(count["published"][1:])
    others = sum(count["normalised"]) + sum(count["ours"])
    tally = (
        f"(dead runs with 0.5.0's ACT: {bounded} of {n} with a bounded A, {free} of {2 * n} with a free one; with "
        f"weights that sum to one: {others} of {6 * n})"
    )
    if n < 2:
        return f"Stability: one seed, so nothing is claimed {tally}."
    if not sum(each[0] for each in count.values()) and free and others >= free:
        return f"A bounded A trains on where a free one dies, as published {tally}."
    if bounded and not others:
        return (
            "The published death of training is a fault of halting and not of A: it happens also with a bounded A, and "
            f"never once ACT's weights sum to one {tally}."
        )
    if free and not others:
        return f"Training died only with a free A and 0.5.0's ACT together {tally}."
    if not bounded + free + others:
        return f"No run died here, bounded or free {tally}."
    return f"Death follows neither A nor halting alone {tally}."


def norms_by_loop(r: Results, rho: str) -> np.ndarray:
    """Return (S, loops) the norms of the state under a forced A."""
    return np.array([run[rho] for run in r.runs["growth"]])


def fill(r: Results) -> dict[str, Any]:
    """Return the counts of dead runs, the largest A by step, and the norms beside the published ones."""
    ablation = {arm: runs for arm, runs in r.runs.items() if arm not in ("growth", "spectral")}
    lines = []
    for arm, runs in ablation.items():
        A, n = r[arm, "A"].values, len(runs)
        at = {f"at_{step}": Estimate(A[:, step]) if step < A.shape[1] else "" for step in STEPS}
        frozen = sum(dead(run) and abs(run["loss"][-1] - math.log(512)) < 1e-4 for run in runs)
        lines.append(
            {
                "arm": arm,
                "dead": f"{sum(map(dead, runs))} of {n}",
                "loss": Estimate(r[arm, "loss"].values[:, -50:].mean(1)),
                "without": np.mean(r[arm, "gradient"].values < DEAD),
                "frozen": f"{frozen} of {n}",
                "beyond": f"{int((A.max(1) >= 1).sum())} of {n}",
                **at,
            }
        )
    published = [
        {"arm": f"published: {decay}"} | {f"at_{step}": f"{a:.3f}" for step, a in zip(STEPS, values, strict=True)}
        for decay, values in A_MAX.items()
    ]
    falls = [
        1 - run["A"][-1] / run["A"][-2] for arm, runs in ablation.items() for run in runs if dead(run) and "free" in arm
    ]
    fall = {decay: 1 - (values[5] / values[3]) ** (1 / 199) for decay, values in A_MAX.items() if decay != "bounded"}
    norms = {rho: norms_by_loop(r, rho).mean(0) for rho in GROWTH}
    grown = [
        {"what": f"{rho} {who}"} | {f"loop_{t}": f"{norm:.0f}" for t, norm in enumerate(values, 1)}
        for rho, theirs in GROWTH.items()
        for who, values in (("published", theirs), ("here", norms[rho]))
    ]
    last = norms_by_loop(r, "2.0")
    spectral = r.runs["spectral"][0]
    return {
        "verdict": verdict(r.runs),
        "off": max(abs(ours / norm - 1) for rho in GROWTH for ours, norm in zip(norms[rho], GROWTH[rho], strict=True)),
        "start": spectral["start"],
        "most": [{"dtype": dtype, "a": f"{a:.8f}"} for dtype, a in spectral["most"].items()],
        "published_fall": " and ".join(f"{x:.3%} ({decay})" for decay, x in fall.items()),
        "fall": f" Dead runs here: {np.mean(falls):.3%} a step." if falls else "",
        "published": published,
        "lines": lines,
        "ratio": Estimate((last[:, 5:] / last[:, 4:-1]).mean(1)),
        "grown": grown,
    }


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
