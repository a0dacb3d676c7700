"""What engine.md says of speed, from results.json alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.draw import draw_policies
from benchmarks.engine.policies import AGAIN, AT_ONCE, DROPPED, FIXED, OURS, POLICIES, SIMPLE, TOGETHER
from benchmarks.engine.reach import REACH, Figures
from benchmarks.engine.subjects import SUBJECTS

BEGIN, END = "<!-- written by python -m benchmarks.engine -->", "<!-- end of what it has written -->"
Cases = dict[str, dict[str, Any]]

HOW = """\
Written by `python -m benchmarks.engine` from [results.json]({folder}/results.json). A figure is the median of ratios
of neighbouring windows, with its quartiles; times are CPU time of one thread.

- **Load.** R requests are in work at any time and R more wait; one that ends is replaced in the same step. Each has a
  prompt of 17 tokens, of which 16 are found in reused pages, and takes 64 new ones, drawn at temperature 1 from its
  own seed; contexts are spread evenly over 17 to 81 tokens. No window holds the computation of a prompt.
- **Window.** From a read-out to the first one after {seconds:g} s. To stop at a number of tokens would favour the
  shallow ones, but with one row, where windows are of 32 tokens for each second, the same for all policies. Policies
  take turns, {rounds} windows each, and every round begins with another one.
- **Laws.** A token's depth is read off its state before the first loop: uniform over 1 to 16, or geometric with mean
  4, cut at 16. So it is the same alone, in any batch and in `generate`. The trained model leaves by its own rule.
- **Policies**, all on this engine: (a) every token at full depth; (b) every row goes on until all are done; (c) rows
  that are done are dropped, read out when all are done; at once: read out after every loop in which one is done.
  Ours: when the costs measured at the start say so. (b) and (a) compute other tokens than the rest, at depths of the
  same law. The best of (a) to (c) is picked after the fact.
- **Gate.** Every answer finished by ours, (c) and at once has the same tokens and loops, one of them also alone in an
  engine of its own, and there in float64 the same as from `generate`. Otherwise there is no figure.
- **Limit** over (a), after Amdahl: (n L + O) / (d L + O) with n the most loops and d the mean depth of the tokens
  that ours executed; L is what a loop of R rows costs and O all that surrounds the loops of R tokens (coda, head,
  sampling, scheduling, embedding, prelude), both read off the steps of (a): those that only loop, and those that read
  out too.
- **Best threshold**: what reading out whenever so many rows have exited (in brackets) can reach over (a) at best,
  simulated on the costs measured at the start and the depths that ours executed. Less than the limit: to read out few
  rows costs nearly as much as to read out many, and so does a loop that some rows wait for.
