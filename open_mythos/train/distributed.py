"""The processes that train one model together: how they find each other, agree, and end.

`torchrun` starts them, gives each its rank, and ends all of them when one has failed. Without it there is one process,
and all of this does nothing.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Generator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from open_mythos.train.config import ParallelConfig

BROKEN_CALL_S = 1.0
"""Seconds for torchrun to see a process that has died before those whose collective calls it has broken."""


class RankFailed(ConnectionError):
    """Processes of a run differ where they must not, or one has not answered in time."""


class Interrupted(Exception):
    """A signal has ended a run."""

    def __init__(self, steps_done: int, saved: bool) -> None:
        state = "saved" if saved else "which could not be saved"
        super().__init__(f"stopped after step {steps_done}, {state}; go on with the same command and --resume")


class World:
    """The processes of a run, seen from one of them."""

    def __init__(self, device: torch.device, parallel: ParallelConfig) -> None:
        """Join the processes that torchrun has started."""
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.is_first = self.rank == 0
        """True in the one process that writes what only one may write."""
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=parallel.timeout_s)
        if self.size > 1:
            if not dist.is_initialized():
                dist.init_process_group(backend, timeout=timeout)
            # Of the threads that save: calls of one group come in one order, and training has its own.
            self._saving = dist.new_group(backend="gloo", timeout=timeout)
        elif parallel.kind == "fsdp" and not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)

    def check_fit(self, parallel: ParallelConfig, batch_size: int) -> None:
        """Raise ValueError where a run cannot be distributed over so many processes."""
        if self.size % parallel.experts:
            raise ValueError(
                f"parallel.experts={parallel.experts} must divide the {self.size} processes of the run; start a "
                f"multiple of it with torchrun, or use parallel.experts=1"
            )
        if batch_size % self.size:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of the {self.size} processes of the run; "
                f"use batch_size={-(-batch_size // self.size) * self.size}"
            )

    def rows(self, batch_size: int) -> range:
        """Return the rows of the global batch that are this process's."""
        n = batch_size // self.size
        return range(self.rank * n, (self.rank + 1) * n)

    def agree(self, values: Mapping[str, int], total: int = 0) -> int:
        """Check that all processes have the same values, and return the sum of their totals.

        Raises:
            RankFailed: they differ; the message names what and who.
        """
        if self.size == 1:
            return total
        mine = torch.tensor([*values.values(), total])
        every = mine.new_empty(self.size, len(mine))
        dist.all_gather([*every], mine)
        for i, name in enumerate(values):
            if (odd := (every[:, i] != every[0, i]).nonzero()).numel():
                rank = int(odd[0])
                raise RankFailed(
                    f"rank {rank} has {name}={every[rank, i].item()} and rank 0 {every[0, i].item()}: they must be "
                    "equal; start all ranks with the same command, code and data"
                )
        return int(every[:, -1].sum())

    def sum(self, x: Tensor) -> Tensor:
        """Replace x by its sum over the processes, and return it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def exchange(self, text: str) -> list[str]:
        """Return the texts of all processes, by rank. A thread may call it while training goes on.

        Raises:
            RuntimeError: a process has died, or did not answer within `parallel.timeout_s`.
        """
        if self.size == 1:
            return [text]
        # No all_gather_object, which pickles.
        data = torch.tensor([*text.encode()], dtype=torch.uint8)
        sizes = torch.zeros(self.size, 1, dtype=torch.int64)
        dist.all_gather([*sizes], torch.tensor([len(data)]), self._saving)
        texts = data.new_empty(self.size, int(sizes.max()))
        dist.all_gather([*texts], F.pad(data, (0, texts.shape[1] - len(data))), self._saving)
        return [bytes(x[:n].tolist()).decode() for x, n in zip(texts, sizes, strict=True)]

    @contextlib.contextmanager
    def reporting(self) -> Generator[None]:
        """Report an error inside to torchrun, which names the first of all processes."""
        try:
            yield
        except Exception as error:
            if self.size > 1:
                # A RuntimeError is how torch reports a collective call that broke.
                time.sleep(BROKEN_CALL_S * isinstance(error, RuntimeError))
                get_error_handler().record_exception(error)
            raise


@contextlib.contextmanager
def signals_into(seen: list[int]) -> Generator[None]:
    """Put SIGTERM and SIGINT into `seen` instead of letting them end the process; in the main thread only."""
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if is_main else ()
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
