"""The tables and figures of the pages performance and engine, made from the recorded results alone.

A page begins with an overview of all machines; each machine has a page of its own with every case.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.case import Results
from benchmarks.cases import reach_of
from benchmarks.cases.engine import AT_ONCE, DROPPED, FIXED, OURS, POLICIES, SIMPLE, SUBJECTS, TOGETHER
from benchmarks.overview import draw_overview, overview
from benchmarks.page import table, write_page
from benchmarks.stats import Spread, differs
from open_mythos.reports.figures import Curve, draw_curves

Record = dict[str, Any]
Cases = dict[str, Record]
CLOCKS = {
    "cpu": "CPU time of one thread, which other jobs disturb least; the ratio in wall time stands beside it",
    "wall": "wall time",
    "device": "the device's, between two events",
}
SWEEPS = {"tokens": "tokens of one row, 8 loops", "loops": "loops, 256 tokens", "rows": "rows of 64 tokens, 8 loops"}


def write_report(folder: Path) -> Path:
    """Write a page for each machine whose results are in the folder, and the overview beside it, under its name."""
    machines = {path.stem: Results(path).data for path in sorted(folder.glob("*.json"))}
    for name, data in machines.items():
        if curves := data["cases"].get("scaling", {}).get("curves"):
            draw_scaling(curves, folder / f"{name}-scaling.png")
        if policies := _of(data["cases"], "exits"):
            for ending in (".png", ".svg"):
                draw_policies(policies, folder / f"{name}-throughput{ending}")
        title = f"{folder.name.capitalize()}: {data['machine'].get('cpu', name)}"
        write_page(folder / f"{name}.md", render(data, folder.name, name), title)
    draw_overview(machines, folder.name, folder / "overview.svg")
    return write_page(folder.with_suffix(".md"), overview(machines, folder.name), folder.name.capitalize())


def render(data: Record, page: str, stem: str) -> str:
    """Write the tables of one machine; `stem` begins the names of its files."""
    cases: Cases = data["cases"]
    lines = []
    if any(case["made_by"]["quick"] for case in cases.values()):
        lines = ["**Made with `--quick`: this shows that the harness runs. No figure here is to be quoted.**", ""]
    for title, section in ENGINE if page == "engine" else PERFORMANCE:
        if found := section(data, stem):
            lines += [*([f"## {title}", ""] if title else []), *found, ""]
    return "\n".join(lines)


# The page of comparisons.


def _comparisons(data: Record, stem: str) -> list[str]:
    cases: Cases = data["cases"]
    runs = {(case["made_by"]["device"], case["made_by"]["threads"]) for case in cases.values()}
    clocks = sorted({"device" if device == "cuda" else "cpu" if n == 1 else "wall" for device, n in runs})
    rows = []
    for name, case in cases.items():
        if case["error"]:
            reason = case["error"].splitlines()[0].replace("|", "\\|")
            rows.append([f"{case['title']} (`{name}`)", f"no figure: {reason}", *[""] * 8])
        rows += [_row(name if row["id"].removesuffix(".checkout") == name else "", row) for row in case.get("rows", ())]
    columns = ("case", "peer = 1", "ours", "figure", "reach", "met", "quartiles (all) of n pairs")
    columns += ("same command against itself", "wall", "share of the limit: peer, ours")
    return [f"Times are {'; '.join(CLOCKS[c] for c in clocks)}.", "", *table(columns, rows)]


def _row(name: str, row: Record) -> list[str]:
    reach, value, unit = reach_of(row["id"]), row["value"], row["unit"]
    spread, noise = (Spread(**row[which]) if row[which] else None for which in ("spread", "noise"))
    met = [] if reach is None else ["yes" if reach.met(value) else "no"]
    met += ["no difference shown"] if unit == "x" and noise is not None and not differs(value, noise) else []
    form = {"x": "**{:.2f}**", "share": "**{:.0%}**" if value >= 0.01 else "**{:.2%}**"}.get(unit, "**{:.3g}** {}")
    return [
        f"{row['what']} (`{name}`)" if name else row["what"],
        *(row["peer"], row["ours"], form.format(value, unit).rstrip(), reach.text(unit) if reach else ""),
        "; ".join(met),
        f"{_quartiles(spread)}, n={spread.n}" if spread else "",
        _quartiles(noise) if noise else "",
        f"{row['wall']:.2f}" if row["wall"] is not None else "",
        ", ".join(share for share in (row["peer_share"], row["ours_share"]) if share),
    ]


def _quartiles(spread: Spread) -> str:
    return f"{spread.q1:.2f}-{spread.q3:.2f} ({spread.min:.2f}-{spread.max:.2f})"


def _machine(data: Record, stem: str) -> list[str]:
    machine = data["machine"]
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
    return table(("", ""), rows.items())


def _scaling(data: Record, stem: str) -> list[str]:
    if not (curves := data["cases"].get("scaling", {}).get("curves")):
        return []
    rows = [
        (sweep, size, f"{1e3 * time['median']:.4g} ms", f"{deviation:+.0%}")
        for sweep, curve in curves.items()
        for size, time, deviation in zip(curve["sizes"], curve["times"], curve["deviations"], strict=True)
    ]
    lines = [f"![time against size, with the line fitted to it]({stem}-scaling.png)", ""]
    return lines + table(("sweep", "size", "time", "over the line's"), rows)


def draw_scaling(curves: Record, path: Path) -> None:
    """Draw time against size in three panels, as measured and as the fitted line has it."""
    panels = {}
    for sweep, curve in curves.items():
        low, median, high = ([time[which] for time in curve["times"]] for which in ("q1", "median", "q3"))
        line = Curve(curve["sizes"], curve["line"], "line in FLOPs", None)
        panels[SWEEPS[sweep]] = [line, Curve(curve["sizes"], median, "median, quartiles", 0, low, high, points=True)]
    draw_curves(panels, path, ("size", "seconds of one forward pass"), columns=len(panels), log="xy")


def _case(name: str, case: Record, machine: Record) -> list[str]:
    made = case["made_by"]
    lines = [f"### {name}", "", case["protocol"], ""]
    if case["error"]:
        return [*lines, f"No figure: {case['error'].splitlines()[0]}", ""]
    if gate := case["gate"]:
        parts = [f"{kind} within {gate[kind]:.1e}" for kind in ("forward", "gradients") if gate[kind] is not None]
        parts += ["tokens equal"] if gate["forward"] is None else []
        parts += [f"{gate['loops']} loops on both sides"] if gate["loops"] else []
        lines.append(f"- Gate: {', '.join(parts)}; draw {gate['seed']} of the inputs.")
    lines += [f"- {side}: {_side(found, machine)}" for side, found in case["sides"].items()]
    lines += [f"- {note}" for note in case["notes"]]
    against = f" against {made['against']}" if made.get("against") else ""
    where = f"{case['seconds']:.0f} s, {made['device']}, {made['threads']} thread(s)"
    load = "load {:.1f} before and {:.1f} after".format(*case["load"])
    return [*lines, f"- Commit {case['commit']}{against}, {case['date']}, {where}, {load}.", ""]


def _side(found: Record, machine: Record) -> str:
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
            share = found["flops"] / found["seconds"] / peak
            parts.append(f"{share:.0%} of what the machine's largest float32 products reach")
    if "bytes_per_token" in found:
        parts.append(f"{found['bytes']:,.0f} bytes, {found['bytes_per_token']:,.0f} per token")
    if "flops_per_token" in found:
        parts.append(f"{found['flops_per_token'] / 1e6:.1f} MFLOP per token")
    if "peak_bytes" in found:
        parts.append(f"peak memory {found['peak_bytes'] / 2**20:,.0f} MiB")
    return ", ".join(parts or ["nothing besides the figure"]) + "."


def _products(data: Record, stem: str) -> list[str]:
    rates: dict[tuple[int, ...], dict[str, float]] = {}
    for case in data["cases"].values():
        limits = {} if case["error"] else case["limits"]
        for shape, found in zip(limits.get("shapes", ()), limits.get("rates", ()), strict=True):
            for kernel, rate in found.items():
                best = rates.setdefault(tuple(shape), {})
                best[kernel] = max(rate, best.get(kernel, 0.0))
    if not rates:
        return ["None measured."]
    kernels = sorted({kernel for found in rates.values() for kernel in found})
    rows = [(*shape, *(f"{found[k] / 1e9:.0f}" for k in kernels)) for shape, found in sorted(rates.items())]
    return ["GFLOP/s in float32; x is (m, k), the weight (n, k).", "", *table(("m", "k", "n", *kernels), rows)]


Section = Callable[[Record, str], list[str]]
PERFORMANCE: list[tuple[str, Section]] = [
    ("", _comparisons),
    ("Machine", _machine),
    ("Cost as work grows", _scaling),
    ("Cases", lambda data, _: [s for item in data["cases"].items() for s in _case(*item, data["machine"])]),
    ("Matrix products by shape", _products),
]

# The engine's page. Records of one kind are known by a name that only they have among their curves.


def _of(cases: Cases, name: str) -> list[Record]:
    return [case["curves"] for case in cases.values() if not case["error"] and name in case["curves"]]


def _groups(policies: list[Record]) -> dict[tuple[str, str], list[Record]]:
    keys = dict.fromkeys((case["subject"], case["law"]) for case in policies)
    return {key: [case for case in policies if (case["subject"], case["law"]) == key] for key in keys}


def draw_policies(policies: list[Record], path: Path) -> None:
    """Draw tokens per second by requests in work, a panel for each model and law, a curve for each policy."""
    panels = {}
    for (subject, law), group in _groups(policies).items():
        places = [case["n_rows"] for case in group]
        panels[f"{subject}, {law}"] = curves = []
        for policy in POLICIES[:-1]:
            low, rate, high = ([case["rates"][policy][which] for case in group] for which in ("q1", "median", "q3"))
            curves.append(Curve(places, rate, policy, 0, low, high))
    places = sorted({case["n_rows"] for case in policies})
    draw_curves(panels, path, ("requests in work", "tokens per second"), columns=3, ticks=places, log="xy")


def _summary(data: Record, stem: str) -> list[str]:
    """Compare every figure that is to reach something with its bound, the worst case by name."""
    found: dict[tuple[str, str], list[tuple[float, str, bool]]] = {}
    for case in data["cases"].values():
        for row in case.get("rows", ()):
            if (reach := reach_of(row["id"])) is not None:
                signed = row["value"] if reach.at_most else -row["value"]
                figures = found.setdefault((row["what"], reach.text("x")), [])
                figures.append((signed, case["title"], reach.met(row["value"])))
    rows = []
    for (what, text), values in found.items():
        worst, where, _ = max(values)
        middle = sorted(abs(value) for value, _, _ in values)[len(values) // 2]
        n_met = sum(met for _, _, met in values)
        met = "yes" if n_met == len(values) else f"no ({n_met} of {len(values)})"
        rows.append((what, text, f"**{abs(worst):.2f}**", where, f"{middle:.2f}", met))
    return table(("what", "reach", "worst", "where", "median of all", "met"), rows)


POLICY_COLUMNS = ("R", "ours, tok/s", "(a) fixed", "(b) all done", "(c) dropped", "at once", "ours over (a)", "limit")
POLICY_COLUMNS += ("share", "best threshold", "ours over the best of (a)-(c)", "over at once", "itself", "mean loops")
POLICY_COLUMNS += ("L, O in ms",)


def _policy_row(case: Record) -> list[str]:
    """Write the cells of POLICY_COLUMNS."""
    rates = [f"{case['rates'][policy]['median']:,.0f}" for policy in (OURS, FIXED, TOGETHER, DROPPED, AT_ONCE)]
    over_fixed, over_best, over_at_once, itself = (
        "**{median:.2f}** ({q1:.2f}-{q3:.2f})".format(**case[name])
        for name in ("over_fixed", "over_best", "over_at_once", "noise")
    )
    best = f"({'abc'[SIMPLE.index(case['best'])]}) {over_best}"
    limits = [f"{case['limit']:.2f}", f"{case['share']:.0%}", f"{case['threshold']:.2f} ({case['threshold_rows']})"]
    costs = f"{1e3 * case['loop_s']:.3g}, {1e3 * case['outer_s']:.3g}"
    own = [best, over_at_once, itself, f"{case['depths'][OURS]:.2f}", costs]
    return [str(case["n_rows"]), *rates, over_fixed, *limits, *own]


def _policies(data: Record, stem: str) -> list[str]:
    if not (policies := _of(data["cases"], "exits")):
        return []
    lines = [f"![tokens per second by requests in work, for each policy]({stem}-throughput.svg)", ""]
    for (subject, law), group in _groups(policies).items():
        title = SUBJECTS[subject][0]
        lines += [f"### {title[0].upper()}{title[1:]}, {law}", "", *table(POLICY_COLUMNS, map(_policy_row, group)), ""]
    most = max(case["n_rows"] for case in policies)
    costs = {case["subject"]: case["costs"] for case in policies if case["n_rows"] == most}
    rows = [
        (subject, what, *(f"{1e3 * cost[i]:.3g}" for cost in measured.values()))
        for subject, measured in costs.items()
        for i, what in enumerate(("a loop", "all around the loops"))
    ]
    sizes = [f"{n} tokens" for n in next(iter(costs.values()))]
    return [*lines, "### Costs measured at the start, in ms", "", *table(("model", "of", *sizes), rows)]


def _other_cases(data: Record, stem: str) -> list[str]:
    cases = {name: case for name, case in data["cases"].items() if "exits" not in case.get("curves", {})}
    return _comparisons({"cases": cases}, stem) if cases else []


def _runs(data: Record, stem: str) -> list[str]:
    cases, machine, failures = data["cases"], data["machine"], []
    dates, commits = ({case[name] for case in cases.values()} for name in ("date", "commit"))
    load = [max(each) for each in zip(*(case["load"] for case in cases.values()), strict=True)] or [0.0, 0.0]
    line = (
        f"{machine.get('cpu', 'unknown processor')}, {machine.get('cores', '?')} cores, one thread, torch "
        f"{machine.get('torch', '?')}; {', '.join(sorted(dates))}, commit {', '.join(sorted(commits))}; "
        f"{len(cases)} cases in {sum(case['seconds'] for case in cases.values()) / 60:.0f} minutes; the machine's load "
        f"at most {load[0]:.1f} before and {load[1]:.1f} after a case."
    )
    errors = {name: case["error"].splitlines()[0] for name, case in cases.items() if case["error"]}
    for error in dict.fromkeys(errors.values()):
        names = ", ".join(f"`{name}`" for name, own in errors.items() if own == error)
        failures.append(f"- No figure for {names}: {error}")
    return [line, "", *failures]


ENGINE: list[tuple[str, Section]] = [
    ("", _summary),
    ("", _policies),
    ("Beside others, without batch invariance, and beside deep requests", _other_cases),
    ("Runs", _runs),
]
