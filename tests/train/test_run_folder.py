"""The end of a run and what lies beyond it: final/ that is empty or damaged, more steps, and saves by the clock."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from open_mythos.cli import main
from open_mythos.model import OpenMythos
from open_mythos.tokenization.tokenizer import load_tokenizer
from open_mythos.train.checkpoint import CheckpointConfig, Checkpoints, find_problem
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.distributed import ParallelConfig
from open_mythos.train.metrics import MetricsWriter, last_step, read_metrics
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.train.trainer import Trainer
from tests.train.ranks import run_ranks
from tests.train.test_resume import Crash, assert_same, config, crash_after, newest_step, numbers, opened, trainer


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "empty": lambda final: (shutil.rmtree(final), final.mkdir()),
    "a file": lambda final: (shutil.rmtree(final), final.write_text("x")),
    "no weights": lambda final: (final / "model.safetensors").unlink(),
    "cut weights": lambda final: cut(final / "model.safetensors"),
    "empty config": lambda final: (final / "config.json").write_bytes(b""),
    "another model's config": lambda final: (final / "config.json").write_text(
        (final / "config.json").read_text().replace('"dim": 32', '"dim": 64')
    ),
    "no tokenizer": lambda final: (final / "mythos_tokenizer.json").unlink(),
    "damaged tokenizer": lambda final: (final / "mythos_tokenizer.json").write_bytes(b"\0" * 40),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer(folder, config(steps=4), every=0).run()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_final_is_made_again(run: Path, finished: Path, what: str) -> None:
    DAMAGE[what](run / "final")
    with pytest.warns(UserWarning, match=r"final cannot be used \(.*\); it is now .*final\.damaged, and is made again"):
        final = trainer(run, config(steps=4), resume=True).run()
    assert (final / "model.safetensors").read_bytes() == (finished / "final" / "model.safetensors").read_bytes()
    assert OpenMythos.from_pretrained(final).cfg.vocab_size >= load_tokenizer(final).vocab_size
    assert (run / "final.damaged").exists() and numbers(run) == numbers(finished)


@pytest.mark.parametrize("what", ["empty", "cut weights"])
def test_a_damaged_final_without_a_checkpoint(run: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command: what is not there is not called the model, and the status says so."""
    shutil.rmtree(run / "checkpoints")
    DAMAGE[what](run / "final")
    command = ["train", "--config", str(run / "config.yaml"), "--out", str(run), "--resume", "--device", "cpu"]
    assert main(command) == 2
    said = capsys.readouterr()
    assert "The model is in" not in said.out
    assert "there is no checkpoint to make it again from; restore it, or remove" in said.err
    assert (run / "metrics.jsonl").exists()


@pytest.mark.parametrize("left", ["final", "metrics.jsonl"])
def test_a_run_that_nothing_names(run: Path, left: str) -> None:
    for name in {"config.yaml", "checkpoints", "final", "metrics.jsonl"} - {left}:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    with pytest.raises(
        ValueError, match=rf"{left} is there and neither config\.yaml nor a checkpoint, so it is not kno"
    ):
        trainer(run, config(steps=4, seed=9), resume=True)
    assert (run / left).exists()


def test_an_extended_run_is_that_of_a_run_with_the_same_rates(run: Path, tmp_path: Path) -> None:
    """At a constant rate more steps are the run that had them from the start, bit for bit."""
    constant = {"schedule": ScheduleConfig(shape="constant")}
    whole = trainer(tmp_path / "whole", config(steps=8, **constant))
    whole.run()
    first = trainer(tmp_path / "again", config(steps=4, **constant))
    first.run()
    with pytest.warns(
        UserWarning, match="goes on to 8, .* step 5 has the learning rate 0.01, where step 4 of 4 had 0.01"
    ):
        again = trainer(tmp_path / "again", config(steps=8, **constant), resume=True)
    assert again.steps_done == 4
    again.run()
    got, expected = ((folder / "final" / "model.safetensors").read_bytes() for folder in (again.out_dir, whole.out_dir))
    assert got == expected
    # The short run logged a validation less or more at its end, and nothing else.
    assert numbers(again.out_dir) == numbers(whole.out_dir)


