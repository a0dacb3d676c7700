"""Runs that go on with other processes and data workers: the same tokens, and the same numbers but for rounding."""

import dataclasses
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from open_mythos.data.documents import Reading
from open_mythos.data.prepare import Settings, prepare
from open_mythos.tasks import Addition, Shards, Stream
from open_mythos.train.checkpoint import CheckpointConfig
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.distributed import ParallelConfig
from open_mythos.train.loader import StepData
from open_mythos.train.tensor_shards import ShardReader
from open_mythos.train.trainer import Interrupted, Trainer
from tests.data.test_stream import make
from tests.train.ranks import run_ranks
from tests.train.test_distributed import config, numbers
from tests.train.test_kill import fingerprint

DDP, FSDP, EXPERTS = ParallelConfig(), ParallelConfig("fsdp"), ParallelConfig("fsdp", experts=2)
# Processes, how the model is spread over them, data workers; each goes on from what the one before left.
PATHS = {
    "1, 2, 1": ((1, DDP, 0), (2, DDP, 1), (1, DDP, 3)),
    "2, 1": ((2, FSDP, 0), (1, DDP, 1)),
    "2, experts": ((2, FSDP, 3), (2, EXPERTS, 0)),
    "2, 3": ((2, FSDP, 1), (3, FSDP, 0)),
    "experts, 3": ((2, EXPERTS, 1), (3, DDP, 0)),
    "1, experts, 1": ((1, FSDP, 0), (2, EXPERTS, 1), (1, DDP, 0)),
}
STEPS = 9


def run(folder: str, cfg: TrainConfig, workers: int, stop: int) -> None:
    """Train up to step `stop`, and log what all processes have read."""
    warnings.filterwarnings("ignore", "This DataLoader will create")
    run = Trainer(
        cfg, folder, device="cpu", threads=1, progress=False, checkpoint=CheckpointConfig(1, last=STEPS), resume=True,
        workers=workers,
    )  # fmt: skip
    get, read = run.loader.get, []

    def remember(step: int) -> StepData:
        read[:] = [get(step)]
        return read[0]

    def hook(run: Trainer, done: int) -> dict[str, float]:
        if done == stop and run.world.rank == run.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        mine = torch.cat((read[0].batch.input_ids, read[0].batch.labels), 1)
        each = [torch.empty_like(mine) for _ in range(run.world.size)]
        if run.world.size > 1:
            dist.all_gather(each, mine)
        return {"data": fingerprint(torch.cat(each) if run.world.size > 1 else mine)}

    run.loader.get = remember
    run.add_hook(hook, 1)
    try:
        run.run()
    except Interrupted:
        assert stop < cfg.steps


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("data")
    make(folder / "stream")
    (folder / "text.txt").write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(400)))
    prepare([str(folder / "text.txt")], folder / "shards", "bytes", Settings(Reading(cut="lines"), 0.2), progress=False)
    return {
        "addition": Addition(1, 2),
        "shards": Shards((str(folder / "shards"),), seq_len=11),
        "stream": Stream(str(folder / "stream"), vocabulary="bytes", seq_len=11, held_out=0.2),
    }


def moments(folder: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint, whole."""
    stored = ShardReader(folder / "checkpoints" / f"step-{STEPS - 1:08d}")
    groups = ("model", "optimizer0", "optimizer1")
    return {f"{g}/{name}": stored.read(g, name, 0, 10**9) for g in groups for name in stored.names(g)}


@pytest.fixture(
    scope="module", params=["stream", *(pytest.param(task, marks=pytest.mark.slow) for task in ("addition", "shards"))]
)
def whole(request: pytest.FixtureRequest, tasks: dict, tmp_path_factory: pytest.TempPathFactory):
    """A run of one process that nothing happens to, and a function that makes its configuration."""

    def make(parallel: ParallelConfig) -> TrainConfig:
        cfg = config("poisson", parallel, data=tasks[request.param], steps=STEPS, batch_size=6,
                     eval=EvalConfig(every=4, rows=5, loops=(2,)))  # fmt: skip
        return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=259))

    folder = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(1, run, str(folder), make(DDP), 0, STEPS)
    return folder, make


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[] if path == "1, experts, 1" else pytest.mark.slow) for path in PATHS]
)
def test_other_processes_go_on(tmp_path: Path, whole, path: str) -> None:
    expected, make = whole
    stops = (3, 6, STEPS)[-len(PATHS[path]) :]
    for stop, (size, parallel, workers) in zip(stops, PATHS[path], strict=True):
        run_ranks(size, run, str(tmp_path / "run"), make(parallel), workers, stop)
    got, want = numbers(tmp_path / "run"), numbers(expected)
    assert [line.get("data") for line in got] == [line.get("data") for line in want]
    assert sum("data" in line for line in got) == STEPS
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
    a, b = moments(tmp_path / "run"), moments(expected)
    assert a.keys() == b.keys() and any("exp_avg" in name for name in a) and any("momentum" in name for name in a)
    for name, x in b.items():
        torch.testing.assert_close(a[name], x, rtol=1e-9, atol=1e-9, msg=name)
    print(f"{path}: largest difference {max((a[name] - x).abs().max().item() for name, x in b.items()):.1e}")
