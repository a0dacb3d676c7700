"""The engine in a thread of its own, and the event loop's side of it.

The engine belongs to the thread. The event loop sends it commands through a queue, which it reads between two steps;
what happened comes back through `call_soon_threadsafe`. So no lock is needed, and a slow step never stops the event
loop.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from open_mythos.engine.engine import Engine, Request, TokenEvent
from open_mythos.generation.sampling_params import SamplingParams

T = TypeVar("T")
Wanted = tuple[list[int], SamplingParams]
"""A prompt's ids and what is asked for."""

SNAPSHOT_S = 0.05
"""How often the live view is taken at most."""


class Busy(RuntimeError):
    """As many answers are asked for as may be."""


class EngineDead(RuntimeError):
    """The engine's thread has ended or cannot go on."""


@dataclass(eq=False)
class Job:
    """Answers that one caller waits for."""

    wanted: Sequence[Wanted]
    accepted: asyncio.Future[None]
    """Done when the engine has checked and queued all of them."""
    n_open: int
    """Answers that have not ended."""
    inbox: asyncio.Queue[tuple[int, TokenEvent] | EngineDead] = field(default_factory=asyncio.Queue)
    requests: list[Request] = field(default_factory=list)
    """The engine's, in the order of `wanted`."""


@dataclass(frozen=True)
class Snapshot:
    """What the engine is doing."""

    rows_by_loop: list[tuple[int, int]] = field(default_factory=list)
    """(loops done, rows), of the rows in the loop."""
    waiting: int = 0
    admitted: int = 0
    pages_used: int = 0
    pages_free: int = 0
    pages_reusable: int = 0


