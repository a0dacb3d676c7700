"""Counts and times for Prometheus: few series, none with a label that a client can choose."""

import time
from collections import deque
from collections.abc import Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from open_mythos.engine.engine import TokenEvent
from open_mythos.engine.sequence import Sequence

LOOPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PAGE_STATES = ("used", "free", "reusable")
WINDOW_S = 5.0
"""Seconds that the rates of the live view cover."""


class Metrics:
    """Counts what has happened since the start."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, gauge, histogram = (
            partial(kind, namespace="mythos", registry=self.registry) for kind in (Counter, Gauge, Histogram)
        )
        self._refusals = counter("refusals", "Requests refused before work.", ["reason"])
        self._answers = counter("answers", "Answers that have ended.", ["finish_reason"])
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = counter("cached_tokens", "Tokens of prompts that were found computed.")
        self._tokens = counter("tokens", "New tokens.")
        self._loops = histogram("loops", "Loops that a new token took.", buckets=LOOPS)
        self._first = histogram("first_token_seconds", "From a request's arrival to its first token.", buckets=SECONDS)
        self._between = histogram("between_tokens_seconds", "Between two tokens of an answer.", buckets=SECONDS)
        self._waiting = gauge("waiting", "Answers that wait for a row.")
        self._rows = gauge("rows", "Answers that have a row.")
        self._tasks = gauge("tasks", "Tasks of the event loop.")
        self._pages = gauge("pages", "Pages of keys and values.", ["state"])
        self._last: dict[Sequence, float] = {}
        self._recent: deque[tuple[float, int]] = deque()  # (time, loops) of each new token

    def count_refusal(self, reason: str) -> None:
        """Count a refused request; `reason` is one of a few words."""
        self._refusals.labels(reason).inc()

    def count(self, event: TokenEvent) -> None:
        """Count a token, or the end of an answer."""
        now, request = time.monotonic(), event.request
        if event.token_id is not None:
            self._tokens.inc()
            self._loops.observe(event.loops)
            last = self._last.get(request)
            if last is None:
                self._first.observe(now - request.arrived_s)
                self._prompt_tokens.inc(len(request.prompt_ids))
                self._cached_tokens.inc(request.n_cached)
            else:
                self._between.observe(now - last)
            self._last[request] = now
            self._recent.append((now, event.loops))
        if event.finish_reason is not None:
            self._last.pop(request, None)
            self._answers.labels(event.finish_reason).inc()
        self._forget(now)

    def rates(self) -> tuple[float, float]:
        """Return the new tokens per second, and their mean loops, over the last few seconds."""
        self._forget(time.monotonic())
        n = len(self._recent)
        return n / WINDOW_S, sum(loops for _, loops in self._recent) / max(1, n)

    def text(self, n_tasks: int, counts: Mapping[str, int]) -> bytes:
        """Write all metrics in the form that Prometheus reads; `counts` are the scheduler's."""
        self._tasks.set(n_tasks)
        self._waiting.set(counts["waiting"])
        self._rows.set(counts["admitted"])
        for state in PAGE_STATES:
            self._pages.labels(state).set(counts[f"pages_{state}"])
        return generate_latest(self.registry)

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - WINDOW_S:
            self._recent.popleft()
