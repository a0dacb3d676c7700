"""Several processes that train together, as torchrun starts them, without its seconds of imports for each."""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

# Children are forked from a process that has imported torch and has never used it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["open_mythos.train.trainer", "torch._dynamo", "tests.train.ranks"])


class Ranks:
    """`size` processes that call `fn(*args)` each, with the environment that torchrun gives them.

    The store that they share lives here, so it outlasts them. What they write to stderr goes to `logs`, if given, as
    RANK.txt. Leaving a `with` block ends those that still run.
    """

    def __init__(self, size: int, fn: Callable[..., None], *args: Any, logs: Path | None = None) -> None:
        self.logs = logs
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = [
            CONTEXT.Process(target=_run, args=(rank, size, self.store.port, logs, fn, args), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def alive(self) -> list[int]:
        """The ranks that still run."""
        return [rank for rank, process in enumerate(self.processes) if process.is_alive()]

    def send(self, number: signal.Signals, ranks: Iterable[int] | None = None) -> None:
        """Send a signal to those of some ranks that still run; None: to all."""
        for rank in self.alive if ranks is None else ranks:
            if self.processes[rank].is_alive():
                with contextlib.suppress(ProcessLookupError):  # it ends just now
                    os.kill(self.processes[rank].pid or 0, number)

    def wait(self, ranks: Iterable[int], timeout_s: float) -> float:
        """Seconds until the last of these ranks has ended; fails if one still runs after `timeout_s`."""
        started = time.monotonic()
        for rank in ranks:
            self.processes[rank].join(max(0, started + timeout_s - time.monotonic()))
            assert not self.processes[rank].is_alive(), f"rank {rank} still runs after {timeout_s} s"
        return time.monotonic() - started

    def join(self, timeout_s: float = 120) -> list[int | None]:
        """The exit status of each; None for one that had to be ended because it still ran."""
        for process in self.processes:
            process.join(timeout_s)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def said(self, rank: int) -> str:
        """What a rank has written to stderr."""
        assert self.logs is not None
        return (self.logs / f"{rank}.txt").read_text("utf-8")


def run_ranks(size: int, fn: Callable[..., None], *args: Any) -> None:
    """Call `fn(*args)` in `size` processes that can train together; all have to end well."""
    with tempfile.TemporaryDirectory() as logs, Ranks(size, fn, *args, logs=Path(logs)) as ranks:
        codes = ranks.join(600)
        assert codes == [0] * size, "\n".join(ranks.said(rank) for rank in range(size))


def _run(rank: int, size: int, port: int, logs: Path | None, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch

    if logs is not None:
        os.dup2(os.open(logs / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    multiprocessing.current_process()._config["daemon"] = False  # a daemon may not have data workers
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    try:
        fn(*args)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
