"""The processes that train one model together: how they find each other, what they agree on, and how they end.

`torchrun` starts them and tells each its rank. Without it there is one process, and all of this does nothing.
"""

import os
import secrets
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from open_mythos.train.config import ParallelConfig


class RankFailed(ConnectionError):
    """Another process of the run has failed or fallen silent."""


class World:
    """The processes of a run as one of them sees them."""

    def __init__(self, device: torch.device, parallel: ParallelConfig) -> None:
        """Join the processes that torchrun has started."""
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self._watch: Watch | None = None
        self._talk = ""
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=parallel.timeout_s)
        if self.size > 1:
            if not dist.is_initialized():
                dist.init_process_group(backend, timeout=timeout)
            # What processes told each other in an earlier run, or before torchrun started them anew, no longer holds.
            token = torch.tensor(secrets.randbits(62))
            dist.broadcast(token, 0)
            self._talk = f"mythos{token.item()}"
            self._watch = Watch(self.rank, self.size, self._talk)
            self._watch.start()
        elif parallel.kind == "fsdp" and not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)

    def check_fit(self, parallel: ParallelConfig, batch_size: int) -> None:
        """Whether a run can be spread over so many processes.

        Raises:
            ValueError: it cannot.
        """
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

    @property
    def is_first(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0

    def rows(self, batch_size: int) -> range:
        """The rows of the global batch that are this process's."""
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
        each = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(each, mine)
        every = torch.stack(each)
        for i, name in enumerate(values):
            if (odd := (every[:, i] != every[0, i]).nonzero()).numel():
                rank = int(odd[0])
                raise RankFailed(
                    f"rank {rank} has {name}={every[rank, i].item()} and rank 0 {every[0, i].item()}: they must be "
                    "equal; start all ranks with the same command, code and data"
                )
        return int(every[:, -1].sum())

    def sum(self, x: Tensor) -> Tensor:
        """x, replaced by its sum over the processes."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def store(self) -> dist.Store:
        """Where the processes leave each other what a thread has to say; a connection of its own for each call."""
        return dist.HashStore() if self.size == 1 else connect(self._talk)

    def leave(self) -> None:
        """Tell the others that this process has done its part."""
        if self._watch is not None:
            self._watch.leave()

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others that this process has failed; what went wrong first in any of them."""
        return error if self._watch is None else self._watch.fail(error)


def connect(talk: str) -> dist.Store:
    """A new connection to the store that torchrun's processes share, for one talk. A thread needs one of its own."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(talk, dist.TCPStore(address, port, timeout=timedelta(seconds=60)))


def wait(store: dist.Store, keys: Sequence[str], patience: timedelta) -> None:
    """Wait until all keys are in the store.

    Raises:
        RankFailed: some process has failed, or has not set its key in time.
    """
    deadline, named = time.monotonic() + patience.total_seconds(), "another process has not answered in time"
    while not store.check(list(keys)):
        if named != (first := store.get("failed").decode() if store.check(["failed"]) else named):
            # What only has to be written still may come: the others have so long before they end.
            named, deadline = first, time.monotonic() + Watch.GRACE_BEATS * Watch.BEAT_S
        if time.monotonic() > deadline:
            raise RankFailed(named)
        time.sleep(0.01)


class Watch(threading.Thread):
    """Ends this process when another one has failed or fallen silent, whatever the main thread is waiting for.

    Each process counts up a number of its own and looks at that of the next; whoever fails or sees one fail says so
    where all look.
    """

    BEAT_S = 1.0
    SILENCE_S = 15.0
    GRACE_BEATS = 5

    def __init__(self, rank: int, size: int, talk: str) -> None:
        super().__init__(daemon=True)
        self.rank, self.next_rank = rank, (rank + 1) % size
        self._store, self._main_store = connect(talk), connect(talk)
        self._left = threading.Event()

    def run(self) -> None:
        n, seen, since = 0, b"", time.monotonic()
        try:
            while not self._left.wait(self.BEAT_S):
                n += 1
                self._store.set(f"beat/{self.rank}", str(n))
                if self._store.check(["failed"]):
                    self._end(self._store.get("failed").decode())
                beat = self._beat(self._store)
                if beat != seen or beat == b"done":
                    seen, since = beat, time.monotonic()
                elif time.monotonic() - since > self.SILENCE_S:
                    silent = f"rank {self.next_rank} has been silent for {self.SILENCE_S:g} s"
                    self._store.compare_set("failed", "", silent)
        except RuntimeError:  # torch's error of a lost store
            if not self._left.wait(self.GRACE_BEATS * self.BEAT_S):
                self._end("the process that started the ranks is gone")

    def _beat(self, store: dist.Store) -> bytes:
        """The number of the next process, "done", or nothing yet."""
        key = f"beat/{self.next_rank}"
        return store.get(key) if store.check([key]) else b""

    def _end(self, reason: str) -> None:
        if not self._left.wait(self.GRACE_BEATS * self.BEAT_S):  # the main thread may be about to say it itself
            print(f"mythos train: rank {self.rank} ends, for {reason}", file=sys.stderr, flush=True)
            os._exit(1)

    def leave(self) -> None:
        self._left.set()
        self.join()
        self._main_store.set(f"beat/{self.rank}", "done")

    def fail(self, error: BaseException) -> BaseException:
        mine = (
            str(error) if isinstance(error, RankFailed) else f"rank {self.rank} failed: {type(error).__name__}: {error}"
        )
        try:
            # A RuntimeError is how torch reports a collective call that broke.
            lost = self._why_lost() if isinstance(error, RuntimeError) else None
            first = self._main_store.compare_set("failed", "", lost or mine).decode()
        except RuntimeError:
            first = "the process that started the ranks is gone"
        self._left.set()
        return error if first == mine else RankFailed(first)

    def _why_lost(self) -> str | None:
        """Wait for another process to say what broke a call; None if none does and the next one is well."""
        store, beat, began = self._main_store, self._beat(self._main_store), time.monotonic()
        while not store.check(["failed"]):
            waited = time.monotonic() - began
            if waited > (self.GRACE_BEATS - 1) * self.BEAT_S and self._beat(store) == beat != b"done":
                return f"rank {self.next_rank} is gone"
            if waited > self.GRACE_BEATS * self.BEAT_S:
                return None
            time.sleep(0.1)
        return None
