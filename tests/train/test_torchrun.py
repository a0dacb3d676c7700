"""The command as users start it: under torchrun, and in a terminal whose signals reach every process of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from open_mythos.train.config import EvalConfig
from open_mythos.train.distributed import ParallelConfig
from open_mythos.train.metrics import read_metrics
from tests.train.test_distributed import assert_close, config, train
from tests.train.test_resume import newest_step

pytestmark = pytest.mark.slow
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m")


def start(root: Path, folder: Path, *before: str, workers: int = 0) -> subprocess.Popen:
    """`mythos train --resume`, in a session of its own as a terminal would have it."""
    return subprocess.Popen(
        [*before, "open_mythos", "train", "--config", str(folder / "run.yaml"), "--out", str(folder / "run"),
         "--resume", "--checkpoint-every", "5", "--device", "cpu", "--threads", "1", "--workers", str(workers)],
        cwd=root, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_a_save(process: subprocess.Popen, folder: Path) -> None:
    while process.poll() is None and not newest_step(folder / "run"):
        time.sleep(0.01)


def test_torchrun_is_stopped_and_goes_on(tmp_path: Path, repo_root: Path) -> None:
    cfg = config("poisson", ParallelConfig("fsdp"), steps=60, eval=EvalConfig())
    (tmp_path / "run.yaml").write_text(cfg.to_yaml())
    process = start(repo_root, tmp_path, *TORCHRUN)
    wait_for_a_save(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode and said.count("saved; go on with the same command and --resume") == 2, said
    stopped = newest_step(tmp_path / "run")
    assert 5 <= stopped < 60 and not (tmp_path / "run" / "final").exists()
    process = start(repo_root, tmp_path, *TORCHRUN)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert out.count("The model is in") == 1
    train(str(tmp_path / "one"), config("poisson", steps=60, eval=EvalConfig()))
    assert_close(tmp_path / "run", tmp_path / "one")


def test_ctrl_c_reaches_everyone(tmp_path: Path, repo_root: Path) -> None:
    """SIGINT to the run and to its data workers alike."""
    cfg = config("poisson", steps=5000, eval=EvalConfig())
    (tmp_path / "run.yaml").write_text(cfg.to_yaml())
    process = start(repo_root, tmp_path, sys.executable, "-m", workers=2)
    wait_for_a_save(process, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Traceback" not in said and "saved; go on with the same command and --resume" in said
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == newest_step(tmp_path / "run")
