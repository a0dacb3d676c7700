"""The published figures of an untrained mythos_1b on one machine, row by row; stability.py has those of training.

Shapes: B rows, T tokens, D width, L loops, V vocabulary.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.experiments.stability import published_act, tokens, untrained
from open_mythos.experiments.study import Result, Results, Run, Study, curve
from open_mythos.nn.driver import Compaction
from open_mythos.nn.eval_mode import evaluating
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.reports.stats import Estimate
from open_mythos.variants import mythos_1b

LOOPS = (1, 2, 3, 4, 6, 8, 12, 16)
AGREEMENT = (0.352, 0.656, 0.727, 0.805, 0.883, 0.906, 0.961, 1.0)
"""The published agreement at LOOPS."""
KL = (0.19, 0.10, 0.07, 0.06, 0.04, 0.02, 0.005, 0.0)
TIMED_LOOPS = (1, 2, 4, 8, 16)
SECONDS = (0.141, 0.254, 0.501, 1.021, 2.071)
"""The published seconds at TIMED_LOOPS."""
BEYOND = (17, 32, 64)
REPEATS = 3
OUTPUTS = ("ACT as published", "ACT", "last state")


def loops_matter(cfg: MythosConfig, seed: int, init: str) -> Result:
    """Return the agreement of the top token, and KL in nats, with the run at `max_loop_iters`, by output and LOOPS."""
    model, ids = untrained(cfg, seed, init), tokens(cfg, seed)
    assert model.recurrent is not None and model.recurrent.act is not None
    with evaluating(model):
        hidden = model(ids, exit="fixed", trace=True).hidden
        p = model.recurrent.act(hidden)
        view = model.make_view((1, ids.shape[1]))
        outputs: dict[str, Callable[[int], Tensor]] = {
            "last state": lambda n: model.readout(hidden[n - 1], view),
            "ACT": lambda n: model(ids, n),
            "ACT as published": lambda n: model.readout(published_act(hidden[:n], p[:n], cfg.act_threshold), view),
        }
        found = {}
        for name, logits in outputs.items():
            reference = logits(cfg.max_loop_iters)
            found[name] = [_against(reference, logits(n)) for n in LOOPS]
    return found


def _against(reference: Tensor, logits: Tensor) -> dict[str, float]:
    """Return the share of equal top tokens, and KL(reference || logits) in nats."""
    same = (reference.argmax(-1) == logits.argmax(-1)).double().mean().item()
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return {"agreement": same, "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()}


def latency(cfg: MythosConfig, seed: int, repeats: int) -> Result:
    """Return the seconds of calls by loops, taken in turns, and the memory at the peak of each (Linux only)."""
    model, ids = untrained(cfg, seed), tokens(cfg, seed)
    call = {n: partial(model, ids, n, exit="fixed") for n in TIMED_LOOPS}
    peaks, seconds = [], {n: [] for n in TIMED_LOOPS}
    with evaluating(model):
        for n in TIMED_LOOPS:
            reset = _reset_peak()
            call[n]()
            peaks.append(_peak_bytes() if reset else None)
        for _ in range(repeats):
            for n in TIMED_LOOPS:
                seconds[n].append(_seconds(call[n]))
    return {"seconds": list(seconds.values()), "peak_bytes": peaks}


def _seconds(call: Callable[[], object]) -> float:
    """Time a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _reset_peak() -> bool:
    """Let the process's peak start from what is resident now; return whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    """Return the process's peak of resident memory."""
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
            logits, traced = model(ids, n, exit="fixed"), model.readout(hidden[n - 1], view)
            found.append(
                {
                    "loops": n,
                    "finite": bool(logits.isfinite().all()),
                    "difference": (logits - traced).abs().max().item(),
                    "state": hidden[n - 1].flatten(1).norm().item(),
                }
            )
        weight = model(ids, max(BEYOND), trace=True).halt_weight.sum(0)
    return {"calls": found, "weights": [weight.min().item(), weight.max().item()]}


def act_saves(cfg: MythosConfig, seed: int, repeats: int) -> Result:
    """Return token-loops and seconds with a halting layer set by hand, so that tokens halt at different loops."""
    model, ids = untrained(cfg, seed), tokens(cfg, seed)
    block = model.recurrent
    assert block is not None and block.act is not None
    computed = [0]
    found: Result = {}
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
        ways: dict[str, tuple[str | None, Compaction]] = {
            "off": ("fixed", "counts"),
            "all computed": (None, "never"),
            "on": (None, "counts"),
        }
        for way, (exit, compaction) in ways.items():
            block.compaction = compaction
            logits = model(ids, exit=exit)
            hook = block.blocks[0].register_forward_pre_hook(
                lambda _, args: computed.__setitem__(0, computed[0] + args[0].shape[0] * args[0].shape[1])
            )
            computed[0] = 0
            model(ids, exit=exit)
            hook.remove()
            found[way] = {
                "token_loops": computed[0],
                "difference": None if way == "off" else (logits - reference).abs().max().item(),
                "seconds": [],
            }
        for _ in range(repeats):
            for way, (exit, compaction) in ways.items():
                block.compaction = compaction
                found[way]["seconds"].append(_seconds(partial(model, ids, exit=exit)))
    loops = trace.exit_loop.flatten() + 1
    return found | {"tokens_by_loops": torch.bincount(loops, minlength=cfg.max_loop_iters + 1)[1:].tolist()}


