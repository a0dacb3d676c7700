"""performance.md, from results.json alone."""

from pathlib import Path
from typing import Any

from benchmarks.reach import REACH
from benchmarks.results import Results
from benchmarks.stats import Spread, differs

HEADER = (
    "| case | row | peer = 1 | ours | ratio | reach | met | spread: min, quartiles, max | same command against itself "
    "| wall | share of limit, peer | ours |"
)


def write_report(results: Results, out: Path) -> Path:
    """Write the report beside the folder of the results, under its name."""
    path = out.with_suffix(".md")
    path.write_text(render(results.data), encoding="utf-8")
    return path


def render(data: dict[str, Any]) -> str:
    """The report's text."""
    cases: dict[str, dict[str, Any]] = data["cases"]
    lines = ["# Performance", "", HEADER, "|---" * HEADER.count(" |") + "|"]
    for name, case in cases.items():
        if case["error"]:
            lines.append(f"| {name} | no figure: {case['error']} |" + " |" * (HEADER.count(" |") - 2))
        else:
            lines += [_row(name, row) for row in case["rows"]]
    return "\n".join(lines) + "\n"


def _row(name: str, row: dict[str, Any]) -> str:
    reach = REACH.get(row["id"])
    spread, noise = _spread(row["spread"]), _spread(row["noise"])
    met = ""
    if reach:
        met = "yes" if reach.met(row["value"]) else "no"
        if row["unit"] == "x" and noise and not differs(row["value"], noise):
            met = "no difference shown"
    wall = f"{row['wall']:.2f}" if row["wall"] is not None else ""
    cells = [
        name,
        row["what"],
        row["peer"],
        row["ours"],
        f"{row['value']:.3g}",
        reach.text(row["unit"]) if reach else "",
        met,
        _numbers(spread),
        _numbers(noise),
        wall,
        row["peer_share"],
        row["ours_share"],
    ]
    return "| " + " | ".join(cells) + " |"


def _spread(values: dict[str, Any] | None) -> Spread | None:
    return Spread(**values) if values else None


def _numbers(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.min:.2f}, {spread.q1:.2f} to {spread.q3:.2f}, {spread.max:.2f} (n={spread.n})"
