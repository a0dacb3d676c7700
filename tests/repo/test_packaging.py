"""What is installed: declared dependencies, tested versions, and the files that are not Python."""

import hashlib
import re
import tomllib
from pathlib import Path

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
