"""What makes two runs the same run: configuration, data and tokenizer, compared before a run goes on."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

from open_mythos.files import sha256
from open_mythos.tasks import Stream, Text
from open_mythos.tokenization.tokenizer import Tokenizer, load_tokenizer
from open_mythos.train.checkpoint import read_state
from open_mythos.train.config import TrainConfig

CONFIG_FILE = "config.yaml"
MAX_NAMED = 5
"""Differences that a message names."""


@runtime_checkable
class FileTask(Protocol):
    """A task whose batches come from files."""

    def digests(self) -> dict[str, str]:
        """Return a digest of the contents behind each field that names files."""
        ...


@runtime_checkable
class VerifiedTask(Protocol):
    """A task whose files carry digests of their own."""

    def verify(self, rank: int, size: int, tell: Callable[[str], None]) -> None:
        """Compare the files with their digests: of `size` processes, each its share."""
        ...


def verify_data(task: object, tell: Callable[[str], None]) -> None:
    """Read a task's files once and compare them with the digests that they were written with.

    The processes of one machine share the work, for another machine may have a copy of its own.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    if isinstance(task, VerifiedTask):
        size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        task.verify(int(os.environ.get("LOCAL_RANK", 0)) % size, size, tell)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of the files that a tokenizer is saved as."""
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return sha256(*sorted(Path(folder).iterdir()))


def open_data(cfg: TrainConfig, checkpoint: Path | None) -> tuple[Tokenizer, dict[str, str]]:
    """Open the data of a run and return its tokenizer and the digests of its files.

    Args:
        checkpoint: what the run goes on from; the data has to be what it was trained on.

    Raises:
        ValueError, OSError: it is not, the model has no room for its tokens, or it cannot be read.
    """
    cfg.check_data()
    task, recorded = cfg.data, None if checkpoint is None else read_state(checkpoint).get("data")
    if isinstance(task, Stream) and recorded is not None:
        task.stay_at(recorded["data.dataset"])
    digests = task.digests() if isinstance(task, FileTask) else {}
    if checkpoint is None:
        return task.tokenizer(), digests
    check_data(digests, recorded, checkpoint)
    if isinstance(task, Text):
        task.use_tokenizer(load_tokenizer(checkpoint))
    check_tokenizer(task.tokenizer(), checkpoint)
    return task.tokenizer(), digests


def check_config(cfg: TrainConfig, path: Path) -> TrainConfig:
    """Return the configuration at `path`, which `cfg` continues: equal but for `parallel`, or for more steps.

    Raises:
        ValueError: they differ, and the message names each field that does with its two values; or it is damaged.
    """
    try:
        theirs = TrainConfig.load(path)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{error}. If {path} is damaged, put the {CONFIG_FILE} of a checkpoint in its place"
        ) from error
    found = _differences(theirs.to_dict(), cfg.to_dict())
    found = {
        name: values
        for name, values in found.items()
        if not name.startswith("parallel.") and not (name == "steps" and cfg.steps > theirs.steps)
    }
    if found:
        told = [f"{name}: {_short(run)} in the run, {_short(now)} now" for name, (run, now) in found.items()]
        more = f" and {len(told) - MAX_NAMED} more" if len(told) > MAX_NAMED else ""
        raise ValueError(
            f"{path} differs from this command in {'; '.join(told[:MAX_NAMED])}{more}. Go on with the configuration "
            f"that the run began with (--config {path}), or use another folder"
        )
    return theirs


def check_data(now: Mapping[str, str], run: Mapping[str, str] | None, folder: Path) -> None:
    """Make sure that the data is what the run began with.

    Args:
        run: the digests in the checkpoint `folder`; None in one that an earlier version wrote.

    Raises:
        ValueError: it is not; the message names each field whose files have changed.
    """
    if run is None:
        if now:
            warnings.warn(f"{folder} does not say which data it was trained on, so that is not compared", stacklevel=2)
        return
    if changed := [name for name in sorted({*now, *run}) if now.get(name) != run.get(name)]:
        told = [
            f"{name}: {run.get(name, 'none')[:12]} in the run, {now.get(name, 'none')[:12]} now" for name in changed
        ]
        raise ValueError(
            f"the data is not what the run of {folder} was trained on (digest of {'; '.join(told[:MAX_NAMED])}); "
            "restore it, or begin another run in another folder"
        )


def check_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Make sure that a tokenizer is the one of a checkpoint.

    Raises:
        ValueError: it is not.
    """
    # Both are saved by this version, so a library that writes its files in another way makes no difference.
    if tokenizer_digest(tokenizer) != tokenizer_digest(load_tokenizer(folder)):
        raise ValueError(
            f"the data's tokenizer is not the one in {folder}, whose ids mean other text; restore it, or begin another "
            "run in another folder"
        )


def _differences(run: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, by their full names, with both values."""
    if prefix == "data." and run.get("task") != now.get("task"):
        return {"data.task": (run.get("task"), now.get("task"))}
    found: dict[str, tuple[Any, Any]] = {}
    for name in {**run, **now}:
        a, b = run.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found[f"{prefix}{name}"] = (a, b)
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
