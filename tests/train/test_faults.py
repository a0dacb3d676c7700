"""Ranks that disagree, fail, die or fall silent: all others end soon, and torchrun names what happened first."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from open_mythos.train.checkpoint import CheckpointConfig
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.distributed import ParallelConfig
from open_mythos.train.optim import OptimConfig
from open_mythos.train.trainer import Trainer
from tests.train.ranks import Ranks, run_ranks
from tests.train.test_distributed import config, numbers, train
from tests.train.test_resume import opened

AT = 3
SPREADS = {
    "ddp": ParallelConfig(),
    "fsdp": ParallelConfig("fsdp"),
    "experts": ParallelConfig("fsdp", experts=2),
}
CHANGES: dict[str, Callable[[TrainConfig], dict]] = {
    "seed": lambda cfg: {"seed": 1},
    "rate": lambda cfg: {"optim": OptimConfig("muon", lr=1e-3)},
    "kind": lambda cfg: {"parallel": ParallelConfig("fsdp" if cfg.parallel.kind == "ddp" else "ddp")},
    "width": lambda cfg: {"model": dataclasses.replace(cfg.model, dim=32)},
    "experts of 4": lambda cfg: {"parallel": ParallelConfig("fsdp", experts=4)},
}
DIFFERENT = {
    **dict.fromkeys(CHANGES, "rank 1 has configuration="),
    "saves": "rank 1 has options=",
    "step": "rank 1 has step=4 and rank 0 3",
    "depth": "rank 1 has depths=",
}
"""Ways in which rank 1 differs from rank 0, and what both say."""
RAISED = {
    "constructor": "ValueError: no tokenizer here",
    "data": "OSError: no such shard",
    "hook": "ValueError: this hook fails",
    "runtime error": "RuntimeError: this hook fails",
    "nan": "FloatingPointError: embed.weight is not finite",
}
"""Errors of rank 1, which it says."""
ENDED = ("exit", "interrupt", "killed", "killed in constructor", "killed in save")
"""Ways in which rank 1 ends without a word of its own."""
SILENT = ("stopped", "stopped in save", "stuck")
"""Ways in which rank 1 no longer answers, which rank 0 finds after `parallel.timeout_s`."""
FAULTS = (*DIFFERENT, *RAISED, *ENDED, *SILENT)
FAST = {
    ("kind", "ddp"), ("width", "fsdp"), ("saves", "ddp"), ("depth", "experts"), ("hook", "fsdp"), ("killed", "ddp"),
    ("nan", "fsdp"), ("killed in save", "ddp"), ("stopped", "experts"),
}  # fmt: skip


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def faulty(folder: str, cfg: TrainConfig, what: str, every: int = 2) -> None:
    """Train, with a fault in rank 1."""
    bad = os.environ["RANK"] == "1"
    if bad and what in CHANGES:
        cfg = dataclasses.replace(cfg, **CHANGES[what](cfg))
    if bad and what == "saves":
        every += 1
    if bad and what == "constructor":
        mock.patch.object(type(cfg.data), "tokenizer", side_effect=ValueError("no tokenizer here")).start()
    if bad and what == "killed in constructor":
        mock.patch.object(type(cfg.data), "tokenizer", side_effect=die).start()
    run = Trainer(cfg, folder, device="cpu", threads=1, progress=False, checkpoint=CheckpointConfig(every), resume=True)
    if bad:
        break_rank(run, what)
    run.run()


def break_rank(run: Trainer, what: str) -> None:
    get, step, write = run.loader.get, run.train_step, run.checkpoints._write_own
    depths = LoopsConfig.depths

    def hook(run: Trainer, done: int) -> None:
        if done == AT:
            if what == "hook":
                raise ValueError("this hook fails")
            if what == "runtime error":
                raise RuntimeError("this hook fails")
            if what in ("killed", "stopped"):
                run.checkpoints.join()  # what is being saved now may be lost
                die(signal.SIGKILL if what == "killed" else signal.SIGSTOP)
            if what == "exit":
                raise SystemExit(3)
            if what == "interrupt":
                raise KeyboardInterrupt
            if what == "stuck":
                time.sleep(1000)
            if what == "nan":
                with torch.no_grad():
                    run.sharded.shards()["embed.weight"].local.view(-1)[0] = torch.nan

    def bad_get(number: int):
        if what == "data" and number == AT:
            raise OSError("no such shard")
        return get(number)

    def bad_step(number: int, log: bool = True):
        return step(number + (what == "step" and number >= AT), log)

    def bad_write(*args: object):
        if what == "killed in save":
            die()
        if what == "stopped in save":
            die(signal.SIGSTOP)
        if what == "stuck in save":
            time.sleep(1000)
        return write(*args)

    run.add_hook(hook, 1)
    run.loader.get, run.train_step, run.checkpoints._write_own = bad_get, bad_step, bad_write
    if what == "depth":
        mock.patch.object(LoopsConfig, "depths", lambda *args: depths(*args) + (args[2] == AT)).start()


def faulty_config(spread: str, timeout_s: float = 600.0) -> TrainConfig:
    parallel = dataclasses.replace(SPREADS[spread], timeout_s=timeout_s)
    return config(batch_size=4, steps=12, dtype="float32", parallel=parallel, eval=EvalConfig())


@pytest.mark.parametrize(
    ("what", "spread"),
    [
        pytest.param(what, spread, marks=() if (what, spread) in FAST else pytest.mark.slow)
        for what in FAULTS
        for spread in SPREADS
    ],
)
def test_all_end(tmp_path: Path, what: str, spread: str) -> None:
    """Without torchrun's help: a rank that has failed ends the others, and a silent one after the configured time."""
    cfg = faulty_config(spread, 5 if what in SILENT else 600)
    with Ranks(2, faulty, str(tmp_path / "run"), cfg, what, logs=tmp_path / "logs") as ranks:
        started = time.monotonic()
        faulted = ranks.wait([1], 60) if what not in SILENT else 0.0
        ranks.wait([0], 60)
        ended = time.monotonic() - started
        # A stopped process ends once it may go on; one that sleeps is ended by torchrun.
        ranks.send(signal.SIGKILL if what == "stuck" else signal.SIGCONT)
        ranks.wait([1], 30)
        codes = [process.exitcode for process in ranks.processes]
        said = [ranks.said(rank).strip() for rank in range(2)]
    print(f"{what}, {spread}: rank 1 ended {faulted:.1f} s and rank 0 {ended:.1f} s after the start")
    assert all(codes) and ended < 30, codes
    for rank in range(2):
        assert DIFFERENT.get(what, "Error: ") in said[rank] or (rank and what in (*ENDED, "stuck")), said[rank]
    assert RAISED.get(what, "") in said[1], said[1]
    assert "Timed out" in said[0] or what not in SILENT, said[0]
    if what not in ("constructor", "killed in constructor", "killed in save", "stopped in save", "saves", *CHANGES):
        newest = opened(tmp_path / "run").newest()  # what had been saved stands
        assert newest is not None and newest.name == "step-00000002"


