"""performance.md, from results.json alone."""

from pathlib import Path
from typing import Any

from benchmarks.draw import draw_scaling
from benchmarks.reach import REACH
from benchmarks.results import Results
from benchmarks.stats import Spread, differs

COLUMNS = (
    "case",
    "peer = 1",
    "ours",
    "figure",
    "reach",
    "met",
    "quartiles (all) of n pairs",
    "same command against itself",
    "wall",
    "share of the limit: peer, ours",
)

INTRODUCTION = """\
What the package costs beside open-mythos 0.5.0, beside models of transformers, and beside what the machine can do.
Written by `python -m benchmarks` from [results.json]({folder}/results.json).

- A figure without a unit is the peer's time over ours. Each side is a process of its own; they are called in turn, one
  at a time, and the figure is the median of the ratios of neighbouring calls. Times are {clock}.
- Before any timing both sides compute on copied weights and the same inputs: outputs within 1e-5, gradients within 1e-4
  of the largest value, greedy tokens and loops run equal. Otherwise there is no figure. The halting layer gives every
  token the probability 1/n, so that all n loops run and the weights of the states sum to 1 on both sides.
- "Itself" is the same ratio of ours against ours. A figure nearer to 1 than its farther quartile is no difference.
- The limit is what the same work would take at the machine's best: each matrix product at the FLOP/s that the better of
  two library kernels reaches at its shape (in training also the shapes of the gradients), attention's products counted
  as causal; in decoding, the bytes of all weights met, every loop anew, and of the cache, at the rate of memory. It is
  measured in the same rounds. Weights that stay in a processor's cache can exceed it.
- Where the time goes, by operator, for cases that miss their reach: `python -m benchmarks.profiles CASE...`, kept under
  `profiles.md` beside results.json.
"""

CLOCKS = {
    "cpu": "CPU time of one thread, which other jobs disturb least; the ratio in wall time stands beside it",
    "wall": "wall time",
    "device": "the device's, between two events",
}

AGAIN = """\
```console
python -m benchmarks --list                    # the cases
python -m benchmarks --out {out}               # all that the folder does not hold of this code yet
python -m benchmarks --cases train_mid decode_128 --fresh
python -m benchmarks --report --out {out}      # this page again
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python -m benchmarks --out runs/avx2
```

`make bench` is the second line in the environment of `make setup`; `BENCH='--quick'` passes options. The peers are
installed by pip into `benchmarks/.peers` when they are first needed. Expect hours for all cases.
"""


def write_report(results: Results, out: Path) -> Path:
    """Write the figures into the folder of the results, and the report beside it, under its name."""
    curves = results.data["cases"].get("scaling", {}).get("curves")
    if curves:
        draw_scaling(curves, out / "scaling.png")
    path = out.with_suffix(".md")
    path.write_text(render(results.data, out.name), encoding="utf-8")
    return path


def render(data: dict[str, Any], folder: str) -> str:
    """The report's text; `folder` is where figures are, seen from the report."""
    cases: dict[str, dict[str, Any]] = data["cases"]
    runs = {(case["made_by"]["device"], case["made_by"]["threads"]) for case in cases.values()}
    clocks = sorted({"device" if device == "cuda" else "cpu" if n == 1 else "wall" for device, n in runs})
    lines = ["# Performance", "", INTRODUCTION.format(folder=folder, clock="; ".join(CLOCKS[c] for c in clocks))]
    if any(case["made_by"]["quick"] for case in cases.values()):
        lines += ["**Made with `--quick`: this shows that the harness runs. No figure here is to be quoted.**", ""]
    lines += [_table(COLUMNS), *(line for name, case in cases.items() for line in _rows(name, case)), ""]
    lines += ["## Machine", "", *_machine(data["machine"]), ""]
    if curves := cases.get("scaling", {}).get("curves"):
        lines += ["## Cost as work grows", "", *_scaling(curves, folder), ""]
    lines += ["## Cases", "", *(line for name, case in cases.items() for line in _case(name, case, data["machine"]))]
    lines += ["## Matrix products by shape", "", *_products(cases), ""]
    lines += ["## Run it again", "", AGAIN.format(out=f"docs/results/{folder}").rstrip()]
    return "\n".join(lines) + "\n"


def _table(columns: tuple[str, ...]) -> str:
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def _rows(name: str, case: dict[str, Any]) -> list[str]:
    if case["error"]:
        reason = case["error"].splitlines()[0].replace("|", "\\|")
        return [f"| {case['title']} (`{name}`) | no figure: {reason} |{' |' * (len(COLUMNS) - 2)}"]
    return [_row(name if row["id"] == name else "", row) for row in case["rows"]]


def _row(name: str, row: dict[str, Any]) -> str:
    reach = REACH.get(row["id"])
    spread, noise = _spread(row["spread"]), _spread(row["noise"])
    shares = [share for share in (row["peer_share"], row["ours_share"]) if share]
    cells = [
        f"{row['what']} (`{name}`)" if name else row["what"],
        row["peer"],
        row["ours"],
        _value(row["value"], row["unit"]),
        reach.text(row["unit"]) if reach else "",
        _met(row, noise),
        _numbers(spread) + (f", n={spread.n}" if spread else ""),
        _numbers(noise),
        f"{row['wall']:.2f}" if row["wall"] is not None else "",
        ", ".join(shares),
    ]
    return f"| {' | '.join(cells)} |"


def _met(row: dict[str, Any], noise: Spread | None) -> str:
    met = "" if (reach := REACH.get(row["id"])) is None else "yes" if reach.met(row["value"]) else "no"
    if row["unit"] == "x" and noise is not None and not differs(row["value"], noise):
        return f"{met}; no difference shown" if met else "no difference shown"
    return met


