"""The report of `mythos info`."""

import difflib
import math
import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from open_mythos.accounting import count_parameters, flops_per_token, kv_bytes_per_token, n_layers
from open_mythos.config import MythosConfig
from open_mythos.variants import VARIANTS

LOOPS = (1, 4, 16)
TRAINING_BYTES = 16
"""Per parameter with Adam in mixed precision: float32 weight and two moments, bf16 weight and gradient."""
PAGE_TOKENS = 16
"""Of the engine's pages, unless told otherwise."""
ROWS, MOST_KV_BYTES = 32, 10_000_000_000
"""The keys and values that are looked at, unless told otherwise: of so many full contexts, the engine's default, but at
most so many bytes."""
REQUEST_TOKENS = 1024
"""Prompt and answer of the requests that are counted."""


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
    console = Console(highlight=False)
    if vocab_size is not None:
        other = replace(cfg, vocab_size=vocab_size)
        console.print(_vocabularies(name, (cfg, other)))
        cfg = other
    console.print(_parameters(name, cfg))
    console.print(_per_token(cfg))
    console.print(_memory(cfg, gpu_gb))
    contexts = ROWS * cfg.max_seq_len * kv_bytes_per_token(cfg, cfg.max_loop_iters)
    console.print(_pages(cfg, min(MOST_KV_BYTES, contexts) if kv_gb is None else int(kv_gb * 1e9)))


