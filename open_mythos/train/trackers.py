"""A run's numbers in TensorBoard, Weights & Biases or Trackio: what metrics.jsonl gets, and the configuration once.

    Trainer(cfg, "runs/first", trackers=make_trackers(["tensorboard"])).run()

A tracker of your own is a class with the methods of `Tracker`; `TRACKERS["mine"] = Mine` gives it to `--track mine`.
"""

import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from open_mythos.checks import check_choice
from open_mythos.extras import load
from open_mythos.train.config import flat_fields

PROJECT = "open-mythos"


@dataclass(frozen=True)
class Run:
    """A run that starts or goes on."""

    config: dict[str, Any]
    folder: Path
    steps_done: int
    steps_logged: int
    """Last step that an earlier process of the run has logged; 0: there was none."""


class Tracker(Protocol):
    """A destination of a run's numbers besides metrics.jsonl."""

    name: str

    def start(self, run: Run) -> None: ...
    def log(self, steps_done: int, values: Mapping[str, float]) -> None: ...
    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in OUT/tensorboard. A run that goes on hides what was logged behind its checkpoint."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._library = load("torch.utils.tensorboard", "track", f"tracker {self.name}", self.name)

    def start(self, run: Run) -> None:
        self._writer = self._library.SummaryWriter(str(run.folder / self.name), purge_step=run.steps_done + 1)
        if not run.steps_logged:
            fields = flat_fields(run.config).items()
            self._writer.add_text("config", "".join(f"    {name}: {value}\n" for name, value in fields))

    def log(self, steps_done: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, steps_done)
        # A run that is killed then misses nothing before its checkpoint.
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Online:
    """A run of a library that appends. Its name is stored in the run's folder, and no step is logged twice."""

    name: str

    def __init__(self) -> None:
        self._library = load(self.name, "track", f"tracker {self.name}", self.name)

    def start(self, run: Run) -> None:
        path = run.folder / "trackers" / self.name
        self._logged = run.steps_logged if path.is_file() else 0
        if not self._logged:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{run.folder.resolve().name}-{uuid.uuid4().hex[:8]}", encoding="utf-8")
        self._run = self._init(run, path.read_text(encoding="utf-8"))

    def _init(self, run: Run, name: str) -> Any:
        raise NotImplementedError

    def log(self, steps_done: int, values: Mapping[str, float]) -> None:
        if steps_done > self._logged:
            self._run.log(dict(values), step=steps_done)

    def close(self, failed: bool) -> None:
        self._run.finish()


class Wandb(_Online):
    """A run of the project open-mythos; WANDB_MODE, WANDB_PROJECT and the library's other variables hold."""

    name = "wandb"

    def _init(self, run: Run, name: str) -> Any:
        project, resume = self._library.setup().settings.project or PROJECT, "allow" if self._logged else None
        return self._library.init(
            project=project, dir=str(run.folder), config=run.config, id=name, name=name, resume=resume
        )

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio(_Online):
    """A run of the project open-mythos in Trackio's own folder, TRACKIO_DIR; `trackio show` draws it."""

    name = "trackio"

    def _init(self, run: Run, name: str) -> Any:
        resume = "allow" if self._logged else "never"
        return self._library.init(PROJECT, name=name, config=run.config, resume=resume, embed=False)


TRACKERS: dict[str, Callable[[], Tracker]] = {tracker.name: tracker for tracker in (TensorBoard, Wandb, Trackio)}


def make_trackers(names: Iterable[str]) -> tuple[Tracker, ...]:
    """Make the trackers of these names.

    Raises:
        ValueError: there is no such tracker.
        ImportError: its package is missing; the message says how to install it.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        check_choice("track", name, tuple(TRACKERS))
    return tuple(TRACKERS[name]() for name in names)


class Tracking:
    """The trackers of one run. One that fails on the way is dropped with a warning, and training goes on.

    Raises:
        ValueError: one cannot start.
    """

    def __init__(self, trackers: Sequence[Tracker], run: Run) -> None:
        self._trackers: list[Tracker] = []
        for tracker in trackers:
            try:
                tracker.start(run)
            except Exception as error:  # whatever the library raises
                self.close(failed=True)
                raise ValueError(
                    f"tracker {tracker.name} cannot start ({error}); correct that, or train without it"
                ) from error
            self._trackers.append(tracker)

    def log(self, steps_done: int, values: Mapping[str, float]) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(steps_done, values)
            except Exception as error:  # whatever the library raises
                self._trackers.remove(tracker)
                warnings.warn(f"tracker {tracker.name} failed and is dropped ({error})", stacklevel=2)

    def close(self, failed: bool) -> None:
        for tracker in self._trackers:
            try:
                tracker.close(failed)
            except Exception as error:  # whatever the library raises
                warnings.warn(f"tracker {tracker.name} could not be closed ({error})", stacklevel=2)
