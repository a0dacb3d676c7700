"""The page of `python -m benchmarks.gpu`."""

from typing import Any

from benchmarks.page import table


def render(data: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    lines = [
        f"On `{data['device']}`, {data['seconds']:.0f} s. "
        + ("**A rehearsal: no figure means anything.**" if data["device"] == "cpu" else "")
    ]
    for name, section in data["sections"].items():
        lines += ["", f"## {name}: {section['state']}", "", section["what"], ""]
        lines += [f"`{section['error']}`", ""] if "error" in section else []
        lines += table(("figure", "value"), ((k, _cell(v)) for k, v in section["figures"].items()))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """Write a figure; of a spread, the median and the quartiles."""
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.4g} ({value['q1']:.4g} to {value['q3']:.4g})"
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_cell(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
