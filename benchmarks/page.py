"""Pages of docs/results: measured tables between two marks, prose written by hand around them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- written by python -m benchmarks -->", "<!-- end of what it has written -->"


def write_page(path: Path, text: str, title: str) -> Path:
    """Put text between the marks of a page; a page that does not exist gets a title.

    Raises:
        ValueError: the page lacks the marks.
    """
    page = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n\n{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    if END not in rest:
        raise ValueError(f"{path} lacks the marks {BEGIN!r} and {END!r}; put them where the figures go")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{BEGIN}\n\n{text.rstrip()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return path


def table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Write a Markdown table of rows of cells."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]