class Worker:
    """Runs an engine; all methods are for the event loop that called `start`.

    Args:
        make: makes the engine, in the thread.
        most: answers that may be asked for at once, waiting ones included.
        on_event: told every event.
        on_fatal: called once if the thread ends without having been stopped.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        most: int,
        on_event: Callable[[TokenEvent], None],
        on_fatal: Callable[[], None],
    ) -> None:
        self._make, self.most, self._on_event, self._on_fatal = make, most, on_event, on_fatal
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._encoders = ThreadPoolExecutor(1, "encode")
        self._of: dict[Request, tuple[Job, int]] = {}  # the thread's
        self._failed = False
        self._stepping_since: float | None = None
        self._encoding_since: float | None = None
        self._taken_s = 0.0  # when the snapshot was
        self._loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.engine: Engine | None = None
        """None until it is made."""
        self.error: BaseException | None = None
        """Why the thread ended."""
        self.jobs: set[Job] = set()
        """Those that have not ended."""
        self.n_reserved = 0
        """Answers that have been asked for and have not ended."""
        self.snapshot = Snapshot()

    def start(self) -> None:
        """Begin to make the engine."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the step in work; whether it has ended in time, and no text is being encoded."""
        self._commands.put(None)
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self.thread.join(timeout_s)
        return not self.thread.is_alive() and self._encoding_since is None

    @property
    def stuck_s(self) -> float:
        """Seconds that the step in work has taken, or the text that is being encoded."""
        since = [began for began in (self._stepping_since, self._encoding_since) if began is not None]
        return time.monotonic() - min(since) if since else 0.0

    def reserve(self, n: int) -> None:
        """Take places for n answers.

        Raises:
            Busy: there are fewer.
        """
        if self.n_reserved + n > self.most:
            raise Busy
        self.n_reserved += n

    def give_back(self, n: int) -> None:
        """Free places that were reserved and not used."""
        self.n_reserved -= n

    async def encode(self, function: Callable[[], T]) -> T:
        """Run what may take long for a long text, outside of the event loop."""

        def timed() -> T:
            self._encoding_since = time.monotonic()
            try:
                return function()
            finally:
                self._encoding_since = None

        assert self._loop is not None
        return await self._loop.run_in_executor(self._encoders, timed)

    def submit(self, wanted: Sequence[Wanted]) -> Job:
        """Ask for answers, for which places have been reserved; they are given back when the answers have ended.

        `accepted` of the job raises what the engine says if it refuses one of them, and so all: TypeError or
        ValueError, or EngineDead.
        """
        job = Job(wanted, asyncio.get_running_loop().create_future(), len(wanted))
        self.jobs.add(job)
        if self._failed:
            self._end(job, EngineDead())
        else:
            self._commands.put(partial(self._add, job))
        return job

    async def events(self, job: Job) -> AsyncIterator[tuple[int, TokenEvent]]:
        """(which answer, event), until all have ended.

        Raises:
            EngineDead: the engine's thread has ended.
        """
        n_open = len(job.wanted)
        while n_open:
            item = await job.inbox.get()
            if isinstance(item, EngineDead):
                raise item
            n_open -= item[1].finish_reason is not None
            yield item

    def cancel(self, job: Job) -> None:
        """End the job's answers; their rows and pages are free before the next step. Nothing if they have ended."""
        if job in self.jobs:
            self._commands.put(partial(self._cancel, job))

    def fail(self) -> None:
        """Give the engine up: every caller is told, and every later one."""
        self._failed = True
        for job in list(self.jobs):
            self._end(job, EngineDead())

    # On the event loop, called by the thread.

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the event loop has ended: the process is about to
            self._commands.put(None)

    def _deliver(self, events: list[tuple[Job, int, TokenEvent]]) -> None:
        for job, place, event in events:
            self._on_event(event)
            job.inbox.put_nowait((place, event))
            if event.finish_reason is not None:
                job.n_open -= 1
                if not job.n_open:
                    self._end(job)

    def _accept(self, job: Job) -> None:
        if not job.accepted.done():  # its caller may have gone
            job.accepted.set_result(None)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        if job not in self.jobs:
            return
        self.jobs.discard(job)
        self.n_reserved -= len(job.wanted)
        if error is not None and not job.accepted.done():
            job.accepted.set_exception(error)
        elif isinstance(error, EngineDead):
            job.inbox.put_nowait(error)

    # In the thread.

    def _run(self) -> None:
        try:
            self.engine = self._make()
            while self._obey():
                if self.engine.busy:
                    self._step(self.engine)
        except BaseException as error:  # whatever it is, those who wait have to be told
            self.error = error
            self._tell(self._on_fatal)

    def _obey(self) -> bool:
        """Carry out what was asked for; with nothing else to do, wait for it. False: stop."""
        wait = not (self.engine and self.engine.busy)
        while wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            wait = False
        return True

    def _step(self, engine: Engine) -> None:
        self._stepping_since = began = time.monotonic()
        events = engine.step()
        self._stepping_since = None
        if not engine.busy or began - self._taken_s > SNAPSHOT_S:
            self._take_snapshot(engine)
        if events:
            told = []
            for event in events:
                ended = event.finish_reason is not None
                of = self._of.pop(event.request, None) if ended else self._of.get(event.request)
                if of is not None:
                    told.append((*of, event))
            self._tell(self._deliver, told)

    def _take_snapshot(self, engine: Engine) -> None:
        scheduler = engine.scheduler
        counts: dict[int, int] = {}
        for sequence in scheduler.looping:
            counts[sequence.loop] = counts.get(sequence.loop, 0) + 1
        self._taken_s = time.monotonic()
        self.snapshot = Snapshot(
            rows_by_loop=sorted(counts.items()),
            waiting=scheduler.n_waiting,
            admitted=scheduler.n_admitted,
            pages_used=scheduler.n_pages_used,
            pages_free=scheduler.n_pages_free,
            pages_reusable=scheduler.n_pages_reusable,
        )

    def _add(self, job: Job) -> None:
        assert self.engine is not None
        try:
            for prompt, params in job.wanted:
                job.requests.append(self.engine.add(prompt, params))
        except (TypeError, ValueError) as error:
            for request in job.requests:
                self.engine.cancel(request)
            self._tell(self._end, job, error)
            return
        self._of.update({request: (job, i) for i, request in enumerate(job.requests)})
        self._tell(self._accept, job)

    def _cancel(self, job: Job) -> None:
        assert self.engine is not None
        for request in job.requests:
            self.engine.cancel(request)
