"""The command for a lease of a GPU: every section as a rehearsal, and what it keeps when sections end badly."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu

BAD = """
import os, sys, time
import tyro
from benchmarks import gpu

def correctness(device, put):
    put("first", 1.5)
    raise ArithmeticError("the second is wrong")

def speed(device, put):
    put("first", 2.5)
    time.sleep(600)

def train(device, put):
    os._exit(7)

gpu.SECTIONS |= {"correctness": correctness, "speed": speed, "train": train}
sys.exit(gpu.main(tyro.cli(gpu.Args)))
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.SIZES, "cpu", replace(gpu.SIZES["cpu"], models=("200k",)))
    monkeypatch.setattr(gpu, "SHAPES", {name: gpu.SHAPES[name] for name in ("act", "static decode", "gradients")})


@pytest.mark.parametrize("name", ["correctness", "speed", "train", "engine"])
def test_a_rehearsal_of_each_section(small: None, name: str) -> None:
    """All but the peer, which an index of packages installs."""
    figures: dict[str, Any] = {}
    gpu.SECTIONS[name]("cpu", figures.__setitem__)
    rates = [figure["tokens/s"] for figure in figures.values() if "tokens/s" in figure]
    assert len(rates) == {"correctness": 0, "speed": 6, "train": 1, "engine": 2}[name] and all(rates)
    if name == "correctness":
        assert len(figures) == 6 and all(0 < figure["error"] <= figure["bound"] for figure in figures.values())


def test_a_wrong_number_fails_the_section(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours stands beside the exact numbers, so an error of a percent in float32 is one."""
    original = gpu.outputs

    def wrong(shape: str, device: str, dtype: torch.dtype) -> torch.Tensor:
        return original(shape, device, dtype) * (1.01 if dtype is torch.float32 else 1)

    monkeypatch.setattr(gpu, "outputs", wrong)
    with pytest.raises(ArithmeticError, match="above their bounds: act float32, static decode float32"):
        gpu.correctness("cpu", lambda *_: None)


def test_sections_that_end_badly_cost_only_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bad.py"
    script.write_text(BAD)
    monkeypatch.setattr(gpu, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setenv("PYTHONPATH", str(Path(gpu.__file__).parents[1]))
    monkeypatch.setattr(gpu, "SHARES", {"correctness": 1, "speed": 0.08, "train": 1, "peer": 0})
    sections = ("correctness", "speed", "train", "peer")
    assert gpu.main(gpu.Args(2, tmp_path, "cpu", sections)) == 1
    found = json.loads((tmp_path / "results.json").read_text())["sections"]
    states = [found[name]["state"] for name in sections]
    assert states == ["failed", "out of time", "crashed", "skipped"]
    assert found["correctness"]["figures"] == {"first": 1.5} and found["speed"]["figures"] == {"first": 2.5}
    assert found["correctness"]["error"] == "ArithmeticError: the second is wrong"
    assert found["train"]["error"] == "exit status 7"
    page = (tmp_path / "results.md").read_text()
    assert "A rehearsal" in page and "## speed: out of time" in page and "| first | 2.5 |" in page


def test_a_gpu_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda' is not available"):
            gpu.main(gpu.Args(out=tmp_path / "new"))
    with pytest.raises(ValueError, match="sections='sped'"):
        gpu.main(gpu.Args(out=tmp_path / "new", device="cpu", sections=("sped",)))
    assert not (tmp_path / "new").exists()
