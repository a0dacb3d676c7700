"""Trackers: what they are given, that they fail alone, and the real libraries where they are installed."""

import dataclasses
import json
import sqlite3
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from open_mythos.cli import main
from open_mythos.recipes import load_recipe
from open_mythos.tasks import Text
from open_mythos.train.checkpoint import CheckpointConfig
from open_mythos.train.config import TrainConfig
from open_mythos.train.metrics import read_metrics
from open_mythos.train.trackers import Run, TensorBoard, Tracker, Trackio, Wandb, make_trackers
from open_mythos.train.trainer import Trainer


class Recorder:
    """Remembers; raises at a step, at the start or at the end if told to."""

    def __init__(self, name: str = "recorder", fails: int | str | None = None) -> None:
        self.name, self.fails = name, fails
        self.runs: list[Run] = []
        self.lines: list[dict[str, float]] = []
        self.closed: list[bool] = []

    def start(self, run: Run) -> None:
        if self.fails == "start":
            raise RuntimeError("no network")
        self.runs.append(run)

    def log(self, steps_done: int, values: Mapping[str, float]) -> None:
        if self.fails == steps_done:
            raise RuntimeError("no network")
        self.lines.append({"step": steps_done, **values})

    def close(self, failed: bool) -> None:
        self.closed.append(failed)
        if self.fails == "end":
            raise RuntimeError("no network")


def run_config(steps: int = 4) -> TrainConfig:
    recipe = dataclasses.replace(load_recipe("tiny-text"), dtype="float32")
    evaluation = dataclasses.replace(recipe.eval, every=2, rows=2, loops=(1,))
    model = dataclasses.replace(recipe.model, dim=32, n_heads=2, n_kv_heads=2, expert_dim=32)
    data = Text(seq_len=16)
    return dataclasses.replace(recipe, model=model, steps=steps, batch_size=2, log_every=1, data=data, eval=evaluation)


OPTIONS: dict[str, Any] = {"device": "cpu", "progress": False, "checkpoint": CheckpointConfig(every=2)}


def crashed_run(folder: Path, trackers: Sequence[Tracker]) -> None:
    """Three of four steps, the last behind the checkpoint."""

    def crash(trainer: Trainer, step: int) -> None:
        raise OSError("crash")

    trainer = Trainer(run_config(), folder, **OPTIONS, trackers=trackers)
    trainer.add_hook(crash, 3)
    with pytest.raises(OSError, match="crash"):
        trainer.run()
    trainer.checkpoints.wait()


def interrupted_run(folder: Path, name: str) -> None:
    """A run that crashed, and then all of it; each time with a new tracker of this name."""
    crashed_run(folder, make_trackers([name]))
    Trainer(run_config(), folder, **OPTIONS, resume=True, trackers=make_trackers([name])).run()


def values_of(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in read_metrics(folder / "metrics.jsonl") if name in line]


def test_a_tracker_gets_what_the_log_gets(tmp_path: Path) -> None:
    tracker = Recorder()
    Trainer(run_config(), tmp_path, device="cpu", progress=False, trackers=[tracker]).run()
    assert tracker.lines == read_metrics(tmp_path / "metrics.jsonl")
    assert len(tracker.lines) == 6 and "val/bpb@1" in tracker.lines[2]
    assert tracker.runs == [Run(run_config().to_dict(), tmp_path, 0, 0)]
    assert tracker.closed == [False]


def test_a_tracker_is_closed_when_the_run_fails_and_told_when_it_goes_on(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    crashed_run(tmp_path, [first])
    assert first.closed == [True]
    Trainer(run_config(), tmp_path, **OPTIONS, resume=True, trackers=[second]).run()
    assert (second.runs[0].steps_done, second.runs[0].steps_logged) == (2, 3)
    assert [line["step"] for line in second.lines] == [3, 4, 4]


@pytest.mark.parametrize("fails", [2, "end"])
def test_a_tracker_that_fails_does_so_alone(fails: int | str, tmp_path: Path) -> None:
    bad, good = Recorder("bad", fails), Recorder("good")
    with pytest.warns(UserWarning, match="tracker bad .*no network"):
        Trainer(run_config(), tmp_path, device="cpu", progress=False, trackers=[bad, good]).run()
    assert good.lines == read_metrics(tmp_path / "metrics.jsonl") and good.closed == [False]
    assert [line["step"] for line in bad.lines] == ([1] if fails == 2 else [1, 2, 2, 3, 4, 4])


def test_a_tracker_that_cannot_start_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    good, bad = Recorder("good"), Recorder("bad", "start")
    with pytest.raises(ValueError, match=r"tracker bad cannot start \(no network\)"):
        Trainer(run_config(), tmp_path / "run", device="cpu", progress=False, trackers=[good, bad]).run()
    assert good.closed == [True] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for module in ("torch.utils.tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["train", "tiny-text", "--out", "nowhere", "--track", name]) == 2
    assert f"tracker {name}: the package {name} is missing; run: pip install {name}" in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_unknown_tracker() -> None:
    with pytest.raises(ValueError, match=r"track='tensorbord'.*use track='tensorboard'"):
        make_trackers(["tensorbord"])


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        interrupted_run(tmp_path, TensorBoard.name)
        events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for name in ("train/loss", "val/bpb@1"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(step, pytest.approx(value)) for step, value in values_of(tmp_path, name)]
    assert "optim.kind: muon" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def wandb_records(file: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    at, parts = 7, b""
    while at + 7 <= len(file):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", file[at : at + 7])
        parts += file[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: each process writes a run of the same name, which `wandb sync` joins."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("wandb")
        from wandb.proto.wandb_internal_pb2 import Record

        for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        interrupted_run(tmp_path, Wandb.name)
        logged: dict[int, dict[str, float]] = {}
        for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
            for data in wandb_records(path.read_bytes()):
                record = Record.FromString(data)
                if record.WhichOneof("record_type") == "history":
                    items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                    assert items["_step"] not in logged
                    logged[items["_step"]] = items
    for name in ("train/loss", "val/bpb@1"):
        assert values_of(tmp_path, name) == [(step, items[name]) for step, items in logged.items() if name in items]


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        pytest.importorskip("trackio")
        interrupted_run(tmp_path / "run", Trackio.name)
        database = next((tmp_path / "trackio").glob("*.db"))
        with sqlite3.connect(database) as connection:
            rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    for name in ("train/loss", "val/bpb@1"):
        logged = [(step, json.loads(values)[name]) for _, step, values in rows if name in json.loads(values)]
        assert logged == values_of(tmp_path / "run", name)
