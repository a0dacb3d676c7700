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
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from open_mythos.engine.engine import Engine, TokenEvent
from open_mythos.engine.sequence import Sequence
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.server.protocol import BUSY, Refusal

T = TypeVar("T")
EncodedPrompt = tuple[list[int], SamplingParams]
"""A prompt's ids and the parameters of one answer to it."""
SNAPSHOT_S = 0.05
"""Seconds between two snapshots of the engine, at least."""
NAN = "the logits are NaN: the weights have diverged or overflow; serve earlier weights, or float32"


class EngineDead(Refusal):
    """The engine's thread has ended or cannot go on."""

    def __init__(self) -> None:
        super().__init__(503, "the engine has failed; the server ends")


@dataclass(eq=False)
class Submission:
    """Answers that one caller waits for: (index of the answer, event) as they come, until all have ended.

    Raises:
        Refusal: the engine's thread has ended, or the logits of an answer are NaN; raised by the iteration.
    """

    n: int
    """Number of answers; each takes a place until the last of them has ended."""
    n_open: int
    """Number of answers whose end has not been delivered to the inbox."""
    prompts: list[EncodedPrompt] = field(default_factory=list)
    """One per answer, once the prompts are encoded."""
    requests: list[Sequence] = field(default_factory=list)
    """The engine's requests, one per answer."""
    inbox: asyncio.Queue[tuple[int, TokenEvent] | Exception | None] = field(default_factory=asyncio.Queue)
    """None once the engine has accepted all answers, then the events, and None after the last; or else an error."""

    async def __aiter__(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        while (item := await self.inbox.get()) is not None:
            if isinstance(item, Exception):
                raise item
            if item[1].finish_reason == "error":
                raise Refusal(500, NAN)
            yield item


@dataclass(eq=False)
class AsyncEngine:
    """Runs an engine in a thread; all methods are for the event loop that called `start`."""

    make: Callable[[], Engine]
    """Builds the engine, in the thread."""
    n_places: int
    """Answers that may be submitted at once, waiting ones included."""
    on_event: Callable[[TokenEvent], None]
    """Called with every event."""
    on_fatal: Callable[[], None]
    """Called once if the thread ends without having been stopped."""

    def __post_init__(self) -> None:
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._encoders = ThreadPoolExecutor(1, "encode")
        self._of: dict[Sequence, tuple[Submission, int]] = {}  # used by the thread only
        self._failed = False
        self._stepping_since: float | None = None
        self._encoding_since: float | None = None
        self._snapshot_s = 0.0  # time of the last snapshot
        self._loop: asyncio.AbstractEventLoop
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.engine: Engine | None = None
        """The engine; None until it is built."""
        self.error: BaseException | None = None
        """The error that ended the thread."""
        self.submissions: set[Submission] = set()
        """All that have not ended."""
        self.counts: Mapping[str, int] = Counter()
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

    async def submit(self, n: int, prepare: Callable[[], list[EncodedPrompt]]) -> Submission:
        """Queue `n` answers, and return once the engine has accepted all of them.

        Their places are taken at once, so of many requests that arrive together those without a place are refused
        before their text is encoded.

        Args:
            prepare: encodes the prompts, outside of the event loop.

        Raises:
            Refusal: there are fewer than `n` places, the engine's thread has ended, or the server has drained.
            TypeError, ValueError: the engine refuses one of the answers, and so all.
        """
        if self.n_taken + n > self.n_places:
            raise Refusal(429, BUSY)
        submission = Submission(n, n)
        self.submissions.add(submission)
        try:
            submission.prompts = await self.encode(prepare)
            if self._failed or submission not in self.submissions:  # cancelled meanwhile, as a drain does at its end
                raise EngineDead
            self._commands.put(partial(self._add, submission))
            if isinstance(refusal := await submission.inbox.get(), Exception):
                raise refusal
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
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the event loop has ended: the process is about to
            self._commands.put(None)

    def _deliver(self, events: list[tuple[Submission, int, TokenEvent]]) -> None:
        for submission, index, event in events:
            self.on_event(event)
            submission.inbox.put_nowait((index, event))
            submission.n_open -= event.finish_reason is not None
            if not submission.n_open:
                self._end(submission)

    def _end(self, submission: Submission, error: Exception | None = None) -> None:
        self.submissions.discard(submission)
        submission.inbox.put_nowait(error)

    # In the thread.

    def _run(self) -> None:
        try:
            self.engine = engine = self.make()
            self.counts = engine.scheduler.counts
            while True:
                # Commands come before a step, and an engine with nothing to do waits for one.
                while not engine.busy or not self._commands.empty():
                    if (command := self._commands.get()) is None:
                        return
                    command(engine)
                self._step(engine)
        except BaseException as error:  # whatever it is, the callers have to hear of it
            self.error = error
            self._call(self.on_fatal)

    def _step(self, engine: Engine) -> None:
        self._stepping_since = began = time.monotonic()
        events = engine.step()
        self._stepping_since = None
        if not engine.busy or began - self._snapshot_s > SNAPSHOT_S:
            self._snapshot_s = began
            self.rows_by_loop = sorted(Counter(sequence.loop for sequence in engine.scheduler.looping).items())
            self.counts = engine.scheduler.counts
        delivered = [(*self._of[event.request], event) for event in events if event.request in self._of]
        for event in events:
            if event.finish_reason is not None:
                self._of.pop(event.request, None)
        if events:
            self._call(self._deliver, delivered)

    def _add(self, submission: Submission, engine: Engine) -> None:
        try:
            for prompt, params in submission.prompts:
                submission.requests.append(engine.add(prompt, params))
        except (TypeError, ValueError) as error:
            self._cancel(submission, engine)
            self._call(self._end, submission, error)
            return
        self._of.update({request: (submission, i) for i, request in enumerate(submission.requests)})
        self._call(submission.inbox.put_nowait, None)

    def _cancel(self, submission: Submission, engine: Engine) -> None:
        for request in submission.requests:
            engine.cancel(request)
