"""What a run leaves on disk: the metrics file and the model folder."""

import json
from pathlib import Path

import pytest

from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.terminal import ProgressLine
from open_mythos.tokenizer import ByteTokenizer, load_tokenizer
from open_mythos.train.checkpoint import save_model_folder
from open_mythos.train.metrics import MetricsWriter, read_metrics


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"train/loss": 0.1})
        assert read_metrics(path) == [{"step": 1, "train/loss": 0.1}]
        writer.write(2, {"train/loss": 1e-30})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_nan_never_reaches_the_file(tmp_path: Path) -> None:
    with (
        MetricsWriter(tmp_path / "metrics.jsonl") as writer,
        pytest.warns(UserWarning, match="val/loss=nan after step 1 is left out of the log"),
    ):
        writer.write(1, {"val/loss": float("nan"), "train/loss": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 2.0}]


def test_progress_line_shows_the_latest_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(2, "run") as line:
        line.advance({"loss": 3.14159})
        line.advance()
    assert "2/2 loss 3.142" in capsys.readouterr().out
    with ProgressLine(2, "run", enabled=False) as line:
        line.advance({"loss": 1.0})
    assert capsys.readouterr().out == ""


def small_model() -> OpenMythos:
    return OpenMythos(MythosConfig(vocab_size=259, dim=16, n_heads=2, n_kv_heads=2, attn_type="gqa", n_experts=0))


def save(folder: Path) -> None:
    model = small_model()
    save_model_folder(model.cfg, model.state_dict(), ByteTokenizer(), folder)


def test_model_folder_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run" / "final"

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "save", full_disk)
        with pytest.raises(OSError, match="no space"):
            save(folder)
    assert not folder.exists()
    # The next try is not disturbed by what the failed one left.
    save(folder)
    assert OpenMythos.from_pretrained(folder).cfg.vocab_size == load_tokenizer(folder).vocab_size
    assert [p.name for p in folder.parent.iterdir()] == ["final"]


def test_model_folder_is_never_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already; use another folder"):
        save(tmp_path)
