"""The batches of a run, step by step, made ahead of time by worker processes if there are any.

The data of a step depends on the run's configuration and the step alone: not on the number of processes that train, nor
on the workers that load and what became of them.
"""

import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from open_mythos.tasks import Stream
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import Batch
from open_mythos.train.config import TrainConfig

MAX_DEATHS, DEATH_WINDOW = 3, 100
"""Workers that may die within so many steps before the run gives up."""


@dataclass(frozen=True)
class StepData:
    """The data of one process in one step."""

    batch: Batch
    """The process's rows of the global batch."""
    depths: np.ndarray
    """Loops of every row of the global batch."""
    place: Tensor | None = None
    """(len(rows), k) int64, the place behind the batch in a stream."""


@dataclass(frozen=True)
class Steps(IterableDataset[StepData]):
    """The data of all steps from `first_step` on. Several workers take turns."""

    cfg: TrainConfig
    rows: range
    first_step: int
    place: Tensor | None

    def __iter__(self) -> Iterator[StepData]:
        worker = torch.utils.data.get_worker_info()
        turn, n_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if isinstance(self.cfg.data, Stream):
            # Rows of a stream go on where they stood, so one worker has to read all steps.
            place = None if self.place is None else self.place.numpy()
            lanes = self.cfg.data.lanes(self.rows, self.cfg.batch_size, place)
            for step in range(self.first_step, self.cfg.steps):
                yield StepData(lanes.next(), self._depths(step), torch.from_numpy(lanes.state.copy()))
        else:
            for step in range(self.first_step + turn, self.cfg.steps, n_workers):
                yield self._read(step)

    def _depths(self, step: int) -> np.ndarray:
        return self.cfg.loops.depths(self.cfg.seed, step, self.cfg.batch_size)

    def _read(self, step: int) -> StepData:
        cfg, rows, depths = self.cfg, slice(self.rows.start, self.rows.stop), self._depths(step)
        rng, first = stream(cfg.seed, step, Purpose.DATA), step * cfg.batch_size
        if cfg.data.on_disk:
            # Each row depends on its own number only, so the others need not be read.
            return StepData(cfg.data.batch(rng, len(self.rows), depths[rows], first + rows.start), depths)
        return StepData(cfg.data.batch(rng, cfg.batch_size, depths, first).take(rows), depths)


class Loader:
    """Data from `first_step` on, in order."""

    def __init__(
        self, cfg: TrainConfig, rows: range, first_step: int, workers: int = 0, place: Tensor | None = None
    ) -> None:
        """Args:
        workers: processes that make batches; 0: this process does, when a batch is asked for. A stream takes one.
        place: (len(rows), k) int64, where the rows of a stream go on; None: at its beginning.
        """
        self.cfg, self.rows, self.next_step, self.place = cfg, rows, first_step, place
        self.is_stream = isinstance(cfg.data, Stream)
        self.workers = min(workers, 1) if self.is_stream else workers
        self._deaths: list[int] = []
        self._steps: Iterator[StepData] | None = None

    def _start(self) -> Iterator[StepData]:
        dataset = Steps(self.cfg, self.rows, self.next_step, self.place)
        if not self.workers:
            return iter(dataset)
        handler = signal.getsignal(signal.SIGCHLD)
        steps = iter(
            DataLoader(dataset, batch_size=None, num_workers=self.workers, worker_init_fn=_leave_signals_to_the_run)
        )
        # torch's handler raises wherever the main thread stands when a worker dies; waiting for a batch does so too.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        return steps

    def get(self, step: int) -> StepData:
        """Return the data of a step; fast if it is the one after the last that was asked for.

        A worker that has died is replaced, and its work is done again.

        Raises:
            ChildProcessError: workers die again and again.
            ValueError: a stream is asked for another step than the next.
        """
        if step != self.next_step and self.is_stream:
            raise ValueError(f"step={step} of a stream cannot be read now; the next is {self.next_step}")
        if self._steps is None or step != self.next_step:
            self.next_step, self._steps = step, self._start()
        while True:
            try:
                data = next(self._steps)
            except (RuntimeError, OSError, EOFError) as error:
                # Errors of the data name the worker that they were raised in; all others are how a dead one is noticed.
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
                self._steps = self._start()
                continue
            self.next_step, self.place = self.next_step + 1, data.place
            return data


def _leave_signals_to_the_run(_: int) -> None:
    # Ctrl-C reaches every process of a terminal, and the run still needs its batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
