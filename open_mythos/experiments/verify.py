"""The published verification on one machine, row by row: what reproduces, and why the rest does not.

Shapes: B rows, T tokens, D width, L loops, V vocabulary.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.experiments.study import Experiment, Lab, Result
from open_mythos.experiments.verify_report import verify_report
from open_mythos.model import OpenMythos
from open_mythos.nn.driver import Compaction
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.init import STD
from open_mythos.nn.injection import LTIInjection
from open_mythos.variants import mythos_1b

LOOPS = (1, 2, 3, 4, 6, 8, 12, 16)
TIMED_LOOPS = (1, 2, 4, 8, 16)
BEYOND = (17, 32, 64)
RHOS = (0.37, 0.9, 1.0, 1.2, 1.5, 2.0)
DECAYS = {"bounded": None, "free from .368": math.exp(-1), "free from .95": 0.95}
FORMS = ("published", "mended", "ours")
"""Of the stability ablation, by initial values and output: see the protocol."""
SMALL = MythosConfig(
    vocab_size=512,
    dim=128,
    n_heads=4,
    n_kv_heads=2,
    max_seq_len=64,
    max_loop_iters=8,
    prelude_layers=1,
    coda_layers=1,
    attn_type="gqa",
    n_experts=4,
    n_shared_experts=1,
    n_experts_per_tok=2,
    expert_dim=64,
    lora_rank=4,
)


class FreeLTI(LTIInjection):
    """h' = A*h + B*e + y with A itself the parameter: nothing bounds it."""

    def __init__(self, dim: int, a: float) -> None:
        super().__init__(dim)
        del self.log_A, self.log_dt
        self.A = nn.Parameter(torch.full((dim,), a))

    def get_A(self) -> Tensor:
        return self.A


def published_init(model: OpenMythos) -> None:
    """The initial values of 0.5.0: N(0, 0.02) for every matrix, the halting layer's too, and its bias uniform."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=STD)
    if model.recurrent is not None and model.recurrent.act is not None:
        nn.init.uniform_(model.recurrent.act.halt.bias, -(model.cfg.dim**-0.5), model.cfg.dim**-0.5)


def published_act(hidden: Tensor, p: Tensor, threshold: float) -> Tensor:
    """The output of 0.5.0's ACT, (L, B, T, D) states and (L, B, T) probabilities -> (B, T, D).

    Where the sum never reaches the threshold the weights add up to less than one; with p near 0, to nothing.
    """
    before = p.cumsum(0) - p
    weight = torch.where(before + p >= threshold, 1 - before, p) * (before < threshold)
    return (weight[..., None] * hidden).sum(0)


def untrained(cfg: MythosConfig, seed: int, init: str = "our") -> OpenMythos:
    torch.manual_seed(seed)
    model = OpenMythos(cfg).eval()
    if init == "0.5.0's":
        published_init(model)
    return model


def tokens(cfg: MythosConfig, seed: int, n: int = 128) -> Tensor:
    return torch.randint(cfg.vocab_size, (1, n), generator=torch.Generator().manual_seed(seed))


def arms() -> list[tuple[str, str]]:
    """The runs of the stability ablation: form and decay."""
    return [(form, decay) for form in FORMS for decay in DECAYS]


def loops_matter(cfg: MythosConfig, seed: int, init: str) -> Result:
    """Agreement of the top token, and KL in nats, with the run at `max_loop_iters`, by output and LOOPS."""
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
    same = (reference.argmax(-1) == logits.argmax(-1)).double().mean().item()
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return {"agreement": same, "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()}


def spectral_radius(cfg: MythosConfig) -> Result:
    """A as it starts, and the most that any parameter can make of it."""
    injection = LTIInjection(cfg.dim)
    with torch.no_grad():
        start = injection.get_A()
        extremes = torch.tensor([-math.inf, -1e4, -20.0, 0.0, 20.0, 1e4, math.inf])
        injection.log_A = nn.Parameter(extremes)
        most = {str(dtype)[6:]: injection.to(dtype).get_A().to(dtype).max().item() for dtype in DTYPES}
    return {"start": [start.min().item(), start.max().item()], "most": most}


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def ablation(form: str, decay: str, seed: int, steps: int, lr: float = 0.05) -> Result:
    """Train on random tokens: by step the largest A after the update, the loss and the gradient's norm."""
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
    """Norm of the state of 64 tokens after each of 8 loops, by the A that is forced."""
    norms = {}
    for rho in RHOS:
        model = untrained(SMALL, seed, "0.5.0's")
        assert model.recurrent is not None
        model.recurrent.injection = FreeLTI(SMALL.dim, rho)
        with evaluating(model):
            hidden = model(tokens(SMALL, seed, 64), exit="fixed", trace=True).hidden
        norms[str(rho)] = hidden.flatten(1).norm(dim=1).tolist()
    return norms


