"""Processes that make batches and die: the same batches, from where the dead ones stood."""

import os
import random
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import _utils

from open_mythos.tasks import Addition, Stream
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.loader import Loader
from tests.data.test_stream import make
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
ROWS = range(1, 3)


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch looks every 5 s whether workers live."""
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)


def config(task: str, folder: Path) -> TrainConfig:
    if task == "stream":
        make(folder / "data")
        data = Stream(str(folder / "data"), vocabulary="bytes", seq_len=23, held_out=0.2)
    else:
        data = Addition(1, 2)
    return TrainConfig(
        model=tiny(vocab_size=300), data=data, steps=100_000, batch_size=4, eval=EvalConfig(rows=4),
        loops=LoopsConfig("poisson", 2, max_loops=4),
    )  # fmt: skip


def batches(loader: Loader, first: int = 0) -> Iterator[torch.Tensor]:
    step = first
    while True:
        batch = loader.get(step).batch
        yield torch.cat((batch.input_ids, batch.labels))
        step += 1


def pids(loader: Loader) -> list[int]:
    return [worker.pid for worker in loader._steps._workers]


@pytest.mark.parametrize("task", ["addition", "stream"])
@pytest.mark.parametrize("n", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_worker_that_dies_is_replaced(tmp_path: Path, task: str, n: int) -> None:
    cfg, rng = config(task, tmp_path), random.Random(n)
    alone, loader = Loader(cfg, ROWS, 0), Loader(cfg, ROWS, 0, workers=3)
    expected, got, waited = batches(alone), batches(loader), []
    for _ in range(n):
        at = rng.randrange(34, 45)  # three within 100 steps are borne
        for step in range(45):
            if step == at:
                time.sleep(rng.choice([0, rng.uniform(0, 0.01)]))
                os.kill(rng.choice(pids(loader)), signal.SIGKILL)
            started = time.monotonic()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "a data worker has died")
                assert torch.equal(next(got), next(expected))
            waited.append(time.monotonic() - started)
        assert loader.place is None or torch.equal(loader.place, alone.place)
    print(f"{n} deaths, longest wait {max(waited):.1f} s")


def test_workers_that_die_again_and_again(tmp_path: Path) -> None:
    loader = Loader(config("addition", tmp_path), ROWS, 0, workers=1)
    got = batches(loader)
    with (
        pytest.warns(UserWarning, match=r"a data worker has died .* its work is done again from step"),
        pytest.raises(ChildProcessError, match="4 data workers have died within 100 steps; look for what ends them"),
    ):
        for _ in range(100):
            next(got)
            os.kill(pids(loader)[0], signal.SIGKILL)
