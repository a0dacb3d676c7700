"""What a run leaves on disk: the metrics file and the model folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.reports.terminal import ProgressLine, duration
from open_mythos.tokenization.tokenizer import ByteTokenizer, load_tokenizer
from open_mythos.train.metrics import MetricsWriter, read_metrics
from open_mythos.train.run_folder import save_model_folder


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


def shown(capsys: pytest.CaptureFixture[str], seconds: list[float], **how: Any) -> list[str]:
    """The plain lines of a run whose steps are done after so many seconds."""
    now = 0.0
    with ProgressLine(how.pop("total", len(seconds)), "run", clock=lambda: now, **how) as line:
        for i, now in enumerate(seconds):  # noqa: B007
            line.advance({"loss": 3.14159 - i, "tokens/s": 12345.6} if i % 2 == 0 else None)
    return capsys.readouterr().out.splitlines()


def test_without_a_terminal_a_plain_line_comes_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """The first step, then at most one line in five seconds, and the last step whenever that is."""
    assert shown(capsys, [2.0, 4.0, 6.9, 7.0, 8.0, 13.0, 14.0], total=1200) == [
        "run: step 1/1,200  loss 3.142  12,346 tokens/s  40 min left",
        "run: step 4/1,200  loss 1.142  12,346 tokens/s  35 min left",
        "run: step 6/1,200  loss -0.8584  12,346 tokens/s  43 min left",
        "run: step 7/1,200  loss -2.858  12,346 tokens/s  40 min left",
    ]
    assert shown(capsys, [1.0, 2.0, 3.0]) == [
        "run: step 1/3  loss 3.142  12,346 tokens/s  2 s left",
        "run: step 3/3  loss 1.142  12,346 tokens/s",
    ]


def test_time_left_of_a_run_that_goes_on_is_that_of_its_own_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, [10.0], total=103, done=100)[0].endswith(
        "step 101/103  loss 3.142  12,346 tokens/s  20 s left"
    )


def test_progress_without_steps_is_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, [1.0], total=4, unit="")[0].startswith("run: 25%  loss")


def test_progress_that_is_off_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, [1.0, 2.0], enabled=False) == []


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (0.2, "1 s"), (89, "89 s"), (95, "2 min"), (3_500, "58 min"), (7_800, "2 h 10 min"), (1e6, "12 days")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


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
