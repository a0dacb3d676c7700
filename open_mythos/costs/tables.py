"""The report of `mythos plan`."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from open_mythos.costs.gpus import CARDS, RESERVED_SHARE, link_gb_s
from open_mythos.costs.info import scaled
from open_mythos.costs.plan import Plan


def print_plan(name: str, plan: Plan) -> None:
    """Print what a run costs, and a warning if it does not fit."""
    console = Console(highlight=False)
    tables = [_parameters(name, plan), _memory(plan), _flops(plan), _time(plan)]
    if plan.sent_bytes:
        tables.insert(3, _sent(plan))
    for table in tables:
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


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _parameters(name: str, plan: Plan) -> Table:
    counts = plan.parameters
    rows = [
        ("embedding, tied to the head", counts.embedding),
        ("prelude", counts.prelude),
        ("routed experts", counts.routed_experts),
        ("rest of the recurrent block", counts.core + counts.loop + counts.other_loops),
        ("coda and norms", counts.coda + counts.norms),
        ("total", counts.total),
    ]
    return _table(f"{name}: parameters", [(label, f"{count:,}") for label, count in rows])


def _memory(plan: Plan) -> Table:
    rows = [(name, _gb(n_bytes)) for name, n_bytes in plan.memory.parts.items() if n_bytes]
    rows.append(("[bold]total[/]", f"[bold]{_gb(plan.memory.total)}[/]"))
    memory_gb = CARDS[plan.gpu].memory_gb
    rows.append((f"room: {memory_gb:g} GB less {RESERVED_SHARE:.0%} for CUDA", _gb(plan.room_bytes)))
    return _table(f"memory of one GPU at its highest, in {plan.memory.moment}", rows)


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.2f} GB"


def _flops(plan: Plan) -> Table:
    flops, tokens = plan.flops_per_step, plan.tokens_per_step
    rows = [
        ("prelude and coda", flops.once),
        (f"loops, {plan.mean_loops:.2f} on average, {plan.mean_grad_loops:.2f} with gradient", flops.loop),
        ("head", flops.head),
        ("recomputed loops and layers", flops.recomputed),
        ("Muon", flops.optimizer),
        ("total", flops.total),
    ]
    shown = [(name, scaled(n / tokens, 1000, "FLOP")) for name, n in rows if n]
    return _table("FLOPs of a training step, per token", shown)


def _sent(plan: Plan) -> Table:
    rows = [(name, scaled(n_bytes, 1000, "B")) for name, n_bytes in plan.sent_bytes.items()]
    rate = link_gb_s(CARDS[plan.gpu], plan.gpus)
    rows.append((f"alone, at {rate:g} GB/s", f"{plan.send_s:.3g} s, beside {plan.step_s:.3g} s of computing"))
    return _table("sent by one GPU in a step", rows)


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
    return _table(f"time on {plan.gpus} x {plan.gpu} at {plan.mfu:.0%} of their peak, without waiting", rows)
