"""Checkpoints of two processes that are damaged, or that a full disk does not take: never used, never missed."""

import hashlib
import json
import os
import random
import resource
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from open_mythos.train.checkpoint import FORMAT, CheckpointConfig, Checkpoints, find_problem, read_state
from open_mythos.train.config import TrainConfig
from open_mythos.train.distributed import ParallelConfig, World
from open_mythos.train.metrics import MetricsWriter, read_metrics
from tests.train.ranks import run_ranks
from tests.train.test_resume import config, numbers, opened, trainer

FSDP = ParallelConfig("fsdp")


def train(folder: str, cfg: TrainConfig) -> None:
    trainer(Path(folder), cfg, every=2).run()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints of two processes."""
    folder = tmp_path_factory.mktemp("run") / "run"
    run_ranks(2, train, str(folder), config(steps=7, parallel=FSDP))
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


Damage = tuple[Path, bytes | None]


def flips_and_cuts(newest: Path, n_flips: int, n_cuts: int) -> Iterator[Damage]:
    """A file and what it is to hold instead."""
    rng, files = random.Random(n_flips), {path: path.read_bytes() for path in sorted(newest.iterdir())}
    for trial in range(n_flips + n_cuts):
        path, good = rng.choice(list(files.items()))
        bad = bytearray(good)
        if trial < n_flips:
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        else:
            del bad[rng.randrange(len(bad)) :]
        yield path, bytes(bad)


def exchanges(older: Path, newest: Path) -> Iterator[Damage]:
    """Files that are missing, of another step, process, group or run, empty, or too many."""
    names = sorted(path.name for path in newest.iterdir())
    for name in names:
        yield newest / name, None
        yield newest / name, b""
        if (older / name).read_bytes() != (newest / name).read_bytes():
            yield newest / name, (older / name).read_bytes()
    weights = [name for name in names if name.endswith(".safetensors")]
    for name in weights:
        for other in weights:
            if other != name:
                yield newest / name, (newest / other).read_bytes()
    manifest = json.loads((newest / "manifest.json").read_text())
    for changes in ({"format": 1}, {"files": {}}, {"files": []}, {"format": None}):
        yield newest / "manifest.json", json.dumps({**manifest, **changes}).encode()
    for content in (b"[]", b"{}", b"null", b"\xff", b"[" * 100_000):
        yield newest / "manifest.json", content
    for name in ("model-00002.safetensors", "notes.txt", ".hidden", "model-00000.safetensors.partial"):
        yield newest / name, b"x"


@pytest.mark.parametrize("n", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_damage_is_found(run: Path, n: int) -> None:
    """Bit flips, cut files, exchanged, missing and foreign ones: each is named, and the checkpoint before is used."""
    older, newest = sorted((run / "checkpoints").iterdir())
    checkpoints, found = opened(run), 0
    for path, bad in (*flips_and_cuts(newest, n, n // 5), *exchanges(older, newest)):
        good = path.read_bytes() if path.exists() else None
        if bad is None:
            path.unlink()
        else:
            path.write_bytes(bad)
        # What is wrong with the manifest may look like a file that does not fit it.
        name = newest.name if path.name == "manifest.json" else path.name
        with pytest.warns(UserWarning, match=f"{name}.*going back to the checkpoint before"):
            assert checkpoints.newest() == older
        if good is None:
            path.unlink()
        else:
            path.write_bytes(good)
        found += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.newest() == newest
    print(f"{found} damaged checkpoints")


def look(folder: str, n: int) -> None:
    """Two processes, each of which compares its share of the files."""
    world = World(torch.device("cpu"), ParallelConfig())
    older, newest = sorted((Path(folder) / "checkpoints").iterdir())
    checkpoints = Checkpoints(older.parent, CheckpointConfig(1), world, lambda folder: None)
    for path, bad in flips_and_cuts(newest, n, n // 5):
        good = path.read_bytes()
        world.agree({})
        if world.is_first:
            path.write_bytes(bad or b"")
        world.agree({})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert checkpoints.newest() == older
        # One of them, or of a broken manifest both, say it.
        assert world.agree({}, len(caught)) >= 1
        if world.is_first:
            path.write_bytes(good)
    world.agree({})
    assert checkpoints.newest() == newest


@pytest.mark.parametrize("n", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_two_processes_go_back_together(run: Path, n: int) -> None:
    run_ranks(2, look, str(run), n)


def test_nothing_left_is_an_error(run: Path) -> None:
    """Beginning anew would throw away a log of days without a word."""
    for path in (run / "checkpoints").iterdir():
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "final")
    with (
        pytest.warns(UserWarning, match=r"manifest\.json has format 1, not 2"),
        pytest.raises(ValueError, match=r"no checkpoint in .* can be used; restore one"),
    ):
        trainer(run, config(steps=7, parallel=FSDP), resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before


def fill_the_disk(folder: str, cfg: TrainConfig, n: int) -> None:
    """Save again and again, with files of one process that may not grow beyond some size."""
    run, rng = trainer(Path(folder), cfg, every=1), random.Random(n)
    run.world.agree({})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    warnings.simplefilter("ignore")

    def save(step: int) -> bool:
        run.steps_done = step
        run._save()
        return run.checkpoints.wait()

    assert save(1)
    largest = max(path.stat().st_size for path in (Path(folder) / "checkpoints" / "step-00000001").iterdir())
    last = 1
    for step in range(2, n + 2):
        size, victim = rng.randrange(largest // 2), rng.randrange(run.world.size)
        if run.world.rank == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        assert not save(step)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        run.world.agree({})
        newest = run.checkpoints.newest()
        assert newest is not None and newest.name == f"step-{last:08d}"
        if run.world.is_first:
            assert {path.suffix for path in newest.parent.iterdir()} == {""}
        if step % 10 == 0:
            assert save(step)
            last = step
        run.world.agree({})


@pytest.mark.parametrize("n", [5, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_full_disk_costs_no_checkpoint(tmp_path: Path, size: int, n: int) -> None:
    run_ranks(size, fill_the_disk, str(tmp_path / "run"), config(parallel=FSDP), n)


def train_on_a_full_disk(folder: str, cfg: TrainConfig) -> None:
    """Nothing that rank 1 saves has room; from step 6 on nothing that rank 0 writes has."""
    warnings.simplefilter("ignore")
    run = trainer(Path(folder), cfg, every=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def hook(run, done: int) -> None:
        rank_1_full, rank_0_full = run.world.rank == 1 and done > 2, run.world.is_first and 6 <= done < 10
        limit = 1000 if rank_1_full or rank_0_full else before[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    run.add_hook(hook, 1)
    run.run()


def test_training_goes_on(tmp_path: Path) -> None:
    """On a full disk of one of two ranks, and of the one that writes the log too."""
    cfg = config(parallel=FSDP)
    run_ranks(2, train, str(tmp_path / "whole"), cfg)
    run_ranks(2, train_on_a_full_disk, str(tmp_path / "run"), cfg)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    weights = "final/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    newest = opened(tmp_path / "run").newest()
    assert newest is not None and newest.name == "step-00000002"


def test_lines_wait_for_room(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"x": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 7, before[1]))
        try:
            with pytest.warns(UserWarning, match="its lines wait for room"):
                writer.write(2, {"x": 2.0})
            writer.write(3, {"x": 3.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [line["step"] for line in read_metrics(path)] == [1]
        writer.write(4, {"x": 4.0})
    assert [(line["step"], line["x"]) for line in read_metrics(path)] == [(i, float(i)) for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "metrics-pipe"])
def test_a_pipe_in_a_checkpoint_is_named_and_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    os.mkfifo(folder / name)
    if name != "manifest.json":
        files = {name: {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}}
        (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}))
    assert f"{name} is a pipe or a device" in (find_problem(folder) or "")


@pytest.mark.parametrize("text", ["[" * 50_000, '{"step": 1e400}', '{"step": "1"}', '{"step": 1}', "\0", ""])
def test_a_state_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state\.json"):
        read_state(tmp_path)