PARTS: dict[str, Callable[..., Result]] = {
    "loops, our values": partial(loops_matter, init="our"),
    "loops, 0.5.0's values": partial(loops_matter, init="0.5.0's"),
    "latency": partial(latency, repeats=REPEATS),
    "act": partial(act_saves, repeats=REPEATS),
    "beyond": beyond,
}


def large(quick: bool) -> MythosConfig:
    """Return mythos_1b; the quick form's is narrower."""
    narrow = {"vocab_size": 4000, "dim": 512, "n_heads": 8, "n_experts": 8, "expert_dim": 512}
    return dataclasses.replace(mythos_1b(), **narrow) if quick else mythos_1b()


def measure(run: Run) -> Result:
    """Return the numbers of one part."""
    return PARTS[run.arm](large(run.lab.quick), run.seed)


def line(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """Return intercept, slope and R^2 of the least-squares line."""
    slope, intercept = np.polyfit(xs, ys, 1)
    rest = np.asarray(ys) - intercept - slope * np.asarray(xs)
    return {"start": float(intercept), "slope": float(slope), "r2": float(1 - rest.var() / np.var(ys))}


def agreement(r: Results, init: str, output: str, key: str) -> dict[int, Estimate]:
    """Return agreement or KL by number of loops."""
    runs, form = r.runs[f"loops, {init} values"], ".3f" if key == "agreement" else ".2g"
    return {n: Estimate([run[output][i][key] for run in runs], form) for i, n in enumerate(LOOPS)}


def fill(r: Results) -> dict[str, Any]:
    """Return the rows beside the published ones."""
    rows = [
        {"what": f"{init} values, {output}", "key": title}
        | {f"at_{n}": x for n, x in agreement(r, init, output, key).items()}
        for init in ("our", "0.5.0's")
        for output in OUTPUTS
        for key, title in (("agreement", "agreement"), ("kl", "KL"))
    ]
    published = [
        {"key": key} | {f"at_{n}": f"{x:.3f}" for n, x in zip(LOOPS, values, strict=True)}
        for key, values in (("agreement", AGREEMENT), ("KL", KL))
    ]
    moved = {init: 1 - agreement(r, init, "ACT", "agreement")[1].mean for init in ("our", "0.5.0's")}
    rebuilt = agreement(r, "0.5.0's", "ACT as published", "agreement")
    off = np.abs([rebuilt[n].mean - x for n, x in zip(LOOPS, AGREEMENT, strict=True)])
    (times,), (act,), (more,) = (r.runs[part] for part in ("latency", "act", "beyond"))
    timed = {
        "lowest": [f"{min(seconds):.3f}" for seconds in times["seconds"]],
        "highest": [f"{max(seconds):.3f}" for seconds in times["seconds"]],
        "peak": ["not measured" if x is None else f"{x / 1e9:.2f}" for x in times["peak_bytes"]],
    }
    ways = {"off": "halting off", "all computed": "ACT, all computed until the last has halted", "on": "ACT"}
    return {
        "large": r.raw["large"],
        "moved": " and ".join(f"{x:.0%} of the tokens with {init} initial values" for init, x in moved.items()),
        "off": {"mean": off.mean(), "most": off.max()},
        "published": published,
        "rows": rows,
        "ours": line(TIMED_LOOPS, [min(seconds) for seconds in times["seconds"]]),
        "theirs": line(TIMED_LOOPS, SECONDS),
        "seconds": [f"{x:.3f}" for x in SECONDS],
        "timed": timed,
        "finite": "all calls are finite"
        if all(call["finite"] for call in more["calls"])
        else "not all calls are finite",
        "calls": more["calls"],
        "weights": more["weights"],
        "share": act["on"]["token_loops"] / act["off"]["token_loops"],
        "time": min(act["on"]["seconds"]) / min(act["off"]["seconds"]),
        "used": ", ".join(map(str, act["tokens_by_loops"])),
        "n_used": len(act["tokens_by_loops"]),
        "ways": [
            {
                "title": title,
                "token_loops": act[way]["token_loops"],
                "lowest": min(act[way]["seconds"]),
                "highest": max(act[way]["seconds"]),
                "difference": "-" if act[way]["difference"] is None else f"{act[way]['difference']:.1e}",
            }
            for way, title in ways.items()
        ],
    }


def draw_loops(r: Results, path: Path) -> None:
    curves = [Curve(LOOPS, AGREEMENT, "published", None)]
    for init, output in (("our", "ACT"), *(("0.5.0's", output) for output in OUTPUTS)):
        curves.append(curve(LOOPS, [*agreement(r, init, output, "agreement").values()], f"{init} values, {output}"))
    draw_curves({"Untrained": curves}, path, ("loops", "agreement with 16 loops"))


STUDY = Study(
    title="The published verification, row by row",
    question="Do the figures published for an untrained mythos_1b on one machine agree with ours?",
    page=Path(__file__).with_suffix(".md"),
    cost=("1 min", "8 min"),
    arms=lambda quick: {part: {"model": large(quick).to_dict(), "repeats": REPEATS} for part in PARTS},
    n_seeds={"latency": 1, "act": 1, "beyond": 1},
    prepare=lambda lab, arms: {"large": "mythos_1b narrowed to width 512" if lab.quick else "mythos_1b"},
    measure=measure,
    fill=fill,
    figures={"loops": draw_loops},
)
