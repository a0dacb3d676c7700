"""Signals that ask a run to end."""

import contextlib
import signal
import threading
from collections.abc import Generator


class Interrupted(Exception):
    """A signal has ended a run."""

    def __init__(self, steps_done: int, saved: bool) -> None:
        what = "saved" if saved else "which could not be saved"
        super().__init__(f"stopped after step {steps_done}, {what}; go on with the same command and --resume")


@contextlib.contextmanager
def signals_into(seen: list[int]) -> Generator[None]:
    """Put SIGTERM and SIGINT into `seen` instead of letting them end the process; in the main thread only."""
    caught = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if caught else ()
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
