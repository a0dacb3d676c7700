"""SIGKILL and SIGTERM at random instants, to one process or two: every resume ends as the run that nothing hit."""

import hashlib
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from open_mythos.train.checkpoint import CheckpointConfig
from open_mythos.train.config import TrainConfig
from open_mythos.train.distributed import ParallelConfig
from open_mythos.train.loader import StepData
from open_mythos.train.metrics import last_step
from open_mythos.train.trainer import Interrupted, Trainer
from tests.train.ranks import Ranks, run_ranks
from tests.train.test_resume import config, newest_step, numbers

LAST_SAVE = 10
CASES = {
    "alone": (1, ParallelConfig(), 150),
    "ddp": (2, ParallelConfig(), 50),
    "fsdp": (2, ParallelConfig("fsdp"), 60),
    "experts": (2, ParallelConfig("fsdp", experts=2), 40),
}
"""Processes, how the model is spread over them, and how often to kill."""


Whole = tuple[Path, int, TrainConfig, int]


def run(folder: str, cfg: TrainConfig, every: int) -> None:
    """Train to the end, or on; the log also tells what was read and where random numbers stand."""
    saves = CheckpointConfig(every, milestones=LAST_SAVE)
    run = Trainer(cfg, folder, device="cpu", threads=1, progress=False, checkpoint=saves, resume=True)
    get, read = run.loader.get, []

    def remember(step: int) -> StepData:
        read[:] = [get(step)]
        return read[0]

    run.loader.get = remember
    run.add_hook(
        lambda run, done: {"rng": fingerprint(torch.get_rng_state()), "data": fingerprint(read[0].batch.input_ids)}, 1
    )
    try:
        run.run()
    except Interrupted as error:
        print(error)
        raise SystemExit(75) from None


def fingerprint(x: torch.Tensor) -> int:
    return int.from_bytes(hashlib.sha256(x.numpy().tobytes()).digest()[:6], "big")


def files(folder: Path) -> dict[str, bytes]:
    """Weights at the end, and weights, moments and numbers of the last checkpoint."""
    found = [folder / "final" / "model.safetensors"]
    found += (folder / "checkpoints" / f"step-{LAST_SAVE:08d}").glob("*-*.safetensors")
    found += [folder / "checkpoints" / f"step-{LAST_SAVE:08d}" / "state.json"]
    return {path.name: path.read_bytes() for path in found}


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=[] if case in ("alone", "fsdp") else pytest.mark.slow) for case in CASES],
)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run that nothing happens to; its processes and configuration, and how often to kill."""
    size, parallel, n = CASES[request.param]
    folder, cfg = tmp_path_factory.mktemp("whole") / "run", config(parallel=parallel)
    run_ranks(size, run, str(folder), cfg, 2)
    return folder, size, cfg, n


def assert_same(folder: Path, whole: Path) -> None:
    assert numbers(folder) == numbers(whole)
    assert files(folder) == files(whole)
    assert not [path for path in (folder / "checkpoints").iterdir() if path.suffix]  # nothing half written is left


def wait_for_an_instant(ranks: Ranks, folder: Path, done: int, rng: random.Random) -> None:
    """Until some time after a new checkpoint, so that a run that is cut again and again has an end."""
    while ranks.alive and newest_step(folder) <= done:
        time.sleep(0.001)
    if rng.random() < 0.5:  # in the next save
        while ranks.alive and not any((folder / "checkpoints").glob("*.partial")):
            pass
        time.sleep(rng.uniform(0, 0.03))
    else:
        time.sleep(rng.uniform(0, 0.2))


@pytest.mark.parametrize("share", [0.05, pytest.param(1.0, marks=pytest.mark.slow)])
def test_killed(tmp_path: Path, whole: Whole, share: float) -> None:
    """All processes at once, or one only: the other one then ends by itself."""
    expected, size, cfg, n = whole
    rng, kills, in_saves, alone, trial = random.Random(n), 0, 0, 0, 0
    while kills < share * n:
        trial += 1
        folder = tmp_path / str(trial)
        while True:
            done = newest_step(folder)
            with Ranks(size, run, str(folder), cfg, 2, logs=tmp_path / "logs") as ranks:
                wait_for_an_instant(ranks, folder, done, rng)
                victims = rng.choice([[*range(size)], [rng.randrange(size)]])
                hit = [rank for rank in victims if rank in ranks.alive]
                ranks.send(signal.SIGKILL, victims)
                ranks.wait(range(size), 30)
                codes = [process.exitcode for process in ranks.processes]
            if not hit or -signal.SIGKILL not in codes:
                assert codes == [0] * size
                break
            kills += 1
            alone += len(hit) < size
            in_saves += any((folder / "checkpoints").glob("*.partial"))
            if len(hit) < size and codes[1 - hit[0]]:
                assert re.search("Error: .*(onnection|peer)", ranks.said(1 - hit[0])), ranks.said(1 - hit[0])
        assert_same(folder, expected)
    print(f"{kills} kills, {in_saves} in a save, {alone} of one process of two, {trial} runs")


@pytest.mark.parametrize("n", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_terminated(tmp_path: Path, whole: Whole, n: int) -> None:
    """The step in work is finished and saved, by all, whoever got the signal, and however often."""
    expected, size, cfg, _ = whole
    rng, stops, in_saves, trial = random.Random(n), 0, 0, 0
    while stops < n:
        trial += 1
        folder = tmp_path / str(trial)
        while True:
            done = newest_step(folder)
            with Ranks(size, run, str(folder), cfg, 1, logs=tmp_path / "logs") as ranks:
                wait_for_an_instant(ranks, folder, done, rng)
                in_save = any((folder / "checkpoints").glob("*.partial"))
                victims = rng.choice([[*range(size)], [rng.randrange(size)]])
                ranks.send(signal.SIGTERM, victims)
                seen = last_step(folder / "metrics.jsonl")
                twice = rng.random() < 0.5
                if twice:
                    time.sleep(rng.uniform(0, 0.02))
                    ranks.send(signal.SIGTERM, victims)
                ranks.wait(range(size), 30)
                codes = [process.exitcode for process in ranks.processes]
            if codes == [0] * size:
                break
            # When all is saved and the process about to end, a second signal ends it at once.
            assert {*codes} <= ({75, -signal.SIGTERM} if twice else {75}), (codes, ranks.said(0))
            # The signal came in step `seen + 1`, perhaps behind the point where the processes hear of it.
            assert done < newest_step(folder) <= seen + 2
            stops += 1
            in_saves += in_save
        assert_same(folder, expected)
    print(f"{stops} stops, {in_saves} in a save, {trial} runs")
