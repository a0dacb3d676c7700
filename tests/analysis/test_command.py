"""mythos analyze, as a user types it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from open_mythos import OpenMythos
from open_mythos.analysis import SECTIONS
from open_mythos.analysis import section as analyze_report
from open_mythos.cli import main
from open_mythos.recipes import load_recipe
from open_mythos.tokenization.tokenizer import ByteTokenizer
from tests.models import scaled, tiny

CPU = ["--device", "cpu", "--threads", "1"]


def folder_of(model: OpenMythos, folder: Path) -> str:
    model.save_pretrained(folder)
    ByteTokenizer().save(folder)
    return str(folder)


def analysis(out: Path) -> dict[str, Any]:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return json.loads((out / "analysis.json").read_text("utf-8"), parse_constant=refuse)


def test_text_with_experts(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with every part switched on: latent attention, experts, ACT; and a user's own section."""
    monkeypatch.setitem(SECTIONS, "mine", lambda subject: analyze_report.Section("My own", "It runs.", {"n": 7}))
    folder, out = folder_of(scaled(tiny(vocab_size=259, attn_type="mla")), tmp_path / "model"), tmp_path / "out"
    prompts = ["--prompt", "She had been | forced", "into prudence in her youth"]
    assert main(["analyze", folder, *prompts, "--loops", "9", "--out", str(out), *CPU]) == 0
    found = analysis(out)
    assert list(found["results"]) == list(SECTIONS)
    assert bytes(found["prompts"][1]) == b"prudence in her youth"
    assert found["results"]["mine"] == {"n": 7}
    assert found["results"]["sweep"]["loops"] == list(range(1, 10))
    assert len(found["results"]["routing"]["changed"]) == 3
    assert sum(found["results"]["fixed_point"]["shares"].values()) == pytest.approx(1)
    printed = capsys.readouterr().out
    assert "Read-out lens" in printed and "My own\nIt runs." in printed and "Experts by loop" in printed
    html = (out / "report.html").read_text("utf-8")
    for name in ("sweep", "ranks", "steps", "attenuation", "swap", "experts", "candidates"):
        assert (out / f"{name}.png").stat().st_size and (out / f"{name}.svg").stat().st_size
        assert f"{name}.png" not in html
    assert html.count("data:image/svg+xml") == 9 and "<table>" in html


def test_prompts_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the run's config.yaml names; the figures are another test's."""
    monkeypatch.setattr(analyze_report, "draw_curves", lambda panels, path, *_, **how: path.write_text("<svg/>"))
    recipe = load_recipe("tiny-khop")
    scaled(dataclasses.replace(recipe.model, dim=16)).save_pretrained(tmp_path / "final")
    recipe.data.tokenizer().save(tmp_path / "final")
    (tmp_path / "config.yaml").write_text(recipe.to_yaml())
    assert main(["analyze", str(tmp_path / "final"), "--loops", "8", *CPU]) == 0
    found = analysis(tmp_path / "final/analysis")
    assert len(found["prompts"]) == 64 and len(found["prompts"][0]) == 25
    assert len(found["results"]["breadth"]["path"]["in_step"]) == 7
    # Only the answer's place is looked at.
    assert found["results"]["lens"]["coda"]["n_tokens"] == 64
    assert found["results"]["routing"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "names no task that draws prompts"),
        (["--prompt", "a"], "less than two tokens"),
        (["--prompt", "abc", "--loops", "7"], "--loops 7 must be between 8 and 4095"),
        (["--prompt", "abc", "--swap", "ab"], "--swap has 2 tokens, but the prompt 3"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = folder_of(OpenMythos(tiny(vocab_size=259)), tmp_path / "model")
    assert main(["analyze", folder, *options, *CPU]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model/analysis").exists()


def test_a_plain_transformer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = folder_of(OpenMythos(tiny(vocab_size=259, recurrent_layers=0)), tmp_path / "model")
    assert main(["analyze", folder, "--prompt", "abc", *CPU]) == 2
    assert "no loops to analyse" in capsys.readouterr().err
