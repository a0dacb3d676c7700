"""One trainer to a folder: who has the lock, when it is stale, and that one of several starts gets it."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from open_mythos.train import lock
from open_mythos.train.checkpoint import CheckpointConfig
from open_mythos.train.lock import LOCK_FILE, STALE_S, Holder, RunLock
from open_mythos.train.trainer import Trainer
from tests.train.ranks import CONTEXT, Ranks
from tests.train.test_resume import Crash, assert_same, config, crash_after, numbers, trainer

HELD = f"is in use by another mythos train \\(process {os.getpid()} on {re.escape(socket.gethostname())}, since "


def leave(folder: Path, **changes: object) -> Path:
    """Leave the lock of a process that has been killed; of one that lives, but for the changes."""
    RunLock(folder)._take(folder / LOCK_FILE)
    holder = lock._read(folder / LOCK_FILE)
    assert holder is not None
    (folder / LOCK_FILE).write_text(json.dumps({**dataclasses.asdict(holder), **changes}))
    return folder / LOCK_FILE


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_second_is_refused_by_name(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    first.acquire()
    for refused in (second.acquire, second.refuse_if_held):
        with pytest.raises(ValueError, match=HELD) as error:
            refused()
        assert "use another folder with --out" in str(error.value) and str(first.path) in str(error.value)
    second.release()  # of what it does not have
    first.check()
    first.release()
    assert not (tmp_path / "run").exists()  # made for the lock alone
    second.acquire()
    second.release()


@pytest.mark.parametrize("what", ["killed", "pid is another process's", "not reaped"])
def test_a_lock_of_this_machine_is_stale_when_its_process_is_gone(tmp_path: Path, what: str) -> None:
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    while what == "not reaped" and lock._start_of(zombie.pid) is not None:
        time.sleep(0.01)
    changes = {
        "killed": {"pid": dead_pid()},
        "pid is another process's": {"started": "17"},
        "not reaped": {"pid": zombie.pid},
    }
    leave(tmp_path, **changes[what])
    mine = RunLock(tmp_path)
    mine.refuse_if_held()
    mine.acquire()
    mine.check()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    mine.release()
    zombie.wait()


@pytest.mark.parametrize("ahead", [-1, 1])
@pytest.mark.parametrize(
    "changes", [{"host": "elsewhere", "place": "x"}, {"pid": -1}, {"token": "../x"}, {"since": 3}], ids=str
)
def test_a_lock_that_cannot_be_looked_up_is_stale_when_it_is_old(
    tmp_path: Path, changes: dict[str, object], ahead: int
) -> None:
    """As that of another machine, of another process namespace, in a copied folder, or a damaged one."""
    path = leave(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"taken over when it has given no sign of life for {STALE_S:g} s"):
        RunLock(tmp_path).acquire()
    for seconds in (-STALE_S + 10, STALE_S - 10):
        os.utime(path, (now := path.stat().st_mtime + seconds, now))
        with pytest.raises(ValueError, match="is in use by another mythos train"):
            RunLock(tmp_path).acquire()
        os.utime(path)
    away = path.stat().st_mtime + ahead * (STALE_S + 5)
    os.utime(path, (away, away))
    mine = RunLock(tmp_path)
    mine.acquire()
    mine.check()
    mine.release()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"[1]", b"{}", b"[" * 100_000, b"\xff"])
def test_a_damaged_lock(tmp_path: Path, content: bytes) -> None:
    """One that a process is about to write looks the same, so it counts for as long as one of another machine."""
    path = tmp_path / LOCK_FILE
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a process that has just begun"):
        RunLock(tmp_path).acquire()
    os.utime(path, (1, 1))
    mine = RunLock(tmp_path)
    mine.acquire()
    mine.check()
    mine.release()


def test_a_claim_of_a_killed_start_is_taken_over_too(tmp_path: Path) -> None:
    holder = json.loads(leave(tmp_path, pid=dead_pid()).read_text())
    claim = tmp_path / f"{LOCK_FILE}.{holder['token']}"
    claim.write_text(json.dumps({**holder, "token": "0" * 16}))
    mine = RunLock(tmp_path)
    mine.acquire()
    mine.check()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    mine.release()


def test_a_lock_that_was_taken_over_meanwhile_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One start finds the lock stale; before it acts, another one takes over, from beginning to end."""
    leave(tmp_path, pid=dead_pid())
    faster, slower, seen = RunLock(tmp_path), RunLock(tmp_path), []
    is_gone = lock._is_gone

    def late(path: Path, holder: Holder | None) -> bool:
        answer = is_gone(path, holder)
        if not seen:
            seen.append(path)
            faster.acquire()
        return answer

    monkeypatch.setattr(lock, "_is_gone", late)
    with pytest.raises(ValueError, match=HELD):
        slower.acquire()
    faster.check()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    faster.release()


def race(folder: str, barrier, results, n: int) -> None:
    for trial in range(n):
        mine = RunLock(Path(folder) / str(trial))
        barrier.wait()
        try:
            mine.acquire()
        except ValueError:
            results.put((trial, 0))
        else:
            results.put((trial, 1))
        barrier.wait()  # nobody gives back before all have tried
        mine.release()


