"""The manner of writing, as far as a machine can check it."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "open_mythos").rglob("*.py"))
PRONOUN = re.compile(r"Of |(These|Those|It|This|That|They)\.?$")
DIALECT = re.compile(
    r"\b(mended|(is|are|was|were) told|dealt out|in company|behaves otherwise|hangs? on the|does not hang on|twins?)\b",
    re.IGNORECASE,
)
COMMENTED = {"nn": 0.04, "ops": 0.04, "engine": 0.04}
"""Folders of algorithms, and the least share of their lines that have a comment."""


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every string that stands as a statement: docstrings, those of fields included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def test_docstrings_stand_alone() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text[:40]}"
        for path in MODULES
        for line, text in docstrings(path)
        if PRONOUN.match(text)
    ]
    assert not found


def test_plain_english() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "README.md", "CONTRIBUTING.md", "docs/*.md", ":!docs/results/*/*", "open_mythos/*.py",
         "open_mythos/*.html"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    found = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name in tracked
        if (ROOT / name).exists()
        for number, line in enumerate((ROOT / name).read_text("utf-8").splitlines(), 1)
        if DIALECT.search(line)
    ]
    assert not found


@pytest.mark.parametrize("folder", COMMENTED)
def test_algorithms_have_comments(folder: str) -> None:
    lines = [line for path in (ROOT / "open_mythos" / folder).glob("*.py") for line in path.read_text().splitlines()]
    commented = sum(bool(re.match(r"\s*#|.*\S  # ", line)) for line in lines)
    assert commented >= COMMENTED[folder] * len(lines)