def test_more_steps_go_on_from_the_end(run: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--config", str(run / "config.yaml"), "--out", str(run), "--device", "cpu", "--threads", "1"]
    told = (
        "the run had 4 steps and goes on to 8, over which its schedule is now stretched: step 5 has the learning rate"
    )
    with pytest.warns(UserWarning, match=told):
        assert main([*command, "--resume", "--steps", "8"]) == 0
    assert f"The model is in {run / 'final'}" in capsys.readouterr().out
    assert last_step(run / "metrics.jsonl") == 8 and TrainConfig.load(run / "config.yaml").steps == 8
    old = (run / "final-step-00000004" / "model.safetensors").read_bytes()
    assert old == (finished / "final" / "model.safetensors").read_bytes()
    assert old != (run / "final" / "model.safetensors").read_bytes()
    # Done again, with nothing to say; and there is no way back.
    assert main([*command, "--resume", "--steps", "8"]) == 0
    assert main([*command, "--resume", "--steps", "4"]) == 2
    assert "steps: 8 in the run, 4 now" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:the run had 4 steps:UserWarning")
@pytest.mark.parametrize("at", [5, 6, 7])
def test_an_extension_that_is_cut_off(run: Path, tmp_path: Path, at: int) -> None:
    whole = shutil.copytree(run, tmp_path / "whole")
    cfg = config(steps=8)
    trainer(whole, cfg, resume=True).run()
    cut_off = trainer(run, cfg, every=2, resume=True)
    cut_off.add_hook(crash_after(at), 1)
    with pytest.raises(Crash):
        cut_off.run()
    assert not (run / "final").exists()  # that of step 4 would pass for this one
    again = trainer(run, cfg, resume=True)
    assert again.steps_done == (4 if at < 7 else 6)
    again.run()
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()
    assert numbers(run) == numbers(whole)


def test_more_steps_without_a_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert trainer(run, config(steps=4), resume=True).run() == run / "final"
    with pytest.raises(ValueError, match=r"final is the model after 4 steps, .* begin another run with --init-from"):
        trainer(run, config(steps=8), resume=True)
    assert (run / "final").exists()


def test_the_clock_saves_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path / "whole", every=0)
    whole.run()
    clock = [0.0]
    monkeypatch.setattr("open_mythos.train.checkpoint.time.monotonic", lambda: clock[0])
    run = Trainer(
        config(), tmp_path / "run", device="cpu", threads=1, progress=False, checkpoint=CheckpointConfig(last=9)
    )
    saved: list[int] = []
    save = run.checkpoints.save

    def waited(step: int, groups: object, state: object) -> None:
        save(step, groups, state)
        run.checkpoints.join()
        saved.append(step)

    monkeypatch.setattr(run.checkpoints, "save", waited)

    def tick(run: Trainer, done: int) -> None:
        clock[0] += 100.0

    run.add_hook(tick, 1)
    run.add_hook(crash_after(9), 1)
    with pytest.raises(Crash):
        run.run()
    # The clock is read in a step, after 300 s by default; what a step finds late is saved at its end.
    assert saved == [4, 8]
    monkeypatch.undo()
    again = trainer(tmp_path / "run", every=0, resume=True)
    assert again.steps_done == 8
    again.run()
    assert_same(again, whole)


def by_the_clock(folder: str, cfg: TrainConfig) -> None:
    """Only the first process's clock says that it is time."""
    run = trainer(Path(folder), cfg, every=0, last=9)
    run.checkpoints.is_late = lambda: run.world.is_first and run.steps_done in (2, 5)
    run.run()


@pytest.mark.parametrize("spread", ["fsdp"])
def test_processes_save_together_by_one_clock(tmp_path: Path, spread: str) -> None:
    cfg = config(steps=7, parallel=ParallelConfig(spread))
    run_ranks(2, by_the_clock, str(tmp_path / "run"), cfg)
    paths = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in paths] == ["step-00000003", "step-00000006", "step-00000007"]
    assert [find_problem(path) for path in paths] == [None] * 3


