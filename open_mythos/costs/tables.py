"""The tables of `mythos info` and `mythos plan`."""

import difflib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from open_mythos.accounting import Parameters, count_parameters, flops_per_token, kv_bytes_per_token, n_layers
from open_mythos.config import MythosConfig
from open_mythos.costs.gpus import CARDS, RESERVED_SHARE, link_gb_s
from open_mythos.costs.plan import Plan
from open_mythos.variants import VARIANTS

LOOPS = (1, 4, 16)
TRAINING_BYTES = 16
"""Bytes of a parameter with Adam in mixed precision: float32 weight and two moments, bf16 weight and gradient."""
PAGE_TOKENS = 16
"""Tokens of the engine's pages, by default."""
ROWS, MOST_KV_BYTES = 32, 10_000_000_000
"""Keys and values that `info` counts by default: so many full contexts, as in the engine, but at most so many bytes."""
REQUEST_TOKENS = 1024
"""Tokens, prompt and answer, of the requests that `info` counts."""


def print_info(model: str, gpu_gb: float, vocab_size: int | None = None, kv_gb: float | None = None) -> None:
    """Print the costs of a variant or of a model folder, with another vocabulary than its own if one is given.

    Raises:
        ValueError: neither a variant nor a folder has that name, or a number is out of range.
    """
    if not gpu_gb > 0:
        raise ValueError(f"gpu_gb={gpu_gb} must be above 0; use 80")
    if kv_gb is not None and not 0 < kv_gb < math.inf:
        raise ValueError(f"kv_gb={kv_gb} must be a finite number above 0; use 10")
    name, cfg = _find(model)
    tables = []
    if vocab_size is not None:
        own, cfg = cfg, replace(cfg, vocab_size=vocab_size)
        tables.append(_vocabularies(name, own, cfg))
    contexts = ROWS * cfg.max_seq_len * kv_bytes_per_token(cfg, cfg.max_loop_iters)
    kv_bytes = min(MOST_KV_BYTES, contexts) if kv_gb is None else int(kv_gb * 1e9)
    for table in (*tables, _parameters_of(name, cfg), _per_token(cfg), _memory_of(cfg, gpu_gb), _pages(cfg, kv_bytes)):
        Console(highlight=False).print(table)


def print_plan(name: str, plan: Plan) -> None:
    """Print the costs of a run, with a warning if it does not fit."""
    console = Console(highlight=False)
    total, *parts = [(label.strip(), f"{count:,}") for label, count in _counts(plan.parameters)]
    parameters, sent = _rows(f"{name}: parameters", [*parts, total]), [_sent(plan)] if plan.sent_bytes else []
    for table in (parameters, _memory(plan), _flops(plan), *sent, _time(plan)):
        console.print(table)
    if plan.slowest > 1.05:
        console.print(
            f"Depths differ between GPUs: the one with the most loops has {plan.slowest:.2f} times the mean, and the "
            "others wait for it."
        )
    if not plan.fits:
        console.print(
            f"[bold red]Does not fit[/]: {plan.memory.total / 1e9:.1f} GB in {plan.memory.moment}, and one {plan.gpu} "
            f"has room for {plan.room_bytes / 1e9:.1f} GB; {plan.remedy}"
        )


def scaled(value: float, base: int, unit: str) -> str:
    """Write `value` with a unit prefix: powers of 1000 for FLOPs, of 1024 (KiB) for bytes."""
    power = min(6, int(math.log(value, base))) if value >= 1 else 0
    prefix = ("", *("kMGTPE" if base == 1000 else "KMGTPE"))[power] + "i" * (base == 1024 and power > 0)
    return f"{value / base**power:.4g} {prefix}{unit}"


