"""The batches of a run, step by step, made ahead of time by worker processes if there are any.

What a step gets depends on the run's configuration and the step alone: not on the number of processes that train or of
workers that load, nor on what became of them.
"""

import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from open_mythos.tasks import Stream
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import Batch
from open_mythos.train.config import TrainConfig

MAX_DEATHS, DEATH_WINDOW = 3, 100
"""Workers that may die within so many steps before the run gives up."""


@dataclass(frozen=True)
class Steps(Dataset[Batch]):
    """What one process needs of every step: its rows of the global batch."""

    cfg: TrainConfig
    rows: range

    def __getitem__(self, index: int) -> Batch:
        """The batch of step `index`."""
        cfg, rows = self.cfg, self.rows
        depths, rng = cfg.loops.depths(cfg.seed, index, cfg.batch_size), stream(cfg.seed, index, Purpose.DATA)
        first = index * cfg.batch_size
        if cfg.data.on_disk:
            # Each row depends on its own number only, so the others need not be read.
            return cfg.data.batch(rng, len(rows), depths[rows.start : rows.stop], first + rows.start)
        return cfg.data.batch(rng, cfg.batch_size, depths, first).take(slice(rows.start, rows.stop))


@dataclass(frozen=True)
class Windows(IterableDataset[tuple[Batch, Tensor]]):
    """The same of a stream, whose rows go on where they stood: batches, each with the place behind it."""

    data: Stream
    rows: range
    batch_size: int
    place: Tensor | None
    n_steps: int

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        state = None if self.place is None else self.place.numpy()
        lanes = self.data.lanes(self.rows, self.batch_size, state)
        for _ in range(self.n_steps):
            yield lanes.next(), torch.from_numpy(lanes.state.copy())


class Loader:
    """Batches from `first_step` on, in order."""

    def __init__(
        self, cfg: TrainConfig, rows: range, first_step: int, workers: int = 0, place: Tensor | None = None
    ) -> None:
        """Args:
        workers: processes that make batches; 0: this process does, when a batch is asked for. A stream takes one.
        place: (len(rows), k) int64, where the rows of a stream go on; None: at its beginning.
        """
        self.cfg, self.rows, self.next_step, self.place = cfg, rows, first_step, place
        self.streams = isinstance(cfg.data, Stream)
        self.workers = min(workers, 1) if self.streams else workers
        self._deaths: list[int] = []
        self._batches: Iterator | None = None

    def _start(self) -> Iterator:
        options: dict[str, Any] = {"dataset": Steps(self.cfg, self.rows)}
        if isinstance(self.cfg.data, Stream):
            n_steps = self.cfg.steps - self.next_step
            options["dataset"] = Windows(self.cfg.data, self.rows, self.cfg.batch_size, self.place, n_steps)
        else:
            options["sampler"] = range(self.next_step, self.cfg.steps)
        if not self.workers:
            dataset = options["dataset"]
            return iter(dataset) if self.streams else (dataset[step] for step in options["sampler"])
        handler = signal.getsignal(signal.SIGCHLD)
        batches = iter(
            DataLoader(**options, batch_size=None, num_workers=self.workers, worker_init_fn=_leave_signals_to_the_run)
        )
        # torch's raises wherever the main thread stands when a worker dies; waiting for the next batch does so too.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        return batches

    def get(self, step: int) -> Batch:
        """The batch of a step; fast if it is the one after the last that was asked for.

        A worker that has died is replaced, and what it owed is made again.

        Raises:
            ChildProcessError: workers die again and again.
            ValueError: a stream is asked for another step than the next.
        """
        if step != self.next_step and self.streams:
            raise ValueError(f"step={step} of a stream cannot be read now; the next is {self.next_step}")
        if self._batches is None or step != self.next_step:
            self.next_step, self._batches = step, self._start()
        while True:
            try:
                batch = next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:
                # What the data raises names the worker that it was raised in; all else is how a dead one is noticed.
                if not self.workers or "in DataLoader worker process" in str(error):
                    raise
                self._deaths = [step for step in self._deaths if step > self.next_step - DEATH_WINDOW]
                self._deaths.append(self.next_step)
                if len(self._deaths) > MAX_DEATHS:
                    raise ChildProcessError(
                        f"{len(self._deaths)} data workers have died within {DEATH_WINDOW} steps; look for what ends "
                        "them (memory?), or use --workers 0"
                    ) from error
                warnings.warn(
                    f"a data worker has died ({error}); its work is done again from step {self.next_step} on",
                    stacklevel=2,
                )
                self._batches = self._start()
                continue
            self.next_step += 1
            if self.streams:
                batch, self.place = batch
            return batch


def _leave_signals_to_the_run(_: int) -> None:
    # Ctrl-C reaches every process of a terminal, and the run still needs its batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
