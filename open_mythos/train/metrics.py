"""Where a run's numbers go: one JSON object per line, and one live line in the terminal."""

import contextlib
import json
import math
import os
import warnings
from pathlib import Path

from open_mythos.files import to_disk, write_text, writing
from open_mythos.train.trackers import Tracking

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to `metrics.jsonl`; every line is flushed, so a run can be watched and a crash loses nothing.

    On a full disk lines wait for room, with a warning.
    """

    def __init__(self, path: Path | None, steps_done: int = 0, tracking: Tracking | None = None) -> None:
        """Args:
        path: None: nothing is written, as in all processes of a run but the first.
        steps_done: lines of later steps, which a run that goes on is going to write again, are dropped.
        tracking: gets the same numbers, and is closed with the file.
        """
        self._tracking = tracking
        if path is None:
            self._file = None
            return
        if path.exists():
            # Bytes that a crash or a disk has damaged may be of use to someone; a log without them is needed to go on.
            if _parse(data := path.read_bytes())[1]:
                aside = path.with_name(path.name + ".damaged")
                with writing(aside):
                    aside.write_bytes(data)
            kept = [line for line in read_metrics(path) if line["step"] <= steps_done]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        # Unbuffered: a buffer that cannot be emptied would lose or repeat parts of lines.
        with writing(path):
            self._file = path.open("ab", buffering=0)
            to_disk(path.parent)
        self._waiting = b""

    def sync(self) -> None:
        """Put the lines on disk, so that a checkpoint that is saved now never knows more than they do."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def write(self, steps_done: int, values: dict[str, float]) -> None:
        if self._file is None:
            return
        # NaN is not JSON, and one such line would break whatever reads the file.
        for name, value in values.items():
            if not math.isfinite(value):
                warnings.warn(f"{name}={value} after step {steps_done} is left out of the log", stacklevel=2)
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        had_room = not self._waiting
        self._waiting += (json.dumps({"step": steps_done, **values}) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if had_room:
                warnings.warn(f"{self._file.name} cannot be written ({error}); its lines wait for room", stacklevel=2)
        if self._tracking is not None:
            self._tracking.log(steps_done, values)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._tracking is not None:
            self._tracking.close(failed=error is not None)


def last_step(path: Path) -> int:
    """Return the largest step in a metrics.jsonl; 0 where there is none yet."""
    return int(max((line["step"] for line in _parse(path.read_bytes())[0]), default=0)) if path.exists() else 0


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl, in order, without one that a crash has cut short at the end.

    Damaged lines, such as the NUL bytes that a power failure leaves, are left out with a warning.
    """
    lines, damaged = _parse(Path(path).read_bytes())
    if damaged:
        numbers = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        warnings.warn(f"{path} is damaged in {len(damaged)} lines, which are left out: {numbers}", stacklevel=2)
    return lines


def _parse(data: bytes) -> tuple[list[dict[str, float]], list[int]]:
    """Return the lines that can be read, and the numbers of those that cannot, counted from 1."""
    lines, damaged = [], []
    for number, text in enumerate(data.split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            if type(step := line["step"]) is not int and not (type(step) is float and math.isfinite(step)):
                raise ValueError("no step")
            lines.append(line)
        except (ValueError, TypeError, LookupError, RecursionError):
            damaged.append(number)
    return lines, damaged
