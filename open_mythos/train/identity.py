"""The identity of a run: configuration, data and tokenizer, compared before a run goes on."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from open_mythos.checks import shown
from open_mythos.files import sha256
from open_mythos.tasks import Task
from open_mythos.tokenization.tokenizer import Tokenizer, load_tokenizer
from open_mythos.train.checkpoint import read_state
from open_mythos.train.config import TrainConfig, flat_fields

CONFIG_FILE = "config.yaml"
DTYPES = ("dtype", "optim.muon_dtype")
MAX_NAMED = 5
"""Most differences that a message names."""


def verify_data(task: Task, report: Callable[[str], None]) -> None:
    """Read a task's files once and compare them with the digests that they were written with.

    The processes of one machine share the work; another machine may have a copy of its own.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    task.verify(int(os.environ.get("LOCAL_RANK", 0)) % size, size, report)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of the files that a tokenizer is saved as."""
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return sha256(*sorted(Path(folder).iterdir()))


def open_data(cfg: TrainConfig, checkpoint: Path | None) -> tuple[Tokenizer, dict[str, str]]:
    """Open the data of a run and return its tokenizer and the digests of its files.

    Args:
        checkpoint: the checkpoint that the run goes on from; the data has to be what it was trained on.

    Raises:
        ValueError, OSError: it is not, the model has no room for its tokens, or it cannot be read.
    """
    cfg.check_data()
    if checkpoint is None:
        digests = cfg.data.digests()
        return cfg.data.tokenizer(), digests
    recorded, saved = read_state(checkpoint).get("data"), load_tokenizer(checkpoint)
    cfg.data.resume(recorded or {}, saved)
    digests = cfg.data.digests()
    check_data(digests, recorded, checkpoint)
    tokenizer = cfg.data.tokenizer()
    # Both are saved by this version, so a library that writes its files in another way makes no difference.
    if tokenizer_digest(tokenizer) != tokenizer_digest(saved):
        raise ValueError(
            f"the data's tokenizer is not the one in {checkpoint}, whose ids mean other text; restore it, or begin "
            "another run in another folder"
        )
    return tokenizer, digests


def check_config(cfg: TrainConfig, path: Path) -> TrainConfig:
    """Return the configuration at `path`, which `cfg` continues: equal but for `parallel`, for more steps, or for
    dtypes that `cfg` leaves open.

    Raises:
        ValueError: they differ, and the message names each differing field with its two values; or it is damaged.
    """
    try:
        theirs = TrainConfig.load(path)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{error}. If {path} is damaged, put the {CONFIG_FILE} of a checkpoint in its place"
        ) from error
    before, now = flat_fields(theirs.to_dict()), flat_fields(cfg.to_dict())
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if "data.task" in names:  # the fields of another task say nothing
        names = ["data.task", *(name for name in names if not name.startswith("data."))]
    found = [
        f"{name}: {shown(before.get(name))} in the run, {shown(now.get(name))} now"
        for name in names
        if not name.startswith("parallel.")
        and not (name == "steps" and cfg.steps > theirs.steps)
        and not (cfg.dtype == "auto" and name in DTYPES and now[name] in ("auto", None))
    ]
    if found:
        more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        raise ValueError(
            f"{path} differs from this command in {'; '.join(found[:MAX_NAMED])}{more}. Go on with the configuration "
            f"that the run began with (--config {path}), or use another folder"
        )
    return theirs


def check_data(now: Mapping[str, str], run: Mapping[str, str] | None, folder: Path) -> None:
    """Check that the data is what the run began with.

    Args:
        run: the digests in the checkpoint `folder`; None in one that an earlier version wrote.

    Raises:
        ValueError: it is not; the message names each field whose files have changed.
    """
    if run is None:
        if now:
            warnings.warn(f"{folder} does not say which data it was trained on, so that is not compared", stacklevel=2)
        return
    found = [
        f"{name}: {run.get(name, 'none')[:12]} in the run, {now.get(name, 'none')[:12]} now"
        for name in sorted({*now, *run})
        if now.get(name) != run.get(name)
    ]
    if found:
        raise ValueError(
            f"the data is not what the run of {folder} was trained on (digest of {'; '.join(found[:MAX_NAMED])}); "
            "restore it, or begin another run in another folder"
        )
