"""The engine in a thread of its own, and the event loop's side of it.

The engine belongs to its thread. The event loop sends it commands through a queue, which the thread reads between two
steps; events come back through `call_soon_threadsafe`. So no lock is needed, and a slow step never stops the event
loop.
"""

import asyncio
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, TypeVar

from open_mythos.engine.engine import Engine, TokenEvent
from open_mythos.engine.sequence import Sequence as Request
from open_mythos.generation.sampling_params import SamplingParams

T = TypeVar("T")
EncodedPrompt = tuple[list[int], SamplingParams]
"""A prompt's ids and the parameters of one answer to it."""

SNAPSHOT_S = 0.05
"""Seconds between two snapshots of the engine, at least."""
COUNTS = ("waiting", "admitted", "pages_used", "pages_free", "pages_reusable")
"""Counts of the scheduler that a snapshot holds."""


class Busy(RuntimeError):
    """The answers would be more than there are places for."""


class EngineDead(RuntimeError):
    """The engine's thread has ended or cannot go on."""


@dataclass(eq=False)
class Submission:
    """Answers that one caller waits for: (index of the answer, event) as they come, until all have ended.

    At the end of a `with` block, answers that have not ended are cancelled.

    Raises:
        EngineDead: the engine's thread has ended; raised by the iteration.
    """

    engine: "AsyncEngine"
    n: int
    """Number of answers; each takes a place until the last of them has ended."""
    accepted: asyncio.Future[None]
    """Done when the engine has checked and queued all answers."""
    prompts: Sequence[EncodedPrompt] = ()
    """One per answer, once the prompts are encoded."""
    requests: list[Request] = field(default_factory=list)
    """The engine's requests, one per answer."""
    inbox: asyncio.Queue[tuple[int, TokenEvent] | EngineDead] = field(default_factory=asyncio.Queue)
    n_open: int = 0
    """Number of answers whose end has not been delivered to the inbox."""

    async def __aiter__(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        n_open = self.n
        while n_open:
            item = await self.inbox.get()
            if isinstance(item, EngineDead):
                raise item
            n_open -= item[1].finish_reason is not None
            yield item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.cancel(self)


class AsyncEngine:
    """Runs an engine in a thread; all methods are for the event loop that called `start`.

    Args:
        make: builds the engine, in the thread.
        n_places: answers that may be submitted at once, waiting ones included.
        on_event: called with every event.
        on_fatal: called once if the thread ends without having been stopped.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        n_places: int,
        on_event: Callable[[TokenEvent], None],
        on_fatal: Callable[[], None],
    ) -> None:
        self._make, self.n_places, self._on_event, self._on_fatal = make, n_places, on_event, on_fatal
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._encoders = ThreadPoolExecutor(1, "encode")
        self._of: dict[Request, tuple[Submission, int]] = {}  # used by the thread only
        self._failed = False
        self._stepping_since: float | None = None
        self._encoding_since: float | None = None
        self._snapshot_s = 0.0  # time of the last snapshot
        self._loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.engine: Engine | None = None
        """The engine; None until it is built."""
        self.error: BaseException | None = None
        """The error that ended the thread."""
        self.submissions: set[Submission] = set()
        """All that have not ended."""
        self.counts = dict.fromkeys(COUNTS, 0)
        """The scheduler's counts at the last snapshot."""
        self.rows_by_loop: list[tuple[int, int]] = []
        """Pairs (loops done, rows) at the last snapshot, of the rows in the loop."""

    def start(self) -> None:
        """Begin to build the engine."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the current step; False if it, or the encoding of a text, has not ended in time."""
        self._commands.put(None)
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self.thread.join(timeout_s)
        return not self.thread.is_alive() and self._encoding_since is None

    @property
    def stuck_s(self) -> float:
        """Seconds since the current step, or the encoding of the current text, began."""
        since = [began for began in (self._stepping_since, self._encoding_since) if began is not None]
        return time.monotonic() - min(since) if since else 0.0

    @property
    def n_taken(self) -> int:
        """Places that are taken."""
        return sum(submission.n for submission in self.submissions)

    async def submit(self, n: int, prepare: Callable[[], Sequence[EncodedPrompt]]) -> Submission:
        """Queue `n` answers, and return once the engine has accepted all of them.

        Their places are taken at once, so of many requests that arrive together those without a place are refused
        before their text is encoded.

        Args:
            prepare: encodes the prompts, outside of the event loop.

        Raises:
            Busy: there are fewer than `n` places.
            TypeError, ValueError: the engine refuses one of the answers, and so all.
            EngineDead: the engine's thread has ended, or the server has drained.
        """
        if self.n_taken + n > self.n_places:
            raise Busy
        submission = Submission(self, n, asyncio.get_running_loop().create_future(), n_open=n)
        self.submissions.add(submission)
        try:
            submission.prompts = await self.encode(prepare)
            if self._failed or submission not in self.submissions:  # cancelled meanwhile, as a drain does at its end
                raise EngineDead
            self._commands.put(partial(self._add, submission))
            await submission.accepted
        except BaseException:
            self.cancel(submission)
            raise
        return submission

    async def encode(self, function: Callable[[], T]) -> T:
        """Run outside of the event loop what may take long for a long text."""

        def timed() -> T:
            self._encoding_since = time.monotonic()
            try:
                return function()
            finally:
                self._encoding_since = None

        assert self._loop is not None
        return await self._loop.run_in_executor(self._encoders, timed)

    def cancel(self, submission: Submission) -> None:
        """End the answers that have not ended; their rows and pages are free before the next step."""
        if not submission.prompts or self._failed:
            self.submissions.discard(submission)
        elif submission in self.submissions:
            self._commands.put(partial(self._cancel, submission))

    def fail(self) -> None:
        """Give the engine up: every caller gets EngineDead, and every later one."""
        self._failed = True
        for submission in list(self.submissions):
            self._end(submission, EngineDead())

    # On the event loop, called by the thread.

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the event loop has ended: the process is about to
            self._commands.put(None)

    def _deliver(self, events: list[tuple[Submission, int, TokenEvent]]) -> None:
        for submission, index, event in events:
            self._on_event(event)
            submission.inbox.put_nowait((index, event))
            if event.finish_reason is not None:
                submission.n_open -= 1
                if not submission.n_open:
                    self._end(submission)

    def _end(self, submission: Submission, error: Exception | None = None) -> None:
        self.submissions.discard(submission)
        if error is not None and not submission.accepted.done():
            submission.accepted.set_exception(error)
        elif isinstance(error, EngineDead):
            submission.inbox.put_nowait(error)

    @staticmethod
    def _accept(submission: Submission) -> None:
        if not submission.accepted.done():  # its caller may have gone
            submission.accepted.set_result(None)

    # In the thread.

    def _run(self) -> None:
        try:
            self.engine = self._make()
            while self._obey():
                if self.engine.busy:
                    self._step(self.engine)
        except BaseException as error:  # whatever it is, the callers have to hear of it
            self.error = error
            self._call(self._on_fatal)

    def _obey(self) -> bool:
        """Carry out the commands in the queue, and wait for one if the engine has nothing to do; False: stop."""
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
        if not engine.busy or began - self._snapshot_s > SNAPSHOT_S:
            self._take_snapshot(engine)
        if events:
            delivered = [(*self._of[event.request], event) for event in events if event.request in self._of]
            for event in events:
                if event.finish_reason is not None:
                    self._of.pop(event.request, None)
            self._call(self._deliver, delivered)

    def _take_snapshot(self, engine: Engine) -> None:
        self._snapshot_s = time.monotonic()
        self.rows_by_loop = sorted(Counter(sequence.loop for sequence in engine.scheduler.looping).items())
        self.counts = engine.scheduler.counts

    def _add(self, submission: Submission) -> None:
        assert self.engine is not None
        try:
            for prompt, params in submission.prompts:
                submission.requests.append(self.engine.add(prompt, params))
        except (TypeError, ValueError) as error:
            self._cancel(submission)
            self._call(self._end, submission, error)
            return
        self._of.update({request: (submission, i) for i, request in enumerate(submission.requests)})
        self._call(self._accept, submission)

    def _cancel(self, submission: Submission) -> None:
        assert self.engine is not None
        for request in submission.requests:
            self.engine.cancel(request)