@pytest.mark.parametrize("what", ["killed in save", "stopped in save"])
def test_the_last_save_waits_for_nobody(tmp_path: Path, what: str) -> None:
    """No step comes behind it, whose exchanges would break; SIGTERM, as torchrun sends it, is no help either."""
    cfg = faulty_config("ddp", 5 if what in SILENT else 600)
    with Ranks(2, faulty, str(tmp_path / "run"), cfg, what, 100, logs=tmp_path / "logs") as ranks:
        while ranks.alive == [0, 1] and not any((tmp_path / "run" / "checkpoints").glob("*.partial")):
            time.sleep(0.01)
        ranks.send(signal.SIGTERM, [0])
        ranks.wait([0], 20)
        assert ranks.processes[0].exitcode == 1
        assert ("Timed out" if what in SILENT else "peer") in ranks.said(0), ranks.said(0)
    assert opened(tmp_path / "run").newest() is None


@record
def launched(*args: object) -> None:
    torch.set_num_threads(1)
    faulty(*args)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("hook", "ValueError: this hook fails"),
        pytest.param("killed", "Signal 9 (SIGKILL)", marks=pytest.mark.slow),
        pytest.param("runtime error", "RuntimeError: this hook fails", marks=pytest.mark.slow),
        pytest.param("step", "rank 1 has step=4 and rank 0 3", marks=pytest.mark.slow),
        pytest.param("stopped", "Timed out", marks=pytest.mark.slow),
    ],
)
def test_torchrun_names_the_first_error(tmp_path: Path, what: str, named: str) -> None:
    """Under torchrun's own agent, which ends the ranks that have not ended by themselves."""
    agent = LaunchConfig(1, 1, 2, run_id=what, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
                         monitor_interval=0.1, start_method="forkserver")  # fmt: skip
    cfg = faulty_config("ddp", 5 if what in SILENT else 600)
    with pytest.raises(ChildFailedError) as error:
        elastic_launch(agent, launched)(str(tmp_path / "run"), cfg, what)
    rank, failure = error.value.get_first_failure()
    assert named in str(failure.message), failure
    assert rank == 1 or what in ("step", "stopped")


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.slow
def test_ranks_that_halt_at_different_depths(tmp_path: Path, spread: str) -> None:
    """Ranks read different rows, at different sampled depths, whose tokens halt at different loops."""
    cfg = config("act", SPREADS[spread], steps=200, dtype="float32", eval=EvalConfig(every=50, rows=5))
    run_ranks(2, train, str(tmp_path / "run"), cfg)
    assert numbers(tmp_path / "run")[-1]["step"] == 200


def twice(folder: str, cfg: TrainConfig) -> None:
    for name in ("a", "b"):
        train(f"{folder}/{name}", cfg, checkpoint=CheckpointConfig(2))


def test_two_runs_one_after_another(tmp_path: Path) -> None:
    """What the processes told each other in the first run does not end or mislead the second."""
    cfg = config(batch_size=4, steps=6, dtype="float32", parallel=ParallelConfig("fsdp"), eval=EvalConfig())
    run_ranks(2, twice, str(tmp_path), cfg)
    for name in ("a", "b"):
        newest = opened(tmp_path / name).newest()
        assert newest is not None and newest.name == "step-00000006"
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