- **Itself**: a second engine of ours with other seeds, over ours. It holds the luck of the depths as well.
"""

COMMANDS = """
```console
python -m benchmarks.engine --list
python -m benchmarks.engine --out {out}                                # all that the folder does not hold of this code
python -m benchmarks.engine --cases "heavy, geometric" modes --fresh    # those whose names begin so, again
python -m benchmarks.engine --trained runs/adaptive-text/final --cases trained
```
"""


def write_report(data: dict[str, Any], out: Path) -> Path:
    """Draw the figure into the folder, and write the page beside it; what stands outside of the marks is kept."""
    cases: Cases = data["cases"]
    if policies := _of(cases, "Policies"):
        draw_policies(_curves(policies), out / "throughput")
    path = out.with_suffix(".md")
    page = path.read_text(encoding="utf-8") if path.exists() else f"# The engine\n\n{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    if END not in rest:
        raise ValueError(f"{path} lacks the marks {BEGIN!r} and {END!r}; put them where the figures go")
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{render(data, out.name)}\n{END}{after}", encoding="utf-8")
    return path


def render(data: dict[str, Any], folder: str) -> str:
    """The figures as text; `folder` is where the images are, seen from the page."""
    cases: Cases = data["cases"]
    run = next((case["run"] for case in cases.values()), {"seconds": 0, "rounds": 0})
    lines = [HOW.format(folder=folder, **run)]
    if any(case["made_by"]["quick"] for case in cases.values()):
        lines += ["**Made with `--quick`: this shows that everything runs. No figure here is to be quoted.**", ""]
    lines += [*_summary(cases), ""]
    if policies := _of(cases, "Policies"):
        lines += [f"![tokens per second by requests in work, for each policy]({folder}/throughput.svg)", ""]
        for (subject, law), group in _groups(policies).items():
            lines += [f"### {SUBJECTS[subject].title[0].upper()}{SUBJECTS[subject].title[1:]}, {law}", ""]
            lines += [*_policies(group), ""]
        lines += ["### Costs measured at the start, in ms", "", *_costs(policies), ""]
    for kind, title, part in PARTS:
        if found := _of(cases, kind):
            lines += [title, "", *part(found), ""]
    lines += ["### Runs", "", *_runs(data), *COMMANDS.format(out=f"docs/results/{folder}").splitlines()]
    return "\n".join(lines)


def _of(cases: Cases, kind: str) -> list[dict[str, Any]]:
    return [case for case in cases.values() if case["kind"] == kind and not case["error"]]


def _groups(policies: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in policies:
        groups.setdefault((case["subject"], case["law"]), []).append(case)
    return groups


def _curves(policies: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, dict[str, Any]]]]]:
    """Panels of curves of (rows, spread of tokens per second)."""
    return {
        f"{subject}, {law}": {
            policy: [(case["rows"], case["rates"][policy]) for case in group] for policy in POLICIES if policy != AGAIN
        }
        for (subject, law), group in _groups(policies).items()
    }


def _summary(cases: Cases) -> list[str]:
    figures: Figures = {kind: _of(cases, kind) for kind in ("Policies", "Fairness")}
    lines = _table("what", "reach", "worst", "where", "median of all", "met")
    for reach in REACH:
        found = reach.read(figures)
        if not found:
            lines.append(_row(reach.what, reach.text, "not measured", "", "", ""))
            continue
        value, where = reach.worst(found)
        middle = sorted(value for value, _ in found)[len(found) // 2]
        n_met = sum(reach.met(value) for value, _ in found)
        met = "yes" if n_met == len(found) else f"no ({n_met} of {len(found)})"
        lines.append(_row(reach.what, reach.text, f"**{value:.2f}**", where, f"{middle:.2f}", met))
    return lines


def _policies(group: list[dict[str, Any]]) -> list[str]:
    lines = _table(
        "R",
        "ours, tok/s",
        "(a) fixed",
        "(b) all done",
        "(c) dropped",
        "at once",
        "ours over (a)",
        "limit",
        "share",
        "best threshold",
        "ours over the best of (a)-(c)",
        "over at once",
        "itself",
        "mean loops",
        "L, O in ms",
    )
    for case in group:
        rates = [f"{case['rates'][policy]['median']:,.0f}" for policy in (OURS, FIXED, TOGETHER, DROPPED, AT_ONCE)]
        best = "abc"[SIMPLE.index(case["best"])]
        lines.append(
            _row(
                str(case["rows"]),
                *rates,
                _ratio(case["over_fixed"]),
                f"{case['limit']:.2f}",
                f"{case['share']:.0%}",
                f"{case['threshold']:.2f} ({case['threshold_rows']})",
                f"({best}) {_ratio(case['over_best'])}",
                _ratio(case["over_at_once"]),
                _ratio(case["noise"]),
                f"{case['depths'][OURS]:.2f}",
                f"{1e3 * case['loop_s']:.3g}, {1e3 * case['outer_s']:.3g}",
            )
        )
    return lines


def _costs(policies: list[dict[str, Any]]) -> list[str]:
    most = max(case["rows"] for case in policies)
    by_subject = {case["subject"]: case["costs"] for case in policies if case["rows"] == most}
    lines = _table("model", "of", *(f"{n} tokens" for n in next(iter(by_subject.values()))))
    for subject, costs in by_subject.items():
        for i, what in enumerate(("a loop", "all around the loops")):
            lines.append(_row(subject, what, *(f"{1e3 * cost[i]:.3g}" for cost in costs.values())))
    return lines


def _others(found: list[dict[str, Any]]) -> list[str]:
    flops = " and ".join(f"{name} {value / 1e6:.1f}" for name, value in found[0]["flops"].items())
    lines = [
        "The loop-heavy model's shape. `generate` takes one request after another, by the same rule; the others R in "
        "one call, the best token each. Of every one decoding alone is timed: a call with 17 new tokens (`generate`: "
        f"64) less one with 1. 0.5.0 runs all 16 loops. MFLOP per token: {flops}.",
        "",
        *_table("R", "law of ours", "ours, tok/s", "against", "tok/s", "ours over it"),
    ]
    for case in found:
        for law, over in case["over"].items():
            for name, ratio in over.items():
                rates = [f"{case['rates'][key]['median']:,.1f}" for key in (f"engine, {law}", name)]
                peer = name.partition(", " + law)[0]
                lines.append(_row(str(case["rows"]), law, rates[0], peer, rates[1], _ratio(ratio)))
    return lines


def _modes(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Tokens per second with `batch_invariant` on over those with it off, geometric depths; each with costs of its "
        "own.",
        "",
        *_table("model", "R", "on, tok/s", "off, tok/s", "on over off", "on against itself"),
    ]
    for case in found:
        rates = [f"{case['rates'][name]['median']:,.0f}" for name in ("on", "off")]
        ratio = _ratio(case["on_over_off"])
        lines.append(_row(case["subject"], str(case["rows"]), *rates, ratio, _ratio(case["noise"])))
    return lines


def _fairness(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "32 rows, the loop-heavy model. Clients ask again as soon as their answer of 16 tokens is complete, and "
        "both loads run 32 loop-tokens in every loop (but where a client asks again and nobody waits): *mixed*, "
        "half of the clients at 1 loop and half at 16; *shallow*, all at 1 (each deep answer replaced by 16 shallow "
        "ones). Gap: time between two tokens of a shallow request. Turnaround and wait (to the first token) are "
        "counted in loop-tokens executed, over the ideal of a whole answer: every client gets an equal part of "
        "them, at most one a loop.",
        "",
        *_table("clients", "p95 gap, mixed", "p95 gap, shallow", "mixed over shallow", "shallow against itself"),
    ]
    for case in found:
        gaps = [f"{1e3 * case['p95'][name]['median']:.3g} ms" for name in ("mixed", "shallow")]
        lines.append(_row(str(case["clients"]), *gaps, _ratio(case["over_shallow"]), _ratio(case["noise"])))
    lines += ["", *_table("clients", "request", "answers", "turnaround: median, longest", "wait: median, longest")]
    for case in found:
        for name, kind in case["kinds"].items():
            spans = [_longest(kind[what]) for what in ("turnaround", "wait")]
            lines.append(_row(str(case["clients"]), name, str(kind["answers"]), *spans))
    return lines


PARTS: tuple[tuple[str, str, Callable[[list[dict[str, Any]]], list[str]]], ...] = (
    ("Others", "### Beside others", _others),
    ("Modes", "### The same bits whatever the neighbours", _modes),
    ("Fairness", "### Shallow requests beside deep ones", _fairness),
)


def _runs(data: dict[str, Any]) -> list[str]:
    cases: Cases = data["cases"]
    machine = data["machine"]
    dates, commits = ({case[name] for case in cases.values()} for name in ("date", "commit"))
    load = [max(each) for each in zip(*(case["load"] for case in cases.values()), strict=True)] or [0.0, 0.0]
    lines = [
        f"{machine.get('cpu', 'unknown processor')}, {machine.get('cores', '?')} cores, one thread, torch "
        f"{machine.get('torch', '?')}; {', '.join(sorted(dates))}, commit {', '.join(sorted(commits))}; "
        f"{len(cases)} cases in {sum(case['seconds'] for case in cases.values()) / 60:.0f} minutes; the machine's load "
        f"at most {load[0]:.1f} before and {load[1]:.1f} after a case.",
        "",
    ]
    failed: dict[str, list[str]] = {}
    for name, case in cases.items():
        if case["error"]:
            failed.setdefault(case["error"].splitlines()[0], []).append(f"`{name}`")
    lines += [f"- No figure for {', '.join(names)}: {error}" for error, names in failed.items()]
    return lines


def _table(*columns: str) -> list[str]:
    return [_row(*columns), "|---" * len(columns) + "|"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _ratio(spread: dict[str, Any]) -> str:
    return f"**{spread['median']:.2f}** ({spread['q1']:.2f}-{spread['q3']:.2f})"


def _longest(spread: dict[str, Any] | None) -> str:
    return f"{spread['median']:.2f}, {spread['max']:.2f}" if spread else "none complete"
