"""The house rules that a machine can check: layering, light import, file size, names, and what may not be written."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import open_mythos

PACKAGE = "open_mythos"
ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
FOLDERS = [PACKAGE, "tests", "benchmarks", "docs", "training", ".ci"]
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".html", ".json", ""}
TEXTS = sorted(
    path
    for path in [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    if path.is_file() and path.suffix in TEXT_SUFFIXES and not {"__pycache__", ".peers"} & set(path.parts)
)

# A module may import from its own part and from the layers below. What is not named here stands between nn and model.
LAYERS: dict[str, int] = {
    "assets": 0,
    "checks": 0,
    "files": 0,
    "extras": 0,
    "device": 1,
    "config": 1,
    "ops": 2,
    "nn": 3,
    "tokenization": 3,
    "convert": 5,
    "compile": 4,
    "generation": 5,
    "model": 6,
    "data": 6,
    "reports": 6,
    "costs": 9,
    "tasks": 7,
    "engine": 8,
    "train": 8,
    "analysis": 9,
    "evals": 9,
    "server": 9,
    "hf": 9,
    "recipes": 9,
    "experiments": 10,
    "cli": 11,
    "__main__": 12,
}
UNNAMED = 4
# The public names, the command as a module, and the 0.5.0 import path: they hold no logic and may import all.
FACADES = {"__init__", "__main__", "main"}
HEAVY = ["transformers", "huggingface_hub", "fastapi", "uvicorn", "matplotlib", "pyarrow", "tyro", "rich", "pandas"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_parts(path: Path) -> set[str]:
    """The top-level parts of the package (`nn`, `model`, ...) that a module imports, wherever the statement stands."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")}
    return parts


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]
    if own in FACADES:
        return
    for part in imported_parts(path) - {own}:
        below = LAYERS.get(part, UNNAMED) < LAYERS.get(own, UNNAMED)
        assert below, f"{relative(path)} may not import {PACKAGE}.{part}"


def test_import_is_light() -> None:
    """Also with the public names loaded, but for those of training, which shows its progress with rich."""
    names = set(open_mythos.__all__) - {"Study", "TrainConfig", "Trainer", "load_recipe"}
    code = f"import sys; from {PACKAGE} import {', '.join(names)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(done.stdout.split())


def test_few_modules_stand_loose() -> None:
    """A new one goes into the folder of its job."""
    assert len(list((ROOT / PACKAGE).glob("*.py"))) <= 13


def test_files_stay_short() -> None:
    longest = 450
    lengths = {relative(path): len(path.read_text().splitlines()) for path in TEXTS if path.suffix == ".py"}
    assert not {name: n for name, n in lengths.items() if n > longest}, "split by job, not by size"


def test_file_names_say_something() -> None:
    banned = {"utils", "util", "helpers", "misc", "common"}
    assert not [relative(path) for path in TEXTS if path.stem in banned]


def test_source_is_ascii() -> None:
    assert not [relative(path) for path in TEXTS if path.suffix == ".py" and not path.read_text("utf-8").isascii()]


def test_nothing_is_unpickled() -> None:
    unsafe = re.compile(r"\bpickle\b|\btorch\.load\(|\bweights_only\b|trust_remote_code=True")
    assert not [relative(path) for path in MODULES if unsafe.search(path.read_text())]


def test_no_absolute_paths() -> None:
    absolute = re.compile(r"(?<![\w.])/(?:work|root|tmp|home)/")
    assert not [relative(path) for path in TEXTS if absolute.search(path.read_text("utf-8"))]


def test_functions_and_modules_stay_short() -> None:
    long = []
    for path in MODULES:
        text = path.read_text()
        long += [relative(path)] if len(text.splitlines()) > 400 else []
        functions = (
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        )
        long += [f"{relative(path)}: {f.name}" for f in functions if (f.end_lineno or 0) - f.lineno >= 60]
    assert not long
