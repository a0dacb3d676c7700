"""A run's numbers to TensorBoard, Weights & Biases or Trackio: what metrics.jsonl gets, and the configuration once.

Trainer(cfg, "runs/first", trackers=make_trackers(["tensorboard"])).run()
"""

import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from open_mythos.checks import check_choice
from open_mythos.extras import load

PROJECT = "open-mythos"


@dataclass(frozen=True)
class Run:
    """What a tracker is told when a run starts or goes on."""

    config: dict[str, Any]
    folder: Path
    steps_done: int
    steps_logged: int
    """Last step that an earlier process of the run has logged; 0: there was none."""


class Tracker(Protocol):
    """Where the numbers of a run go besides metrics.jsonl."""

    @property
    def name(self) -> str: ...

    def start(self, run: Run) -> None: ...

    def log(self, steps_done: int, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in OUT/tensorboard. Of a run that goes on, what was logged behind its checkpoint is hidden."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._library = _library("torch.utils.tensorboard", self.name)

    def start(self, run: Run) -> None:
        self._writer = self._library.SummaryWriter(str(run.folder / self.name), purge_step=run.steps_done + 1)
        if not run.steps_logged:
            self._writer.add_text("config", "".join(f"    {line}\n" for line in _lines(run.config)))

    def log(self, steps_done: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, steps_done)
        # A run that is killed then misses nothing before its checkpoint.
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of the project open-mythos; WANDB_MODE, WANDB_PROJECT and the library's other variables hold."""

    name = "wandb"

    def __init__(self) -> None:
        self._library = _library("wandb", self.name)

    def start(self, run: Run) -> None:
        name, self._logged = _identity(run, self.name)
        settings = {"config": run.config, "id": name, "name": name, "resume": "allow" if self._logged else None}
        run.folder.mkdir(parents=True, exist_ok=True)
        project = self._library.setup().settings.project or PROJECT
        self._run = self._library.init(project=project, dir=str(run.folder), **settings)

    def log(self, steps_done: int, values: Mapping[str, float]) -> None:
        if steps_done > self._logged:
            self._run.log(dict(values), step=steps_done)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of the project open-mythos in Trackio's own folder, TRACKIO_DIR; `trackio show` draws it."""

    name = "trackio"

    def __init__(self) -> None:
        self._library = _library("trackio", self.name)

    def start(self, run: Run) -> None:
        name, self._logged = _identity(run, self.name)
        resume = "allow" if self._logged else "never"
        self._run = self._library.init(PROJECT, name=name, config=run.config, resume=resume, embed=False)

    def log(self, steps_done: int, values: Mapping[str, float]) -> None:
        if steps_done > self._logged:
            self._run.log(dict(values), step=steps_done)

    def close(self, failed: bool) -> None:
        self._run.finish()


TRACKERS = {tracker.name: tracker for tracker in (TensorBoard, Wandb, Trackio)}


def make_trackers(names: Iterable[str]) -> tuple[Tracker, ...]:
    """The trackers of these names.

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
                    f"tracker {tracker.name} cannot start ({error}); mend that, or train without it"
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


def _library(module: str, package: str) -> Any:
    return load(module, "track", f"tracker {package}", package)


def _identity(run: Run, tracker: str) -> tuple[str, int]:
    """The run's name at a tracker, kept in its folder, and the last step that is already there under that name.

    These libraries append: a step that is logged again would stand there twice.
    """
    path = run.folder / "trackers" / tracker
    if run.steps_logged and path.is_file():
        return path.read_text(encoding="utf-8"), run.steps_logged
    name = f"{run.folder.resolve().name}-{uuid.uuid4().hex[:8]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name, encoding="utf-8")
    return name, 0


def _lines(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each field, with the sections it is in."""
    lines: list[str] = []
    for name, value in config.items():
        nested = isinstance(value, Mapping)
        lines += _lines(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}: {value}"]
    return lines
