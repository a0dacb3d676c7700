"""The published figures of an untrained mythos_1b on one machine, row by row; stability.py has those of training.

Shapes: B rows, T tokens, D width, L loops, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.experiments.stability import published_act, tokens, untrained
from open_mythos.experiments.study import Result, Results, Study, curve
from open_mythos.nn.driver import Compaction
from open_mythos.nn.eval_mode import evaluating
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import Estimate
from open_mythos.variants import mythos_1b

LOOPS = (1, 2, 3, 4, 6, 8, 12, 16)
AGREEMENT = (0.352, 0.656, 0.727, 0.805, 0.883, 0.906, 0.961, 1.0)
"""The published agreement at LOOPS."""
TIMED_LOOPS = (1, 2, 4, 8, 16)
BEYOND = (17, 32, 64)
REPEATS = 3
OUTPUTS = ("ACT as published", "ACT", "last state")
WAYS: dict[str, tuple[str | None, Compaction]]
WAYS = {"off": ("fixed", "counts"), "all computed": (None, "never"), "on": (None, "counts")}
"""Exit and compaction of the calls that show what ACT saves."""


def loops_matter(cfg: MythosConfig, seed: int, init: str) -> Result:
    """Return the agreement of the top token, and KL in nats, with the run at the last of LOOPS, by output and LOOPS."""
    model, ids = untrained(cfg, seed, init), tokens(cfg, seed)
    assert model.recurrent is not None and model.recurrent.act is not None
    found: dict[str, list] = {output: [] for output in OUTPUTS}
    reference: dict[str, Tensor] = {}
    with evaluating(model):
        hidden = model(ids, exit="fixed", trace=True).hidden
        p, view = model.recurrent.act(hidden), model.make_view((1, ids.shape[1]))
        for n in reversed(LOOPS):
            published = model.readout(published_act(hidden[:n], p[:n], cfg.act_threshold), view)
            outputs = (published, model(ids, n), model.readout(hidden[n - 1], view))
            for output, logits in zip(OUTPUTS, outputs, strict=True):
                found[output].insert(0, _against(reference.setdefault(output, logits), logits))
    return found


def _against(reference: Tensor, logits: Tensor) -> dict[str, float]:
    """Return the share of equal top tokens, and KL(reference || logits) in nats."""
    same = (reference.argmax(-1) == logits.argmax(-1)).double().mean().item()
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return {"agreement": same, "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()}


def latency(cfg: MythosConfig, seed: int) -> Result:
    """Return the seconds of calls by loops, taken in turns, and the memory at the peak of each (Linux only)."""
    model, ids = untrained(cfg, seed), tokens(cfg, seed)
    call = {n: partial(model, ids, n, exit="fixed") for n in TIMED_LOOPS}
    with evaluating(model):
        peaks = [_peak_bytes(call[n]) for n in TIMED_LOOPS]
        turns = [[timeit(call[n], number=1) for n in TIMED_LOOPS] for _ in range(REPEATS)]
    return {"seconds": np.transpose(turns).tolist(), "peak_bytes": peaks}


def _peak_bytes(call: Callable[[], object]) -> int | None:
    """Return the process's peak of resident memory during a call; None where the system does not tell it."""
    try:
        # The peak starts from what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    call()
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])


def beyond(cfg: MythosConfig, seed: int) -> Result:
    """Return what more loops than `max_loop_iters` give, against one deep trace, and the sums of ACT's weights."""
    model, ids = untrained(cfg, seed), tokens(cfg, seed)
    found = []
    with evaluating(model):
        hidden = model(ids, max(BEYOND), exit="fixed", trace=True).hidden
        view = model.make_view((1, ids.shape[1]))
        for n in BEYOND:
            logits = model(ids, n, exit="fixed")
            difference = (logits - model.readout(hidden[n - 1], view)).abs().max().item()
            found.append({"loops": n, "finite": bool(logits.isfinite().all()), "difference": difference,
                          "state": hidden[n - 1].flatten(1).norm().item()})  # fmt: skip
        weight = model(ids, max(BEYOND), trace=True).halt_weight.sum(0)
    return {"calls": found, "weights": [weight.min().item(), weight.max().item()]}


def act_saves(cfg: MythosConfig, seed: int) -> Result:
    """Return token-loops and seconds with a halting layer set by hand, so that tokens halt at different loops."""
    model, ids = untrained(cfg, seed), tokens(cfg, seed)
    block = model.recurrent
    assert block is not None and block.act is not None
    computed: list[int] = []
    found: Result = {way: {"seconds": []} for way in WAYS}
    with evaluating(model):
        # A direction in which the tokens of a loop differ and its mean is 0, so that the tokens halt far apart.
        hidden = model(ids, exit="fixed", trace=True).hidden[:, 0]
        common = torch.linalg.qr(hidden.mean(1).T).Q
        direction = torch.randn(cfg.dim)
        direction -= common @ (common.T @ direction)
        block.act.halt.weight.copy_(2 * direction / (hidden[0] @ direction).std())
        block.act.halt.bias.fill_(-1.5)
        # The definition of ACT: the states by their weights, with nothing left out of any loop.
        block.compaction = "never"
        trace = model(ids, trace=True)
        mixed = (trace.halt_weight[..., None] * trace.hidden).sum(0)
        reference = model.readout(mixed, model.make_view((1, ids.shape[1])))
        for way, (exit, block.compaction) in WAYS.items():
            hook = block.blocks[0].register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[:2].numel()))
            difference = (model(ids, exit=exit) - reference).abs().max().item()
            hook.remove()
            found[way] |= {"token_loops": sum(computed), "difference": None if way == "off" else difference}
            computed.clear()
        for _ in range(REPEATS):
            for way, (exit, block.compaction) in WAYS.items():
                found[way]["seconds"].append(timeit(partial(model, ids, exit=exit), number=1))
    loops = trace.exit_loop.flatten() + 1
    return found | {"tokens_by_loops": torch.bincount(loops, minlength=cfg.max_loop_iters + 1)[1:].tolist()}


