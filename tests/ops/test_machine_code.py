"""Machine code on disk: made once, used by whoever asks for the same, and never loaded when it is not whole.

Most tests replace the compiler by one that writes a few bytes, and the loaded code by what returns nothing.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import open_mythos.ops.grouped_linear  # noqa: F401 (registers the operator)
from open_mythos.ops import machine_code
from open_mythos.ops.machine_code import MachineCode, _digest, _Traced

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@dataclasses.dataclass(frozen=True)
class Options:
    bias: Tensor | None
    factor: float


class Scale(nn.Module):
    """weight * x * factor, written to `out` too, then + bias. Torch would make constants of so few values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))

    def run(self, x: Tensor, out: Tensor, options: Options) -> dict[str, Tensor | None]:
        y = self.weight * x * options.factor
        out.copy_(y)
        return {"y": y if options.bias is None else y + options.bias, "none": None}


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths of what a stand-in for the compiler has made, in an empty cache folder."""
    made: list[Path] = []

    def compile(self: _Traced, tensors: list[Tensor], lengths: dict[int, int], path: Path) -> None:
        made.append(path)
        path.write_bytes(b"code")
        facts = {"sha256": hashlib.sha256(b"code").hexdigest(), "outputs": pytree.treespec_dumps(NOTHING)}
        path.with_suffix(".facts").write_text(json.dumps(facts))

    monkeypatch.setattr(_Traced, "compile", compile)
    monkeypatch.setattr("torch._C._aoti.AOTIModelContainerRunnerCpu", lambda *args: SimpleNamespace(run=lambda x: []))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return made


NOTHING = pytree.tree_flatten({})[1]


def call(code: MachineCode, module: Scale, length: int = 4, **options) -> dict[str, Tensor | None]:
    x, out = torch.arange(3.0 * length).view(length, 3), torch.zeros(length, 3)
    chosen = Options(**{"bias": None, "factor": 1.0} | options)
    result = code([(x, 0), (out, 0)], module, x, out, chosen)
    if result:
        expected = module.run(x, wanted := torch.zeros_like(out), chosen)
        assert result.keys() == expected.keys() and result["none"] is None
        torch.testing.assert_close([result["y"], out], [expected["y"], wanted])
    return result


def anew(module: Scale, **options) -> None:
    """As another process would ask: with nothing loaded."""
    call(MachineCode(Scale.run), module, **options)


def test_named_by_all_it_depends_on(compilations: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    code, module = MachineCode(Scale.run), Scale()
    call(code, module)
    # Neither the length nor the weights are part of it.
    call(code, module, length=7)
    module.weight = nn.Parameter(torch.zeros(3))
    call(code, module)
    anew(Scale())
    assert len(compilations) == 1
    # Weights in another order in memory, and what the code contains.
    module.weight = nn.Parameter(torch.zeros(6)[::2])
    call(code, module)
    anew(module, factor=2.0)
    anew(module, bias=torch.ones(3))
    anew(module, length=1)
    anew(Scale().double())
    wider = Scale()
    wider.width = 5  # ty: ignore[unresolved-attribute]
    anew(wider)
    own = "open_mythos.ops.machine_code"
    for name, other in (
        ("torch.__version__", "9.9"),
        ("torch.get_num_threads", lambda: 64),
        (f"{own}.processor", lambda: "another"),
        (f"{own}._source", lambda kind: "edited"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(name, other)
            anew(module)
    assert len(compilations) == len(set(compilations)) == 11
    anew(module)
    assert len(compilations) == 11


def test_source_is_part_of_the_name(compilations: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the module's class, wherever it is, and all of `nn` and `ops`."""
    own = _digest.__wrapped__
    anew(Scale())
    for edited in (Path(__file__), Path(machine_code.__file__).parents[1] / "nn" / "rope.py"):
        for cached in (machine_code._source, machine_code._own_digest):
            cached.cache_clear()
        with monkeypatch.context() as changed:
            changed.setattr(machine_code, "_digest", lambda file, edited=edited: own(file) + str(file == str(edited)))
            anew(Scale())
    for cached in (machine_code._source, machine_code._own_digest):
        cached.cache_clear()
    assert len(set(compilations)) == 3


@pytest.mark.parametrize("damage", ["library", "facts", "no library"])
def test_damaged_is_made_anew(compilations: list[Path], damage: str) -> None:
    anew(Scale())
    path = compilations[0]
    if damage == "library":
        path.write_bytes(b"cod")
    elif damage == "facts":
        path.with_suffix(".facts").write_text(json.dumps({"sha256": 3}))
    else:
        path.unlink()
    anew(Scale())
    anew(Scale())
    assert compilations == [path, path]


def test_what_cannot_be_stored(
    compilations: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No folder to write to, a class of a notebook, or a hook: the code is then made for this process."""
    notebook = type("Notebook", (Scale,), {"__module__": "__notebook__"})()
    hooked = Scale()
    hooked.register_forward_hook(print)
    for module in (notebook, hooked):
        anew(module)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, module = MachineCode(Scale.run), Scale()
    call(code, module)
    call(code, module)
    assert len(compilations) == 3 and caplog.text.count("cannot be stored") == 3
    assert not any(path.exists() for path in compilations[:2])


@pytest.mark.slow
def test_one_library_serves_any_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also weights that change in place, and another module; of any length. Nothing compiles a second time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, module = MachineCode(Scale.run), Scale()
    assert call(code, module)
    monkeypatch.setattr(_Traced, "compile", None)
    with torch.no_grad():
        module.weight.mul_(3)
    call(code, module, length=7)
    module.weight = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))
    call(code, module)
    anew(Scale(), length=5)


class Grouped(nn.Module):
    """A product of groups of rows, an operator of this package that compiled code calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 3))

    def run(self, x: Tensor, counts: Tensor) -> Tensor:
        return torch.ops.open_mythos.grouped_product(x, self.weight, counts)


def check_grouped() -> None:
    """Compare compiled code with the function; in a process of its own, for torch's compiler replaces `distutils`."""
    module, x, counts = Grouped(), torch.randn(5, 3), torch.tensor([2, 3])
    with torch.no_grad():
        torch.testing.assert_close(MachineCode(Grouped.run)([], module, x, counts), module.run(x, counts))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_code_that_calls_this_packages_operators(tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, "-c", "from tests.ops.test_machine_code import check_grouped; check_grouped()"]
    for _ in ("makes it", "loads it"):
        subprocess.run(command, check=True, cwd=repo_root, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
    [nodes] = (tmp_path / "open_mythos" / "compiled").glob("*.json")
    assert "grouped_product" in nodes.read_text()
