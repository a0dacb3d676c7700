"""What a run costs on given GPUs, from its configuration alone: nothing is built and nothing is allocated."""

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from open_mythos.accounting import Parameters, count_parameters
from open_mythos.checks import check_choice, check_int, check_number
from open_mythos.costs.depth_distribution import mean_loops
from open_mythos.costs.flops import StepFlops, step_flops
from open_mythos.costs.gpus import CARDS, RESERVED_SHARE, Card, link_gb_s
from open_mythos.costs.memory import Memory, micro_batches, peak, rows_at_once
from open_mythos.costs.saved_activations import execution_of
from open_mythos.nn.layer_costs import Execution
from open_mythos.train.config import TrainConfig

MOST_GPUS = 2**16


@dataclass(frozen=True)
class Plan:
    """Costs of a run. Units are in the names; figures of a step are those of all GPUs together unless they say so."""

    gpus: int
    gpu: str
    mfu: float
    steps: int
    tokens_per_step: int
    rows_at_once: int
    micro_batches: int
    parameters: Parameters
    mean_loops: float
    """Loops of a row. ACT may end them earlier, which is not counted."""
    mean_grad_loops: float
    flops_per_step: StepFlops
    memory: Memory
    """Memory of one GPU at the highest moment of the deepest step."""
    room_bytes: float
    """Memory of one GPU without the reserved share."""
    sent_bytes: dict[str, float]
    """Bytes that one GPU sends in a step, by kind of exchange."""
    send_s: float
    """Time of a step's exchanges if nothing else runs meanwhile."""
    slowest: float
    """Loops of the rank with the most, over the mean, averaged over steps: the others wait for it."""
    step_s: float
    """Time of a step at `mfu`, without sending and waiting."""
    flops_per_token: float
    tokens_per_s: float
    days: float
    gpu_hours: float
    price_per_hour: float | None
    price: float | None
    fits: bool
    remedy: str | None
    """Changes that make the run fit; None if it does."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        values = asdict(self)
        values["parameters"]["total"] = self.parameters.total
        values["memory"]["total"] = self.memory.total
        return values


def make_plan(
    cfg: TrainConfig, gpus: int = 8, gpu: str = "h100", mfu: float = 0.4, price_per_hour: float | None = None
) -> Plan:
    """Return the plan of a run.

    Args:
        mfu: share of the card's peak that the executed products reach, recomputed ones included.
        price_per_hour: price of one GPU.

    Raises:
        ValueError: the rows or experts cannot be spread over so many GPUs, or an argument is out of range.
    """
    check_choice("gpu", gpu, tuple(CARDS))
    check_number("mfu", mfu, 0, 1, above=True)
    if price_per_hour is not None:
        check_number("price_per_hour", price_per_hour, 0)
    _check_spread(cfg, gpus)
    if cfg.dtype == "auto":  # every card of the table has bfloat16
        cfg = replace(cfg, dtype="bfloat16")
    card, execution = CARDS[gpu], execution_of(cfg)
    loops, grad_loops = (mean_loops(cfg.loops, window) * cfg.batch_size for window in (False, True))
    if not cfg.model.recurrent_layers:
        loops = grad_loops = 0.0
    flops = step_flops(cfg, execution, loops, grad_loops)
    # With ddp each rank makes every update itself.
    alone = flops.optimizer if cfg.parallel.kind == "ddp" else flops.optimizer / gpus
    step_s = ((flops.total - flops.optimizer) / gpus + alone) / (mfu * _peak_flops(cfg, card))
    tokens, gpu_hours = cfg.batch_size * cfg.data.seq_len, cfg.steps * step_s / 3600 * gpus
    sent = sent_bytes(cfg, execution, gpus, loops, grad_loops)
    room = card.memory_gb * 1e9 * (1 - RESERVED_SHARE)
    memory = peak(cfg, execution, gpus)
    fits = memory.total <= room
    return Plan(
        gpus=gpus,
        gpu=gpu,
        mfu=mfu,
        steps=cfg.steps,
        tokens_per_step=tokens,
        rows_at_once=rows_at_once(cfg, gpus),
        micro_batches=micro_batches(cfg, gpus),
        parameters=count_parameters(cfg.model),
        mean_loops=loops / cfg.batch_size,
        mean_grad_loops=grad_loops / cfg.batch_size,
        flops_per_step=flops,
        memory=memory,
        room_bytes=room,
        sent_bytes=sent,
        send_s=sum(sent.values()) / (link_gb_s(card, gpus) * 1e9),
        slowest=_slowest(cfg, gpus),
        step_s=step_s,
        flops_per_token=flops.total / tokens,
        tokens_per_s=tokens / step_s,
        days=cfg.steps * step_s / 86400,
        gpu_hours=gpu_hours,
        price_per_hour=price_per_hour,
        price=None if price_per_hour is None else gpu_hours * price_per_hour,
        fits=fits,
        remedy=None if fits else _remedy(cfg, gpus, room),
    )


def sent_bytes(
    cfg: TrainConfig, execution: Execution, n_gpus: int, loops: float, grad_loops: float
) -> dict[str, float]:
    """Return the bytes that one rank sends in a step, by kind of exchange.

    In a ring each of n ranks sends (n - 1) / n of the data. All rows of the step run `loops` loops together,
    `grad_loops` of them with gradient.
    """
    counts, ranks = count_parameters(cfg.model), cfg.parallel.experts
    spread = counts.routed_experts if ranks > 1 else 0
    s, w = execution.state_bytes, execution.value_bytes

    def ring(values: float, n: float) -> float:
        return values * (n - 1) / n

    sent = {}
    if n_gpus > 1 and cfg.parallel.kind == "ddp":
        sent["all-reduce of gradients"] = 2 * s * ring(counts.total, n_gpus)
    elif n_gpus > 1:
        times = micro_batches(cfg, n_gpus)
        # Also the recurrent block is gathered once forward and once backward, however often it loops.
        sent["all-gather of weights"] = 2 * times * s * ring(counts.total - spread, n_gpus)
        sent["reduce-scatter of gradients"] = times * s * ring(counts.total - spread, n_gpus)
    if n_gpus > ranks > 1:
        sent["all-reduce of experts' gradients"] = 2 * s * ring(spread / ranks, n_gpus / ranks)
    if ranks > 1:
        model = cfg.model
        # To the experts in the stream's dtype and back in the products', for each of a token's choices.
        both_ways = model.n_experts_per_tok * model.dim * (s + w) * model.recurrent_layers
        passes = loops + grad_loops * (2 if cfg.checkpoint_loops else 1)
        sent["all-to-all of tokens"] = ring(both_ways, ranks) * passes * cfg.data.seq_len / n_gpus
    return sent


def _peak_flops(cfg: TrainConfig, card: Card) -> float:
    if cfg.dtype == "float64":
        raise ValueError("dtype='float64' is for checks, and no rate for it is known; use --dtype bfloat16")
    return 1e12 * (card.bf16_tflops if cfg.dtype == "bfloat16" else card.float32_tflops)


def _check_spread(cfg: TrainConfig, gpus: int) -> None:
    check_int("gpus", gpus, 1, MOST_GPUS)
    ranks = cfg.parallel.experts
    if cfg.batch_size % gpus:
        raise ValueError(
            f"batch_size={cfg.batch_size} rows cannot be shared out evenly over --gpus {gpus}; use a divisor of it"
        )
    if gpus % ranks:
        raise ValueError(f"--gpus {gpus} must be a multiple of parallel.experts={ranks}; use --gpus {ranks}")


def _slowest(cfg: TrainConfig, gpus: int, steps: int = 64) -> float:
    """Return `Plan.slowest`, from the depths that the run's first steps draw."""
    shares = [cfg.loops.depths(cfg.seed, step + cfg.loops.ramp_steps, cfg.batch_size) for step in range(steps)]
    work = np.stack(shares).reshape(steps, gpus, -1).sum(-1)
    return float((work.max(1) / work.mean(1)).mean())