def _rows(title: str, rows: Iterable[Sequence[str]], *head: str) -> Table:
    """Make a table whose columns, but for the first, are aligned right; without `head` it has none."""
    rows = list(rows)
    table = Table(title=title, title_justify="left", show_header=bool(head))
    for i, name in enumerate(head or [""] * len(rows[0])):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _counts(counts: Parameters) -> list[tuple[str, int]]:
    return [
        ("total", counts.total),
        ("  embedding, tied to the head", counts.embedding),
        ("  prelude", counts.prelude),
        ("  routed experts", counts.routed_experts),
        ("  rest of the recurrent block", counts.core + counts.loop + counts.other_loops),
        ("  coda and norms", counts.coda + counts.norms),
    ]


def _find(model: str) -> tuple[str, MythosConfig]:
    # A link that leads nowhere is there too, and is refused by name.
    if os.path.lexists(Path(model) / "config.json"):
        from open_mythos.convert.published import find_published
        from open_mythos.model_folder import read_config

        published = find_published(model)
        return model, read_config(model) if published is None else published.cfg
    short = model.removeprefix("mythos_")
    if short not in VARIANTS:
        near = difflib.get_close_matches(short, VARIANTS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"the variants are {', '.join(VARIANTS)}"
        raise ValueError(f"{model!r} is no variant and no folder with a config.json; {remedy}")
    return f"mythos_{short}", VARIANTS[short]()


def _vocabularies(name: str, *configs: MythosConfig) -> Table:
    sizes = [(cfg.vocab_size, counts.embedding, counts.total) for cfg in configs for counts in [count_parameters(cfg)]]
    labels = "its own", "this one, as below"
    rows = [(label, *(f"{n:,}" for n in each)) for label, each in zip(labels, sizes, strict=True)]
    return _rows(f"{name}: vocabularies", rows, "", "tokens", "embedding", "parameters")


def _parameters_of(name: str, cfg: MythosConfig) -> Table:
    counts = count_parameters(cfg)
    rows = [*_counts(counts), ("active for one token, without the embedding", counts.active)]
    if cfg.recurrent_layers:
        n_loops = cfg.max_loop_iters
        rows.append((f"unrolled: applied to one token at {n_loops} loops", counts.unrolled(n_loops)))
    share = {"total": "100 %"}
    listed = [(label, f"{n:,}", share.get(label, f"{100 * n / counts.total:.1f} %")) for label, n in rows]
    return _rows(f"{name}: parameters", listed)


def _per_token(cfg: MythosConfig) -> Table:
    rows = []
    for n_loops in LOOPS if cfg.recurrent_layers else (1,):
        kv = kv_bytes_per_token(cfg, n_loops)
        flops = [scaled(flops_per_token(cfg, n_loops, n), 1000, "FLOP") for n in (0, cfg.max_seq_len)]
        rows.append((str(n_loops), *flops, *(scaled(n, 1024, "B") for n in (kv, kv * cfg.max_seq_len))))
    with_context = f"FLOPs with {cfg.max_seq_len:,} tokens of context"
    head = "loops", "FLOPs, forward", with_context, "cache in bf16", "cache of a full context"
    return _rows("per token", rows, *head)


def _memory_of(cfg: MythosConfig, gpu_gb: float) -> Table:
    total = count_parameters(cfg).total
    full_context = kv_bytes_per_token(cfg, cfg.max_loop_iters) * cfg.max_seq_len
    sizes = {
        "weights in float32": 4 * total,
        "weights in bf16": 2 * total,
        "weights in int8": total,
        f"serving in bf16: weights and one full context at {cfg.max_loop_iters} loops": 2 * total + full_context,
        f"training with Adam, {TRAINING_BYTES} bytes a parameter, without activations": TRAINING_BYTES * total,
    }
    rows = [(label, scaled(n, 1024, "B"), f"{math.ceil(n / (gpu_gb * 1e9)):,}") for label, n in sizes.items()]
    if all(n_gpus == "1" for *_, n_gpus in rows):  # a column of ones would say nothing
        return _rows(f"memory; one GPU of {gpu_gb:g} GB holds each", [row[:2] for row in rows], "for", "bytes")
    return _rows("memory", rows, "for", "bytes", f"GPUs of {gpu_gb:g} GB")


def _pages(cfg: MythosConfig, kv_bytes: int) -> Table:
    """Make the table of what the engine has room for: tokens in pages of PAGE_TOKENS, one page per layer and loop."""
    most = cfg.max_loop_iters if cfg.recurrent_layers else 1
    page = kv_bytes_per_token(cfg, most) // n_layers(cfg, most) * PAGE_TOKENS
    n_pages, outside = kv_bytes // page, kv_bytes_per_token(cfg, 0)
    lengths = sorted({min(REQUEST_TOKENS, cfg.max_seq_len), cfg.max_seq_len})
    rows = []
    for n_loops in sorted({n for n in LOOPS if n < most} | {most}):
        blocks = n_pages // n_layers(cfg, n_loops)
        requests = [f"{blocks // math.ceil(n / PAGE_TOKENS):,}" for n in lengths]
        token_bytes = scaled(kv_bytes_per_token(cfg, n_loops), 1024, "B")
        rows.append((str(n_loops), token_bytes, f"{blocks * PAGE_TOKENS:,}", *requests))
    title = (
        f"{scaled(kv_bytes, 1000, 'B')} of keys and values in bf16: {n_pages:,} pages of {scaled(page, 1024, 'B')}; a "
        f"token takes {scaled(kv_bytes_per_token(cfg, 1) - outside, 1024, 'B')} per loop and "
        f"{scaled(outside, 1024, 'B')} in {n_layers(cfg, 0)} layers outside the loop"
    )
    head = "loops", "bytes of a token", "tokens", *(f"requests of {n:,} tokens" for n in lengths)
    return _rows(title, rows, *head)


def _memory(plan: Plan) -> Table:
    sizes = {name: n_bytes for name, n_bytes in plan.memory.parts.items() if n_bytes}
    sizes["[bold]total[/]"] = plan.memory.total
    sizes[f"room: {CARDS[plan.gpu].memory_gb:g} GB less {RESERVED_SHARE:.0%} for CUDA"] = plan.room_bytes
    rows = [(name, f"{n_bytes / 1e9:,.2f} GB") for name, n_bytes in sizes.items()]
    return _rows(f"memory of one GPU at its highest, in {plan.memory.moment}", rows)


def _flops(plan: Plan) -> Table:
    flops = plan.flops_per_step
    parts = {
        "prelude and coda": flops.once,
        f"loops, {plan.mean_loops:.2f} on average, {plan.mean_grad_loops:.2f} with gradient": flops.loop,
        "head": flops.head,
        "recomputed loops and layers": flops.recomputed,
        "Muon": flops.optimizer,
        "total": flops.total,
    }
    rows = [(name, scaled(n / plan.tokens_per_step, 1000, "FLOP")) for name, n in parts.items() if n]
    return _rows("FLOPs of a training step, per token", rows)


def _sent(plan: Plan) -> Table:
    rows = [(name, scaled(n_bytes, 1000, "B")) for name, n_bytes in plan.sent_bytes.items()]
    rate = link_gb_s(CARDS[plan.gpu], plan.gpus)
    rows.append((f"alone, at {rate:g} GB/s", f"{plan.send_s:.3g} s, beside {plan.step_s:.3g} s of computing"))
    return _rows("sent by one GPU in a step", rows)


def _time(plan: Plan) -> Table:
    rows = [
        ("tokens of a step", f"{plan.tokens_per_step:,}"),
        ("rows at once on one GPU", f"{plan.rows_at_once}, {plan.micro_batches} times a step"),
        ("tokens per second", f"{plan.tokens_per_s:,.0f}"),
        ("steps", f"{plan.steps:,} of {plan.step_s:.3g} s"),
        ("tokens", scaled(plan.steps * plan.tokens_per_step, 1000, "")),
        ("days", f"{plan.days:,.2f}"),
        ("GPU-hours", f"{plan.gpu_hours:,.1f}"),
    ]
    if plan.price is not None:
        rows.append(("price", f"{plan.price:,.0f}"))
    return _rows(f"time on {plan.gpus} x {plan.gpu} at {plan.mfu:.0%} of their peak, without waiting", rows)
