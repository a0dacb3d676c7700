"""Several processes that train together, as torchrun starts them, without its seconds of imports for each."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

# Children are forked from a process that has imported torch and has never used it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["open_mythos.train.trainer", "torch._dynamo", "tests.train.ranks"])


class Ranks:
    """`size` processes that call `fn(*args)` each, with the environment that torchrun gives them.

    The store that they share lives here, so it outlasts them.
    """

    def __init__(self, size: int, fn: Callable[..., None], *args: Any) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = [
            CONTEXT.Process(target=_run, args=(rank, size, self.store.port, fn, args), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

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


def run_ranks(size: int, fn: Callable[..., None], *args: Any) -> None:
    """Call `fn(*args)` in `size` processes that can train together; all have to end well."""
    assert Ranks(size, fn, *args).join() == [0] * size


def _run(rank: int, size: int, port: int, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    try:
        fn(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