def test_a_signal_without_any_option_ends_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(config().to_yaml())
    command = ["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    step, seen = Trainer.train_step, []

    def signalled(self: Trainer, number: int, log: bool = True):
        if number == 3 and not seen:
            seen.append(signal.raise_signal(signal.SIGTERM))
        return step(self, number, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        with pytest.raises(SystemExit) as exit:
            main([*command, "--checkpoint-minutes", "0"])
    assert exit.value.code == 75
    assert "stopped after step 4, saved; go on with the same command and --resume" in capsys.readouterr().err
    assert newest_step(tmp_path / "run") == 4
    assert main([*command, "--resume"]) == 0


@pytest.mark.slow
def test_sigterm_of_a_process(tmp_path: Path, repo_root: Path) -> None:
    """As a user sends it, at once after the first line of the log."""
    (tmp_path / "run.yaml").write_text(config(steps=5000, eval=EvalConfig()).to_yaml())
    command = [sys.executable, "-m", "open_mythos", "train", "--config", str(tmp_path / "run.yaml")]
    command += ["--out", str(tmp_path / "run"), "--device", "cpu", "--threads", "1"]
    process = subprocess.Popen(command, cwd=repo_root, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "saved; go on with the same command and --resume" in said
    assert newest_step(tmp_path / "run") >= 1 and not (tmp_path / "run" / "run.lock").exists()


LOG = b'{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}\n'


@pytest.mark.parametrize(
    "line", [b"\0" * 100, b"[1]", b"null", b'"step"', b'{"x": 1}', b'{"step": "2"}', b"\xff\xfe", b"[" * 100_000,
             b'{"step": NaN}', b'{"step": 1e999}', b'{"step": true}', b"", b'{"step": ' + b"9" * 5000 + b"}"]
)  # fmt: skip
def test_damaged_lines_of_the_log(tmp_path: Path, line: bytes) -> None:
    """The run goes on, the file is named, and what was damaged is kept beside it."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LOG + line + b"\n")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is damaged in 1 lines, which are left out: 3"):
        with MetricsWriter(path, steps_done=2) as writer:
            writer.write(3, {"x": 3.0})
    assert [found["step"] for found in read_metrics(path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == LOG + line + b"\n"
    assert last_step(path) == 3


def test_a_run_goes_on_with_a_damaged_log(run: Path, finished: Path) -> None:
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b"\0" * 4096 + b"\n")
    shutil.rmtree(run / "final")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is damaged"):
        trainer(run, config(steps=4), resume=True).run()
    assert numbers(run) == numbers(finished)


@pytest.mark.parametrize("content", [None, b"", b'{"step": 1'])
def test_lost_lines_of_the_log_are_told(run: Path, content: bytes | None) -> None:
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_bytes(content)
    shutil.rmtree(run / "final")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl ends at step 0 and the run at step 4: the lines between"):
        trainer(run, config(steps=4), resume=True).run()


def test_foreign_things_among_the_checkpoints(run: Path) -> None:
    """Other names are nobody's checkpoints: they are neither read nor removed."""
    folder = run / "checkpoints"
    names = ["step-abcdefgh", "step-0000000x", "step-1", "step-mine.partial", "step-00000003.old.txt", "notes"]
    for name in names:
        (folder / name).mkdir()
    (folder / "step-99999999").write_text("a file")
    shutil.rmtree(run / "final")
    again = trainer(run, config(steps=4), every=1, resume=True)
    assert again.steps_done == 4
    again._save()
    assert again.checkpoints.wait()
    assert {*names, "step-99999999"} <= {path.name for path in folder.iterdir()}


def test_steps_of_nine_digits(tmp_path: Path) -> None:
    run = trainer(tmp_path, config(steps=3), every=1)
    for step in (99_999_999, 100_000_000):
        run.steps_done = step
        run._save()
        assert run.checkpoints.wait()
    newest = opened(tmp_path).newest()
    assert newest is not None and newest.name == "step-100000000"


@pytest.mark.parametrize("name", ["config.yaml", "final"])
def test_a_full_disk_is_named(tmp_path: Path, name: str) -> None:
    """The path, that the disk is full, and for the model how to get it after all: everything before is saved."""
    folder = tmp_path / "run"
    run = trainer(folder, config(steps=3), every=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on a file's size is EFBIG to Python, so the error of a full disk is put in its place.
    full = OSError(28, "No space left on device")
    with pytest.MonkeyPatch.context() as patch:
        if name == "config.yaml":
            patch.setattr(Path, "write_text", lambda *args, **options: (_ for _ in ()).throw(full))
        else:
            run.add_hook(
                lambda *_: patch.setattr("open_mythos.model_folder.to_disk", lambda path: (_ for _ in ()).throw(full)),
                3,
            )
        message = r"No space left on device \(.* bytes are free\); make room, and run the command again"
        with pytest.raises(OSError, match=message) as error:
            run.run()
    assert str(folder / name) in str(error.value) and resource.getrlimit(resource.RLIMIT_FSIZE) == before
    if name == "final":
        assert "with --resume: it goes on from the newest checkpoint" in str(error.value)
        final = trainer(folder, config(steps=3), resume=True).run()
        assert OpenMythos.from_pretrained(final)


def test_folders_above_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder in which a name of the run was made or renamed is synced after that."""
    synced: list[Path] = []
    fsync, opened_by = os.fsync, {}
    os_open = os.open

    def remember(path: object, *args: int, **options: object) -> int:
        handle = os_open(path, *args, **options)
        opened_by[handle] = path
        return handle

    def sync(handle: int) -> None:
        synced.append(Path(str(opened_by.get(handle))))
        fsync(handle)

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(os, "fsync", sync)
    folder = tmp_path / "runs" / "one"
    run = trainer(folder, config(steps=2), every=0)
    run.run()
    assert {tmp_path, tmp_path / "runs", folder, folder / "checkpoints"} <= {*synced}


@pytest.mark.parametrize("target", [None, "file"])
def test_out_that_is_no_folder(tmp_path: Path, target: str | None) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "out"
    out.symlink_to(tmp_path / (target or "nothing"))
    for resume in (True, False):
        with pytest.raises(ValueError, match="out is a file, or a link to nothing; name a folder for the run"):
            trainer(out, resume=resume)


def test_refuses(tmp_path: Path) -> None:
    for value in (-1, float("nan"), "5"):
        with pytest.raises((TypeError, ValueError), match="checkpoint_minutes"):
            CheckpointConfig(minutes=value)
    assert json.loads((trainer_state(tmp_path) / "state.json").read_text())["data"] == {}
    assert issubclass(Checkpoints, object) and torch.get_num_threads() == 1


def trainer_state(folder: Path) -> Path:
    run = trainer(folder, config(steps=1))
    run.run()
    newest = run.checkpoints.newest()
    assert newest is not None
    return newest
