"""What is said where a package of an extra is missing: it works for a user who has the wheel and no clone."""

import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest

from open_mythos.cli import main
from open_mythos.extras import DISTRIBUTION, load, packages
from tests.models import tiny

NAMES = re.compile(r"[\w.-]+")


def declared(repo_root: Path) -> dict:
    return tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]


def test_each_extra_is_needed_by_the_package(repo_root: Path) -> None:
    """An extra whose packages no line imports would be installed for nothing."""
    source = "".join(path.read_text("utf-8") for path in (repo_root / "open_mythos").rglob("*.py"))
    used = set(re.findall(r'load\((?:module|"[\w.]+"), "(\w+)"', source))
    assert set(declared(repo_root)["optional-dependencies"]) == used | {"test", "dev"}
    assert declared(repo_root)["name"] == DISTRIBUTION


@pytest.mark.parametrize("extra", ["serve", "data", "plot", "track"])
def test_what_to_install_is_what_is_declared(extra: str, repo_root: Path) -> None:
    told = {NAMES.match(word.strip("'"))[0].replace("_", "-") for word in packages(extra).split()}
    there = declared(repo_root)["optional-dependencies"][extra]
    assert told == {NAMES.match(line)[0].replace("_", "-") for line in there}
    assert f"'{DISTRIBUTION}" not in packages(extra)


def test_bounds_come_along(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.10", 'fastapi>=0.120; extra == "serve"', "uvicorn; extra == 'serve'", 'a<2; extra == "serves"']
    monkeypatch.setattr("open_mythos.extras.requires", lambda name: lines)
    assert packages("serve") == "'fastapi>=0.120' uvicorn"
    assert packages("serve", "uvicorn") == "uvicorn"


@pytest.mark.parametrize(
    ("module", "args", "said"),
    [
        ("uvicorn", ["serve", "model"], "the server: the package uvicorn is missing; run: pip install "),
        (
            "prometheus_client",
            ["serve", "model"],
            "the server: the package prometheus-client is missing; run: pip install ",
        ),
        ("matplotlib", ["demo", "--out", "here"], "figures: the package matplotlib is missing; run: pip install "),
        ("matplotlib", ["exp", "khop"], "figures: the package matplotlib is missing; run: pip install "),
        ("pyarrow.parquet", ["eval", "model", "--text", "a.parquet"], "parquet files: the package pyarrow is missing"),
    ],
)
def test_commands_say_what_to_install(
    module: str,
    args: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from open_mythos.model import OpenMythos
    from open_mythos.tokenization.tokenizer import ByteTokenizer

    monkeypatch.chdir(tmp_path)
    OpenMythos(tiny(vocab_size=259)).save_pretrained("model")
    ByteTokenizer().save("model")
    Path("a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    assert main(args) == 2
    err = capsys.readouterr().err
    assert said in err and DISTRIBUTION not in err
    assert not Path("here").exists() and not Path("runs").exists()


def test_a_module_that_is_there_is_loaded() -> None:
    assert load("json", "plot", "figures").dumps([1]) == "[1]"
    assert requires(DISTRIBUTION)