def _remedy(cfg: TrainConfig, gpus: int, room: float) -> str:
    """Return the fewest changes that make the run fit, on more GPUs where nothing else does."""
    n = gpus
    while n <= MOST_GPUS and cfg.batch_size % n == 0:
        for flags, changed in _changes(cfg, n):
            if peak(changed, execution_of(changed), n).total <= room:
                return f"use {' '.join([f'--gpus {n}'] * (n > gpus) + flags)}"
        n *= 2
    counts = count_parameters(cfg.model)
    core = execution_of(cfg).state_bytes * (counts.core + counts.loop + counts.other_loops) / 1e9
    return (
        f"no number of these GPUs holds it: the recurrent block without its routed experts is {core:.1f} GB, which "
        "every GPU needs whole, and its gradient twice; use larger GPUs"
    )


def _changes(cfg: TrainConfig, gpus: int) -> list[tuple[list[str], TrainConfig]]:
    """Return configurations that need less memory, with the flags that make them: the fewest flags and most rows first.

    The first one is `cfg` itself.
    """
    now, model, rows = cfg.parallel, cfg.model, rows_at_once(cfg, gpus)
    recompute = not cfg.checkpoint_loops and cfg.compile != "model" and model.recurrent_layers
    ranks = (2**i for i in range(1, 10) if 2**i > now.experts and model.n_experts)
    # Flags of the same line exclude each other.
    options: list[dict[str, dict[str, Any]]] = [
        {f"--parallel.rows {rows >> i}": {"rows": rows >> i} for i in range(1, rows.bit_length())},
        {"--checkpoint-loops": {"checkpoint_loops": True}} if recompute else {},
        {"--parallel.kind fsdp": {"kind": "fsdp"}} if now.kind != "fsdp" and gpus > 1 else {},
        {f"--parallel.experts {n}": {"experts": n} for n in ranks if gpus % n == model.n_experts % n == 0},
    ]
    found = []
    for chosen in itertools.product(*([("", {}), *option.items()] for option in options)):
        fields = {name: value for _, changes in chosen for name, value in changes.items()}
        # Experts are spread with fsdp only.
        if "experts" in fields and fields.get("kind", now.kind) != "fsdp":
            continue
        again = fields.pop("checkpoint_loops", cfg.checkpoint_loops)
        changed = replace(cfg, parallel=replace(now, **fields), checkpoint_loops=again)
        found.append(([flag for flag, _ in chosen if flag], changed))
    return sorted(found, key=lambda pair: len(pair[0]))