def _value(value: float, unit: str) -> str:
    if unit == "x":
        return f"**{value:.2f}**"
    if unit == "share":
        return f"**{value:.0%}**" if value >= 0.01 else f"**{value:.2%}**"
    return f"**{value:.3g}** {unit}".rstrip()


def _spread(values: dict[str, Any] | None) -> Spread | None:
    return Spread(**values) if values else None


def _numbers(spread: Spread | None) -> str:
    return f"{spread.q1:.2f}-{spread.q3:.2f} ({spread.min:.2f}-{spread.max:.2f})" if spread else ""


def _machine(machine: dict[str, Any]) -> list[str]:
    if not machine:
        return ["Not recorded."]
    limits = machine["limits"]
    worker, stream = limits["worker"], limits["stream"]
    rates = [
        f"{dtype} {kernel} {max(shape[kernel] for shape in shapes) / 1e9:,.0f}"
        for dtype, shapes in limits["products"].items()
        for kernel in shapes[0]
    ]
    environment = ", ".join(f"{name}={value}" for name, value in machine["environment"].items()) or "none"
    rows = {
        "processor": f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['flags'])}",
        "memory": f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        "GPU": worker["gpu"] or "none",
        "torch": f"{worker['torch']}, {worker['threads']} threads, kernels for {worker['cpu_capability']}",
        "Python": machine["python"],
        "libraries' variables set": environment,
        "largest matrix products, GFLOP/s": ", ".join(rates),
        "memory, GB/s": f"read {stream['read'] / 1e9:.1f}, copy (read and written) {stream['copy'] / 1e9:.1f}",
    }
    return [_table(("", "")), *(f"| {name} | {value} |" for name, value in rows.items())]


def _scaling(curves: dict[str, Any], folder: str) -> list[str]:
    lines = [f"![time against size, with the line fitted to it]({folder}/scaling.png)", ""]
    lines += [_table(("sweep", "size", "time", "over the line's"))]
    for sweep, curve in curves.items():
        for size, time, deviation in zip(curve["sizes"], curve["times"], curve["deviations"], strict=True):
            lines.append(f"| {sweep} | {size} | {1e3 * time['median']:.4g} ms | {deviation:+.0%} |")
    return lines


def _case(name: str, case: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    made = case["made_by"]
    lines = [f"### {name}", "", case["protocol"], ""]
    if case["error"]:
        return [*lines, f"No figure: {case['error'].splitlines()[0]}", ""]
    if gate := case["gate"]:
        parts = [f"{kind} within {gate[kind]:.1e}" for kind in ("forward", "gradients") if gate[kind] is not None]
        parts += ["tokens equal"] if gate["forward"] is None else []
        parts += [f"{gate['loops']} loops on both sides"] if gate["loops"] else []
        lines.append(f"- Gate: {', '.join(parts)}; draw {gate['seed']} of the inputs.")
    for side, found in case["sides"].items():
        lines.append(f"- {side}: {_side(found, machine)}")
    lines += [f"- {note}" for note in case["notes"]]
    lines.append(
        f"- Commit {case['commit']}, {case['date']}, {case['seconds']:.0f} s, {made['device']}, {made['threads']} "
        f"thread(s), load {case['load'][0]:.1f} before and {case['load'][1]:.1f} after."
    )
    return [*lines, ""]


def _side(found: dict[str, Any], machine: dict[str, Any]) -> str:
    parts = [f"{found['parameters']:,} parameters"] if "parameters" in found else []
    for clock in ("cpu", "wall", "device"):
        if clock in found:
            spread = Spread(**found[clock])
            parts.append(f"{clock} {1e3 * spread.median:.4g} ms ({1e3 * spread.q1:.4g}-{1e3 * spread.q3:.4g})")
    for what, unit in (("flops", "GFLOP"), ("bytes", "GB")):
        if found.get(what) and "seconds" in found:
            parts.append(f"{found[what] / 1e9:.4g} {unit} at {found[what] / 1e9 / found['seconds']:.3g} {unit}/s")
    if "tokens_per_s" in found:
        parts.append(f"{found['tokens_per_s']:,.0f} tok/s")
        if machine and "flops" in found:
            peak = max(rate for shape in machine["limits"]["products"]["float32"] for rate in shape.values())
            parts.append(
                f"{found['flops'] / found['seconds'] / peak:.0%} of what the machine's largest float32 products reach"
            )
    if "bytes_per_token" in found:
        parts.append(f"{found['bytes']:,.0f} bytes, {found['bytes_per_token']:,.0f} per token")
    if "flops_per_token" in found:
        parts.append(f"{found['flops_per_token'] / 1e6:.1f} MFLOP per token")
    if "peak_bytes" in found:
        parts.append(f"peak memory {found['peak_bytes'] / 2**20:,.0f} MiB")
    return ", ".join(parts or ["nothing besides the figure"]) + "."


def _products(cases: dict[str, dict[str, Any]]) -> list[str]:
    rates: dict[tuple[int, ...], dict[str, float]] = {}
    for case in cases.values():
        limits = {} if case["error"] else case["limits"]
        for shape, found in zip(limits.get("shapes", ()), limits.get("rates", ()), strict=True):
            for kernel, rate in found.items():
                best = rates.setdefault(tuple(shape), {})
                best[kernel] = max(rate, best.get(kernel, 0.0))
    if not rates:
        return ["None measured."]
    kernels = sorted({kernel for found in rates.values() for kernel in found})
    lines = ["GFLOP/s in float32; x is (m, k), the weight (n, k).", "", _table(("m", "k", "n", *kernels))]
    for shape, found in sorted(rates.items()):
        lines.append(f"| {' | '.join(map(str, shape))} | {' | '.join(f'{found[k] / 1e9:.0f}' for k in kernels)} |")
    return lines