def latency(cfg: MythosConfig, seed: int, repeats: int) -> Result:
    """Seconds of a call by loops, in turns, and what memory it takes at its peak (Linux only)."""
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
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _reset_peak() -> bool:
    """Let the process's peak start from what is resident now, where there is a way."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])


def beyond(cfg: MythosConfig, seed: int) -> Result:
    """More loops than `max_loop_iters`: finite, and the same by one trace of the deepest; with ACT, weights' sums."""
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
    """Token-loops computed, and seconds, with a halting layer set by hand so that tokens halt at different loops."""
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
        # What ACT is: the states by their weights, with nothing left out of any loop.
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


def run(lab: Lab) -> Result:
    # The quick form has the same parts, narrower.
    narrow = {"vocab_size": 4000, "dim": 512, "n_heads": 8, "n_experts": 8, "expert_dim": 512}
    cfg = dataclasses.replace(mythos_1b(), **narrow) if lab.quick else mythos_1b()
    steps, repeats = (60, 3) if lab.quick else (300, 3)
    model, first = cfg.to_dict(), lab.seeds[0]
    results: Result = {
        "large": "mythos_1b narrowed to width 512" if lab.quick else "mythos_1b",
        "spectral": lab.computed("spectral", lambda: spectral_radius(cfg), model=model),
        "loops": {"our": [], "0.5.0's": []},
        "growth": [],
        "ablation": {f"{form}, {decay}": [] for form, decay in arms()},
    }
    for part, measure in (("latency", latency), ("act", act_saves)):
        compute = partial(measure, cfg, first, repeats)
        results[part] = lab.computed(part, compute, model=model, seed=first, repeats=repeats)
    results["beyond"] = lab.computed("beyond", lambda: beyond(cfg, first), model=model, seed=first)
    for seed in lab.seeds:
        for init, found in results["loops"].items():
            compute = partial(loops_matter, cfg, seed, init)
            found.append(lab.computed(f"loops-{init[:3]}-{seed}", compute, model=model))
        results["growth"].append(lab.computed(f"growth-{seed}", partial(growth, seed)))
        for form, decay in arms():
            label = f"ablation-{form}-{decay}-{seed}".replace(" ", "-")
            compute = partial(ablation, form, decay, seed, steps)
            results["ablation"][f"{form}, {decay}"].append(lab.computed(label, compute, steps=steps))
    return results


EXPERIMENT = Experiment(
    title="The published verification, row by row",
    question="Do the figures published for an untrained mythos_1b on one machine hold here, and does a bounded A "
    "keep training alive where a free one dies?",
    protocol="""Everything runs in float32, on one CPU thread unless `--threads` says otherwise.

*Loops.* Fresh weights per seed, 128 random tokens, each number of loops against the run with 16: share of equal top
tokens, and KL(16 loops || n loops) in nats, mean over tokens. Two sets of initial values (ours; N(0, 0.02) for every
matrix, as in 0.5.0) and three outputs: the last state; ACT, whose weights sum to one; ACT as 0.5.0 computes it, which
loses what has not halted. Seed and tokens of the published run are not known.

*Stability.* Width 128, 8 loops, vocabulary 512, AdamW at 0.05 with torch's defaults, no clipping, 4 rows of 32 random
tokens a step (rows, heads and experts are not published). Three decays, bounded or free, in three forms:
`published` (0.5.0's initial values and its ACT), `mended` (the same values, with weights that sum to one) and `ours`
(our initial values too). The first repeats what was published, the others say which part of it matters.
Dead: a gradient norm below 1e-8, or none, at the last step.

*Growth.* The same small model with A forced, halting off, 64 tokens: 64 is not published, but a normalised state of
64 tokens of width 128 has a norm of sqrt(64 * 128) = 90.5, and 91 was published for every A.

*Latency and memory.* Calls in turns, lowest of the repeats; peak resident memory of the process. *ACT.* A halting
layer set by hand, so that tokens halt at different loops; control: the same halting, where a token that has halted is
computed on until all have. Tokens leave the computation as soon as a quarter has halted (compaction `counts`, which
reads no clock).""",
    cost=("1 min", "20 min"),
    run=run,
    report=verify_report,
)
