"""Write docs/modules.md from the first line of every module: python docs/make_modules.py."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "open_mythos"
PAGE = ROOT / "docs/modules.md"
HEAD = """# Modules

One line per module, its own first line: `python docs/make_modules.py` writes this page, and a test holds it current.
Imports point one way; `tests/repo/test_structure.py` has the layers.
"""


def first_line(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    return (doc or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def section(folder: Path) -> str:
    """A heading, the folder's own line and a table of its modules."""
    name = folder.relative_to(ROOT).as_posix()
    modules = [path for path in sorted(folder.glob("*.py")) if path.name not in ("__init__.py", "__main__.py")]
    lines = [f"## `{name}/`", "", first_line(folder / "__init__.py"), ""]
    if modules:
        lines += ["| module | |", "|---|---|", *(f"| `{path.name}` | {first_line(path)} |" for path in modules), ""]
    return "\n".join(lines)


def page() -> str:
    folders = [PACKAGE, *sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))]
    return "\n".join([HEAD, *map(section, folders)])


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
