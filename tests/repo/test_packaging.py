"""What is installed: declared dependencies, tested versions, and the files that are not Python."""

import ast
import hashlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

from open_mythos.assets import novel


def declared(repo_root: Path) -> dict:
    return tomllib.loads((repo_root / "pyproject.toml").read_text())


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower() for line in requirements}


def test_constraints_pin_exactly_what_make_setup_installs(repo_root: Path) -> None:
    project = declared(repo_root)["project"]
    extras = project["optional-dependencies"]
    lines = [line for line in (repo_root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "names and versions only, no address"
    assert names(lines) == names(project["dependencies"] + extras["plot"] + extras["test"])


SAFE_FROM = {
    "torch": "2.6",  # CVE-2025-32434: torch.load
    "numpy": "1.16.3",  # CVE-2019-6446: np.load unpickles by default
    "pyyaml": "5.4",  # CVE-2020-14343: loaders that run code
    "markdown-it-py": "2.2",  # CVE-2023-26302, CVE-2023-26303: input that ends it
    "pyarrow": "14.0.1",  # CVE-2023-47248: files that run code
    "fastapi": "0.109.1",  # CVE-2024-24762: input that stops it
    "starlette": "0.49.1",  # CVE-2024-47874, CVE-2025-54121, CVE-2025-62727: requests that stop it
    "h11": "0.16",  # CVE-2025-43859: chunks that a proxy reads otherwise
    "pydantic": "2.4",  # CVE-2024-3772: input that stops it
}
"""First releases without known faults, of what reads other people's files and requests."""
USED_BY = {"serve": ["server", "cli/serve.py"], "data": ["data/hub.py", "data/parquet.py"]}
NAMES = {"yaml": "pyyaml", "markdown_it": "markdown-it-py", "prometheus_client": "prometheus-client"}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def bounds(requirements: list[str]) -> dict[str, tuple[int, ...]]:
    """The lower bound of each, which has to be there."""
    found = {}
    for line in requirements:
        match = re.match(r"([\w.-]+)>=([\d.]+)", line)
        assert match, f"{line} has no lower bound"
        found[match[1].lower()] = version(match[2])
    return found


def test_what_is_installed_is_new_enough(repo_root: Path) -> None:
    """Every dependency of the package, its server and its readers has a lower bound, with all known fixes."""
    project = declared(repo_root)["project"]
    extras = project["optional-dependencies"]
    lower = bounds(project["dependencies"] + extras["serve"] + extras["data"])
    assert lower.keys() >= SAFE_FROM.keys()
    for name, first in SAFE_FROM.items():
        assert lower[name] >= version(first), name
    pins = dict(line.split("==") for line in (repo_root / "constraints.txt").read_text().splitlines() if "==" in line)
    for name in lower.keys() & pins.keys():
        assert version(pins[name]) >= lower[name], f"{name} is tested below its lower bound"
    assert lower.keys() - pins.keys() == {"huggingface_hub"}


@pytest.mark.parametrize("extra", USED_BY)
def test_what_is_imported_is_declared(repo_root: Path, extra: str) -> None:
    """A bound on what another package brings along is no bound."""
    project = declared(repo_root)["project"]
    known = names(project["dependencies"] + project["optional-dependencies"][extra]) | {"open_mythos"}
    for place in USED_BY[extra]:
        path = repo_root / "open_mythos" / place
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text())):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                parts = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
                assert {NAMES.get(part, part) for part in parts} <= known | {"pydantic_core"}, file


def test_wheel_takes_the_whole_package_and_git_ignores_none_of_it(repo_root: Path) -> None:
    """hatchling ships every file under the package that .gitignore does not name, so the novel comes along."""
    assert declared(repo_root)["tool"]["hatch"]["build"] == {"targets": {"wheel": {"packages": ["open_mythos"]}}}
    ignored = (repo_root / ".gitignore").read_text().split()
    assert not [line for line in ignored if not line.startswith("/") and line not in ("__pycache__/", "*.egg-info/")]


def test_novel_is_the_text_that_the_figures_were_measured_on() -> None:
    text = novel()
    assert len(text) == 466_854
    assert text.startswith("Persuasion\n") and text.endswith("Finis\n")
    assert hashlib.sha256(text.encode()).hexdigest().startswith("8061549557aebd2f")