PARTS: dict[str, Callable[..., Result]] = {
    "loops, our values": partial(loops_matter, init="our"),
    "loops, 0.5.0's values": partial(loops_matter, init="0.5.0's"),
    "latency": latency,
    "act": act_saves,
    "beyond": beyond,
}


def large(quick: bool) -> MythosConfig:
    """Return mythos_1b; the quick form's is narrower."""
    narrow = {"vocab_size": 4000, "dim": 512, "n_heads": 8, "n_experts": 8, "expert_dim": 512}
    return dataclasses.replace(mythos_1b(), **narrow) if quick else mythos_1b()


def line(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """Return intercept, slope and R^2 of the least-squares line."""
    slope, start = np.polyfit(xs, ys, 1)
    return {"start": start, "slope": slope, "r2": np.corrcoef(xs, ys)[0, 1] ** 2}


def agreement(r: Results, init: str, output: str, key: str = "agreement") -> dict[int, Estimate]:
    """Return agreement or KL by number of loops."""
    runs, form = r.runs[f"loops, {init} values"], ".3f" if key == "agreement" else ".2g"
    return {n: Estimate([run[output][i][key] for run in runs], form) for i, n in enumerate(LOOPS)}


def fill(r: Results) -> dict[str, Any]:
    """Return the rows beside the published ones."""
    rows = [
        {"what": f"{init} values, {output}", "key": title, "at": agreement(r, init, output, key)}
        for init in ("our", "0.5.0's")
        for output in OUTPUTS
        for key, title in (("agreement", "agreement"), ("kl", "KL"))
    ]
    moved = {init: 1 - agreement(r, init, "ACT")[1].mean for init in ("our", "0.5.0's")}
    rebuilt = agreement(r, "0.5.0's", "ACT as published").values()
    off = np.abs([ours.mean - theirs for ours, theirs in zip(rebuilt, AGREEMENT, strict=True)])
    (times,), (act,), (more,) = (r.runs[part] for part in ("latency", "act", "beyond"))
    spread = {way: {"lowest": min(act[way]["seconds"]), "highest": max(act[way]["seconds"])} for way in WAYS}
    act = act | {way: act[way] | spread[way] for way in WAYS}
    lowest = [min(seconds) for seconds in times["seconds"]]
    return {
        "moved": " and ".join(f"{x:.0%} of the tokens with {init} initial values" for init, x in moved.items()),
        "off": {"mean": off.mean(), "most": off.max()},
        "rows": rows,
        "ours": line(TIMED_LOOPS, lowest),
        "lowest": lowest,
        "highest": [max(seconds) for seconds in times["seconds"]],
        "peak": ["not measured" if x is None else f"{x / 1e9:.2f}" for x in times["peak_bytes"]],
        "calls": more["calls"],
        "finite": f"{'' if all(call['finite'] for call in more['calls']) else 'not '}all calls are finite",
        "act": act,
        "share": act["on"]["token_loops"] / act["off"]["token_loops"],
        "time": act["on"]["lowest"] / act["off"]["lowest"],
        "used": ", ".join(map(str, act["tokens_by_loops"])),
    }


def draw_loops(r: Results, path: Path) -> None:
    curves = [Curve(LOOPS, AGREEMENT, "published", None)]
    for init, output in (("our", "ACT"), *(("0.5.0's", output) for output in OUTPUTS)):
        curves.append(curve(LOOPS, [*agreement(r, init, output).values()], f"{init} values, {output}"))
    draw_curves({"Untrained": curves}, path, ("loops", "agreement with 16 loops"))


STUDY = Study(
    title="The published verification, row by row",
    question="Do the figures published for an untrained mythos_1b on one machine agree with ours?",
    page=Path(__file__).with_suffix(".md"),
    cost=("1 min", "8 min"),
    arms=lambda quick: {part: {"model": large(quick).to_dict(), "repeats": REPEATS} for part in PARTS},
    n_seeds={"latency": 1, "act": 1, "beyond": 1},
    prepare=lambda lab, arms: {"large": "mythos_1b narrowed to width 512" if lab.quick else "mythos_1b"},
    measure=lambda run: PARTS[run.arm](large(run.lab.quick), run.seed),
    fill=fill,
    figures={"loops": draw_loops},
)
