"""One part of each kind from outside the package, those of docs/extending.md, through everything that uses parts."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from open_mythos.accounting import count_parameters, kv_bytes_per_token
from open_mythos.cli import main, plugins
from open_mythos.config import MythosConfig
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.engine.llm import LLM
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import LoopPlan
from open_mythos.tokenization.tokenizer import load_tokenizer
from tests.models import restored_tables
from tests.server.served import MODEL, serving

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/extending.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
MAX_LINES = 30
PARTS = {"attn_type": "shared_key", "injection": "gated", "feed_forward": "squared_relu"}


def code_lines(block: str) -> int:
    return sum(bool(line.strip()) for line in block.splitlines())


def test_every_part_is_short() -> None:
    assert len(BLOCKS) == 8
    assert all(code_lines(block) <= MAX_LINES for block in BLOCKS), [code_lines(block) for block in BLOCKS]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The options of the command that load a file for each block."""
    folder, options = tmp_path_factory.mktemp("parts"), []
    for i, block in enumerate(BLOCKS):
        (folder / f"part_{i}.py").write_text(block)
        options += ["--plugin", str(folder / f"part_{i}.py")]
    with restored_tables():
        yield options


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> Path:
    """A trained run of the user's recipe."""
    out = tmp_path_factory.mktemp("runs") / "largest"
    options = ["--steps", "3", "--eval.rows", "8", "--device", "cpu", "--threads", "1", "--track", "lines"]
    assert main([*parts, "train", "tiny-largest", "--out", str(out), *options]) == 0
    return out


def test_training_uses_them(run: Path) -> None:
    config = json.loads((run / "final" / "config.json").read_text())
    assert config.items() >= PARTS.items()
    assert len((run / "losses.txt").read_text().splitlines()) >= 1


def test_a_folder_is_saved_and_loaded(run: Path, tmp_path: Path) -> None:
    model = OpenMythos.from_pretrained(run / "final")
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 10]])
    assert torch.equal(OpenMythos.from_pretrained(tmp_path)(ids), model(ids))


def test_without_them_the_missing_name_is_told(run: Path) -> None:
    for words, told, table in (
        (["info", str(run / "final")], "'shared_key' must be one of 'mla', 'gqa'", "ATTENTIONS[...]"),
        (["plan", "--config", str(run / "config.yaml")], "data.task='largest' must be one of", "TASKS[...]"),
    ):
        done = subprocess.run([sys.executable, "-m", "open_mythos", *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert all(text in done.stderr for text in (told, table, "--plugin")), done.stderr


@pytest.mark.parametrize("name", PARTS)
def test_costs_are_those_of_the_built_model(run: Path, name: str) -> None:
    base = OpenMythos.from_pretrained(run / "final").cfg.to_dict() | {"attn_type": "gqa", "injection": "lti"}
    cfg = MythosConfig.from_dict(base | {"feed_forward": "swiglu", name: PARTS[name]})
    model = OpenMythos(cfg)
    assert count_parameters(cfg).total == sum(p.numel() for p in model.parameters())
    assert model.make_cache(2, 16, 3).nbytes == 2 * 16 * kv_bytes_per_token(cfg, 3, bytes_per_value=4)
    out = model.train()(torch.zeros(2, 9, dtype=torch.int64), plan=LoopPlan((2, 3)))
    out.hidden.sum().backward()


COMMANDS = {
    "info": ["info", "FINAL"],
    "plan": ["plan", "tiny-largest", "--gpus", "1", "--batch-size", "64"],
    "generate": ["generate", "FINAL", "31415926=", "--exit", "settled", "--max-new-tokens", "2"],
    "analyze": ["analyze", "FINAL", "--loops", "8"],
    "exp list": ["exp", "list"],
    "exp": ["exp", "gate", "--quick", "--runs", "OUT/runs", "--out", "OUT/report"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_knows_them(
    name: str, run: Path, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("FINAL", str(run / "final")).replace("OUT", str(tmp_path)) for word in COMMANDS[name]]
    assert main([*words, *parts]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    if name == "analyze":
        assert "The norm of the state goes from" in (run / "final" / "analysis" / "report.md").read_text()
    if name == "exp list":
        assert "Does a gate help?" in shown


def test_engine_and_server_generate_what_the_model_does(run: Path) -> None:
    model, tokenizer = OpenMythos.from_pretrained(run / "final"), load_tokenizer(run / "final")
    prompts = [[3, 1, 4, 10], [2, 7, 1, 8, 2, 10]]
    params = SamplingParams(max_tokens=3, temperature=0.0, exit="settled", exit_threshold=0.5)
    alone = [
        model.generate(torch.tensor([prompt]), 3, temperature=0.0, exit="settled", exit_threshold=0.5)[0].tolist()
        for prompt in prompts
    ]
    answers = LLM(model, tokenizer).generate(prompts, params, progress=False)
    assert [prompt + answer.outputs[0].token_ids for prompt, answer in zip(prompts, answers, strict=True)] == alone
    with serving(make=lambda: Engine(model, tokenizer, EngineConfig(max_rows=8, max_queue=24))) as served:
        for prompt, ids in zip(prompts, alone, strict=True):
            extra = {"exit": "settled", "exit_threshold": 0.5}
            done = served.client().completions.create(
                model=MODEL, prompt=prompt, max_tokens=3, temperature=0, extra_body=extra
            )
            assert done.choices[0].text == tokenizer.decode(ids[len(prompt) :])


def test_a_fault_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, told in (
        ("raises.py", "x = 1\n\ny = x / 0\n", "raises.py:3: ZeroDivisionError: division by zero"),
        ("parses.py", "x = 1\nif\n", "parses.py:2: SyntaxError"),
        ("imports.py", "import no_such_module\n", "imports.py:1: ModuleNotFoundError"),
    ):
        (tmp_path / name).write_text(text)
        assert main(["info", "3m", "--plugin", str(tmp_path / name)]) == 2
        assert told in capsys.readouterr().err
    assert main(["--plugin", str(tmp_path / "none.py"), "info", "3m"]) == 2
    assert "none.py does not exist" in capsys.readouterr().err
    assert main(["info", "3m", "--plugin"]) == 2
    assert "--plugin needs a file" in capsys.readouterr().err


def test_installed_packages_announce_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    loaded: list[str] = []

    def points(group: str) -> list[Any]:
        def fail() -> None:
            raise ValueError("broken")

        good = SimpleNamespace(name="good", value="good.parts", load=lambda: loaded.append(group))
        return [good, *([SimpleNamespace(name="bad", value="bad.parts", load=fail)] if len(loaded) > 1 else [])]

    monkeypatch.setattr(plugins, "entry_points", points)
    assert main(["exp", "list"]) == 0
    assert loaded == ["open_mythos.plugins"]
    assert main(["exp", "list"]) == 0
    assert main(["exp", "list"]) == 2
    assert "plugin bad (bad.parts)" in capsys.readouterr().err