@pytest.mark.parametrize("stale", [False, True])
def test_of_several_at_once_one_wins(tmp_path: Path, stale: bool) -> None:
    n, size = 40, 4
    for trial in range(n if stale else 0):
        (tmp_path / str(trial)).mkdir()
        leave(tmp_path / str(trial), pid=dead_pid() if not trial else 2**22 + 1)
    barrier, results = CONTEXT.Barrier(size), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=race, args=(str(tmp_path), barrier, results, n)) for _ in range(size)]
    for process in processes:
        process.start()
    won = [0] * n
    for _ in range(n * size):
        trial, one = results.get(timeout=60)
        won[trial] += one
    for process in processes:
        process.join()
    assert won == [1] * n
    assert not list(tmp_path.rglob(f"{LOCK_FILE}*"))


def test_a_holder_notices_that_it_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    mine = RunLock(tmp_path)
    mine.acquire()
    os.utime(mine.path, (1, 1))
    while mine.path.stat().st_mtime < 2:  # until it is touched
        time.sleep(0.01)
    (tmp_path / "other").mkdir()
    os.replace(leave(tmp_path / "other"), mine.path)
    with pytest.raises(ValueError, match=r"run\.lock was removed or taken over while this process did not answer"):
        mine.check()
    mine.release()
    assert mine.path.exists()


def train(folder: str) -> None:
    """A run that has done two steps and then waits."""
    run = Trainer(
        config(), folder, device="cpu", threads=1, progress=False, checkpoint=CheckpointConfig(1), resume=True
    )

    def wait(run: Trainer, done: int) -> None:
        while done == 2:
            time.sleep(0.05)

    run.add_hook(wait, 1)
    run.run()


def test_a_second_trainer_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    """Also while the first is stopped, when it cannot answer; after SIGKILL the next start goes on, to the same end."""
    whole = trainer(tmp_path / "whole", every=0)
    whole.run()
    folder = tmp_path / "run"
    with Ranks(1, train, str(folder), logs=tmp_path / "logs") as ranks:
        while not (folder / "checkpoints" / "step-00000001").exists():
            assert ranks.alive
            time.sleep(0.01)
        ranks.send(signal.SIGSTOP)
        log = (folder / "metrics.jsonl").read_bytes()
        for resume in (True, False):
            with pytest.raises(
                ValueError, match=f"is in use by another mythos train \\(process {ranks.processes[0].pid}"
            ):
                trainer(folder, resume=resume)
        ranks.send(signal.SIGKILL)
    assert (folder / "metrics.jsonl").read_bytes() == log and (folder / LOCK_FILE).exists()
    again = trainer(folder, resume=True)
    again.run()
    assert_same(again, whole)
    assert not list(folder.glob(f"{LOCK_FILE}*"))


def test_two_that_were_made_at_the_same_time(tmp_path: Path) -> None:
    """Both have seen an empty folder, or the same checkpoint; the one that runs second is refused before it writes."""
    first, second = trainer(tmp_path / "run"), trainer(tmp_path / "run", config(seed=77))
    first.add_hook(crash_after(4), 1)
    with pytest.raises(Crash):
        first.run()
    with pytest.raises(ValueError, match="has changed since this command looked at it: another trainer was there"):
        second.run()
    first, second = trainer(tmp_path / "run", resume=True), trainer(tmp_path / "run", resume=True)
    first.add_hook(crash_after(8), 1)
    with pytest.raises(Crash):
        first.run()
    with pytest.raises(ValueError, match="has changed since this command looked at it"):
        second.run()
    assert trainer(tmp_path / "run", resume=True).steps_done == 6


def test_a_run_whose_lock_was_taken_writes_nothing_more(tmp_path: Path) -> None:
    run = trainer(tmp_path, every=2)
    run.add_hook(lambda run, done: (tmp_path / LOCK_FILE).unlink() if done == 3 else None, 1)
    with pytest.raises(ValueError, match=r"run\.lock was removed or taken over"):
        run.run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def train_or_say(folder: str) -> None:
    Trainer(config(), folder, device="cpu", threads=1, progress=False).run()


def test_all_processes_of_a_run_are_refused(tmp_path: Path) -> None:
    """The first process alone takes the lock; it is taken just after all have looked."""
    mine = RunLock(tmp_path / "run")
    mine.acquire()
    with Ranks(2, train_or_say, str(tmp_path / "run"), logs=tmp_path / "logs") as ranks:
        assert ranks.join(60) == [1, 1]
        assert "is in use by another mythos train" in ranks.said(0)
    mine.check()
    mine.release()


def train_with_seed(folder: str, seed: int) -> None:
    Trainer(config(seed=seed), folder, device="cpu", threads=1, progress=False).run()


def test_of_two_fresh_trainers_one_trains(tmp_path: Path) -> None:
    """Two seeds, started at the same instant: what is there in the end is the run of one of them, whole."""
    folder = tmp_path / "run"
    with (
        Ranks(1, train_with_seed, str(folder), 0, logs=tmp_path / "0") as first,
        Ranks(1, train_with_seed, str(folder), 77, logs=tmp_path / "77") as second,
    ):
        codes = first.join(60) + second.join(60)
        said = (first if codes[0] else second).said(0)
    assert sorted(codes) == [0, 1]
    assert re.search("is in use by another|already holds a run|has changed since this command looked at it", said), said
    whole = trainer(tmp_path / "whole", config(seed=(0, 77)[codes.index(0)]))
    whole.run()
    assert numbers(folder) == numbers(whole.out_dir)
    weights = "final/model.safetensors"
    assert (folder / weights).read_bytes() == (whole.out_dir / weights).read_bytes()