def _find(model: str) -> tuple[str, MythosConfig]:
    # A link that leads nowhere is there too, and is refused by name.
    if os.path.lexists(Path(model) / "config.json"):
        from open_mythos.model_folder import read_config

        return model, read_config(model)
    short = model.removeprefix("mythos_")
    if short not in VARIANTS:
        near = difflib.get_close_matches(short, VARIANTS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"the variants are {', '.join(VARIANTS)}"
        raise ValueError(f"{model!r} is no variant and no folder with a config.json; {remedy}")
    return f"mythos_{short}", VARIANTS[short]()


def _vocabularies(name: str, configs: tuple[MythosConfig, MythosConfig]) -> Table:
    table = Table(title=f"{name}: vocabularies", title_justify="left")
    table.add_column("")
    for column in ("tokens", "embedding", "parameters"):
        table.add_column(column, justify="right")
    for label, cfg in zip(("its own", "this one, as below"), configs, strict=True):
        counts = count_parameters(cfg)
        table.add_row(label, f"{cfg.vocab_size:,}", f"{counts.embedding:,}", f"{counts.total:,}")
    return table


def _parameters(name: str, cfg: MythosConfig) -> Table:
    counts = count_parameters(cfg)
    rest = counts.core + counts.loop + counts.other_loops
    table = Table(title=f"{name}: parameters", title_justify="left", show_header=False)
    rows = [
        ("total", counts.total, "100 %"),
        ("  embedding, tied to the head", counts.embedding, _share(counts.embedding, counts.total)),
        ("  prelude", counts.prelude, _share(counts.prelude, counts.total)),
        ("  routed experts", counts.routed_experts, _share(counts.routed_experts, counts.total)),
        ("  rest of the recurrent block", rest, _share(rest, counts.total)),
        ("  coda and norms", counts.coda + counts.norms, _share(counts.coda + counts.norms, counts.total)),
        ("active for one token, without the embedding", counts.active, _share(counts.active, counts.total)),
    ]
    if cfg.recurrent_layers:
        n_loops = cfg.max_loop_iters
        unrolled = counts.unrolled(n_loops)
        rows.append((f"unrolled: applied to one token at {n_loops} loops", unrolled, _share(unrolled, counts.total)))
    for label, count, share in rows:
        table.add_row(label, f"{count:,}", share)
    return table


def _per_token(cfg: MythosConfig) -> Table:
    table = Table(title="per token", title_justify="left")
    table.add_column("loops", justify="right")
    table.add_column("FLOPs, forward")
    table.add_column(f"FLOPs with {cfg.max_seq_len:,} tokens of context")
    table.add_column("cache in bf16")
    table.add_column("cache of a full context")
    for n_loops in LOOPS if cfg.recurrent_layers else (1,):
        kv = kv_bytes_per_token(cfg, n_loops)
        table.add_row(
            str(n_loops),
            scaled(flops_per_token(cfg, n_loops), 1000, "FLOP"),
            scaled(flops_per_token(cfg, n_loops, cfg.max_seq_len), 1000, "FLOP"),
            scaled(kv, 1024, "B"),
            scaled(kv * cfg.max_seq_len, 1024, "B"),
        )
    return table


def _memory(cfg: MythosConfig, gpu_gb: float) -> Table:
    total = count_parameters(cfg).total
    full_context = kv_bytes_per_token(cfg, cfg.max_loop_iters) * cfg.max_seq_len
    table = Table(title="memory", title_justify="left")
    table.add_column("for")
    table.add_column("bytes", justify="right")
    rows = [
        ("weights in float32", 4 * total),
        ("weights in bf16", 2 * total),
        ("weights in int8", total),
        (f"serving in bf16: weights and one full context at {cfg.max_loop_iters} loops", 2 * total + full_context),
        (f"training with Adam, {TRAINING_BYTES} bytes a parameter, without activations", TRAINING_BYTES * total),
    ]
    n_gpus = [math.ceil(n_bytes / (gpu_gb * 1e9)) for _, n_bytes in rows]
    # A column of ones says nothing.
    if max(n_gpus) > 1:
        table.add_column(f"GPUs of {gpu_gb:g} GB", justify="right")
    else:
        table.title = f"memory; one GPU of {gpu_gb:g} GB holds each"
    for (label, n_bytes), n in zip(rows, n_gpus, strict=True):
        table.add_row(label, scaled(n_bytes, 1024, "B"), *([f"{n:,}"] if max(n_gpus) > 1 else []))
    return table


def _pages(cfg: MythosConfig, kv_bytes: int) -> Table:
    """What the engine has room for: tokens in pages of PAGE_TOKENS, one page per layer and loop."""
    outside, most = n_layers(cfg, 0), cfg.max_loop_iters if cfg.recurrent_layers else 1
    page = kv_bytes_per_token(cfg, most) // n_layers(cfg, most) * PAGE_TOKENS
    n_pages = kv_bytes // page
    inside = kv_bytes_per_token(cfg, 1) - kv_bytes_per_token(cfg, 0)
    table = Table(
        title=f"{scaled(kv_bytes, 1000, 'B')} of keys and values in bf16: {n_pages:,} pages of "
        f"{scaled(page, 1024, 'B')}; a token takes {scaled(inside, 1024, 'B')} per loop and "
        f"{scaled(kv_bytes_per_token(cfg, 0), 1024, 'B')} in {outside} layers outside the loop",
        title_justify="left",
    )
    lengths = sorted({min(REQUEST_TOKENS, cfg.max_seq_len), cfg.max_seq_len})
    for column in ("loops", "bytes of a token", "tokens", *(f"requests of {n:,} tokens" for n in lengths)):
        table.add_column(column, justify="right")
    for n_loops in sorted({n for n in LOOPS if n < most} | {most}):
        blocks = n_pages // n_layers(cfg, n_loops)
        requests = [f"{blocks // math.ceil(n / PAGE_TOKENS):,}" for n in lengths]
        kv = scaled(kv_bytes_per_token(cfg, n_loops), 1024, "B")
        table.add_row(str(n_loops), kv, f"{blocks * PAGE_TOKENS:,}", *requests)
    return table


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def scaled(value: float, base: int, unit: str) -> str:
    """`value` with a unit prefix: powers of 1000 for FLOPs, of 1024 (KiB) for bytes."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
    power = min(len(prefixes) - 1, int(math.log(value, base))) if value >= 1 else 0
    return f"{value / base**power:.4g} {prefixes[power]}{unit}"
