"""The batches of a run, step by step, made ahead of time by worker processes if there are any.

What a step gets depends on the run's configuration and the step alone: not on the number of processes that train or of
workers that load, nor on what became of them.
"""

import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset

from open_mythos.train.config import TrainConfig
from open_mythos.train.data import Batch
from open_mythos.train.rng import Purpose, stream

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


class Loader:
    """Batches from `first_step` on, in order."""

    def __init__(self, cfg: TrainConfig, rows: range, first_step: int, workers: int = 0) -> None:
        """Args: workers: processes that make batches; 0: this process does, when a batch is asked for."""
        self.steps, self.next_step, self.workers = Steps(cfg, rows), first_step, workers
        self.n_steps = cfg.steps
        self._deaths: list[int] = []
        self._batches: Iterator[Batch] | None = None

    def _start(self) -> Iterator[Batch]:
        handler = signal.getsignal(signal.SIGCHLD)
        batches = iter(
            DataLoader(
                self.steps,
                batch_size=None,
                sampler=range(self.next_step, self.n_steps),
                num_workers=self.workers,
                worker_init_fn=_leave_signals_to_the_run,
            )
        )
        # torch's raises wherever the main thread stands when a worker dies; waiting for the next batch does so too.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        return batches

    def get(self, step: int) -> Batch:
        """The batch of a step; fast if it is the one after the last that was asked for.

        A worker that has died is replaced, and what it owed is made again.

        Raises:
            RuntimeError: workers die again and again.
        """
        if not self.workers:
            return self.steps[step]
        if self._batches is None or step != self.next_step:
            self.next_step, self._batches = step, self._start()
        while True:
            try:
                batch = next(self._batches)
            except RuntimeError as error:
                if "exited unexpectedly" not in str(error):
                    raise
                self._deaths = [step for step in self._deaths if step > self.next_step - DEATH_WINDOW]
                self._deaths.append(self.next_step)
                if len(self._deaths) > MAX_DEATHS:
                    raise RuntimeError(
                        f"{len(self._deaths)} data workers have died within {DEATH_WINDOW} steps; look for what ends "
                        "them (memory?), or use --workers 0"
                    ) from error
                warnings.warn(f"{error}; its work is done again from step {self.next_step} on", stacklevel=2)
                self._batches = self._start()
                continue
            self.next_step += 1
            return batch


def _leave_signals_to_the_run(_: int) -> None:
    # Ctrl-C reaches every process of a terminal, and the run still needs its batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
