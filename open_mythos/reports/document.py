"""A report in four forms: report.json, report.md, the figures, and report.html, which has all of it in one file."""

import base64
import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from open_mythos.files import write_text


@dataclass(frozen=True)
class Table:
    """A table; head and cells are written with `str`, so an `Estimate` shows its interval."""

    head: Sequence[Any]
    rows: Sequence[Sequence[Any]]

    def __str__(self) -> str:
        """Write the table as Markdown; a cell's own bar would begin another cell, so it is escaped."""
        lines = [[str(cell).replace("|", "\\|") for cell in line] for line in (self.head, *self.rows)]
        lines.insert(1, ["---"] * len(self.head))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Figure:
    """A picture; `draw` writes it as the kind of file that the path's ending names: .png and .svg."""

    name: str
    caption: str
    draw: Callable[[Path], None]

    def __str__(self) -> str:
        """Write the picture and its caption as Markdown."""
        return f"![{self.caption}]({self.name}.png)\n\n*{self.caption}*"


Part = str | Table | Figure
"""A piece of a report; text is Markdown."""


@dataclass(frozen=True)
class Report:
    """What was found, with its tables and figures; a front page shows the finding and the first figure."""

    finding: str
    """One or two sentences with the numbers that matter."""
    parts: Sequence[Part]


def write_record(results: dict[str, Any], report: Report, out: Path, numbers: str = "report.json") -> None:
    """Write the report as Markdown and HTML with its figures, and `results` with the finding into the file `numbers`.

    Args:
        results: the texts and the origin that the report states (see `_markdown`), and the raw numbers. A `note` may
            say what else a reader of this record has to know.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / numbers, json.dumps(_strict(results | {"finding": report.finding})) + "\n")
    figures = [part for part in report.parts if isinstance(part, Figure)]
    for figure in figures:
        for ending in ("png", "svg"):
            figure.draw(out / f"{figure.name}.{ending}")
    text = _markdown(results, report)
    write_text(out / "report.md", text)
    write_text(out / "report.html", _html(results["title"], text, out, figures))


def _strict(value: Any) -> Any:
    """Replace infinity and NaN, as of a run that diverged, by null: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(results: dict[str, Any], report: Report) -> str:
    quick = " This is the quick form: its numbers show that everything works, and claim nothing." * results["quick"]
    made = (
        f"Command: `{results['command']}`; commit {', '.join(results['commits'])}; {results['machine']}; "
        f"seeds {', '.join(map(str, results['seeds']))}.{quick}"
    )
    parts = [
        f"# {results['title']}",
        f"**Question.** {results['question']}",
        f"**Finding.** {report.finding}",
        made,
        *([results["note"]] if "note" in results else []),
        "## Protocol",
        results["protocol"],
        *map(str, report.parts),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .85rem; margin: 1rem 0; }
th, td { border: 1px solid #8886; padding: .25rem .5rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: white; border-radius: 4px; }
code { font-size: .9em; overflow-wrap: anywhere; }
"""


def _html(title: str, text: str, out: Path, figures: Sequence[Figure]) -> str:
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for figure in figures:
        data = base64.b64encode((out / f"{figure.name}.svg").read_bytes()).decode()
        body = body.replace(f'src="{figure.name}.png"', f'src="data:image/svg+xml;base64,{data}"')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>{html.escape(title)}</title><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )
