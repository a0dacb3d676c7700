"""Checkpoints, from which a run goes on.

    checkpoints/step-00000200/
      model-00000.safetensors, optimizer0-00000.safetensors, ...   a file per group and process
      state.json, config.yaml, tokenizer files
      manifest.json            every file's size and SHA-256; written last

A folder appears under its name when all of it is on disk, so a crash at any instant leaves the older ones as they were.
"""

import json
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from open_mythos.checks import check_int, check_number
from open_mythos.files import inside, make_folder, read_json, sha256, to_disk, writing
from open_mythos.train.distributed import World
from open_mythos.train.tensor_shards import ShardGroups, ShardReader, TensorShard, write_shards

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class CheckpointConfig:
    """Times at which a run is saved, and checkpoints that stay. None of it changes a run's result."""

    every: int = 0
    """Steps between checkpoints; 0: only `minutes` decides."""
    last: int = 2
    """Newest checkpoints that stay."""
    milestones: int = 0
    """Checkpoints at multiples of so many steps stay too; 0: none."""
    minutes: float = 5.0
    """Minutes after which a checkpoint is saved in any case; 0: never."""

    def __post_init__(self) -> None:
        check_int("checkpoint_every", self.every, 0)
        check_int("keep_last", self.last, 1)
        check_int("keep_every", self.milestones, 0)
        check_number("checkpoint_minutes", self.minutes, 0)


class Checkpoints:
    """The checkpoints of one run. Files are written in a thread, from copies, while training goes on."""

    def __init__(self, folder: Path, cfg: CheckpointConfig, world: World, describe: Callable[[Path], None]) -> None:
        """Args: describe: writes the files that do not change during the run into a checkpoint's folder."""
        self.folder, self.cfg, self.world, self.describe = folder, cfg, world, describe
        self._thread: threading.Thread | None = None
        self._step = 0
        self._problem: Exception | None = None
        self._written_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return whether the number of steps asks for a checkpoint after `step`."""
        return bool(self.cfg.every) and step % self.cfg.every == 0

    def is_late(self) -> bool:
        """Return whether the clock asks for a checkpoint: `cfg.minutes` have passed since the last was complete."""
        writing = self._thread is not None and self._thread.is_alive()
        return 0 < self.cfg.minutes * 60 <= time.monotonic() - self._written_at and not writing

    def save(self, step: int, groups: ShardGroups, state: dict[str, Any]) -> None:
        """Copy and start to write; `state` is JSON. One save at a time: a second waits for the first.

        A save that fails, as on a full disk, is a warning: the older checkpoints are there, and training goes on.
        """
        self.wait()
        self._step = step
        copies = {
            file: {
                name: replace(shard, local=shard.local.detach().to("cpu", copy=True).contiguous())
                for name, shard in shards.items()
                if self.world.rank < self.world.size // shard.n_copies
            }
            for file, shards in groups.items()
        }
        self._thread = threading.Thread(target=self._write, args=(step, copies, {"step": step, **state}))
        self._thread.start()

    def join(self) -> None:
        """Wait until nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> bool:
        """Wait for the save in progress, and return whether the last one succeeded.

        Raises:
            RuntimeError: another process has died, or was not done with its part within `parallel.timeout_s`.
        """
        self.join()
        if self._thread is not None:
            self._thread = None
            if isinstance(self._problem, RuntimeError):
                raise self._problem
            if self._problem is not None and self.world.is_first:
                warnings.warn(
                    f"the checkpoint of step {self._step} could not be saved in {self.folder} ({self._problem}); older "
                    "ones stand, and training goes on",
                    stacklevel=2,
                )
        return self._problem is None

    def newest(self) -> Path | None:
        """Return the newest checkpoint that is whole, if there is any; newer ones that are damaged give a warning.

        Raises:
            ValueError: all are damaged, or of another version.
        """
        paths = self._paths()
        self.world.agree({"number of checkpoints": len(paths)})
        for path in reversed(paths):
            problem = find_problem(path, self.world.rank, self.world.size)
            if problem is not None:
                warnings.warn(f"{problem}; going back to the checkpoint before", stacklevel=2)
            if not self.world.agree({"checkpoint": _step(path)}, int(problem is not None)):
                return path
        if paths:
            # Beginning anew would drop the log of all that was done.
            raise ValueError(
                f"no checkpoint in {self.folder} can be used; restore one, or remove the folder to begin anew"
            )
        return None

    def _paths(self) -> list[Path]:
        """Return the checkpoints, the oldest first."""
        found = [path for path in self.folder.glob("step-*") if re.fullmatch("step-[0-9]{8,}", path.name)]
        return sorted((path for path in found if path.is_dir()), key=_step)

    def _write(self, step: int, groups: ShardGroups, state: dict[str, Any]) -> None:
        """Write a checkpoint: all processes their tensors, the first one the rest and the folder's name."""
        self._problem = None
        partial = self.folder / f"step-{step:08d}.partial"
        try:
            self._together(lambda: self._begin(partial), self.world.is_first)
            files = self._together(lambda: self._write_own(partial, groups))
            self._together(lambda: self._complete(partial, state, files), self.world.is_first)
        except Exception as error:
            # An exception of any kind ends this thread alone, so it has to be passed on to whoever waits.
            self._problem = error
            if self.world.is_first:
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            self._written_at = time.monotonic()

    def _together(self, work: Callable[[], dict[str, Any] | None], takes_part: bool = True) -> dict[str, Any]:
        """Do a part of a save, and return what all processes returned from it, once all have.

        Raises:
            OSError: one of them has failed.
            RuntimeError: one of them has died, or did not answer within `parallel.timeout_s`.
        """
        answer: dict[str, Any] = {"error": None}
        try:
            answer["files"] = (work() if takes_part else None) or {}
        except Exception as error:  # for all processes, which decide the same about the whole
            answer["error"] = f"{type(error).__name__}: {error}"
        answers = [json.loads(text) for text in self.world.exchange(json.dumps(answer))]
        for rank, answer in enumerate(answers):
            if answer["error"]:
                raise OSError(answer["error"] if self.world.size == 1 else f"rank {rank}: {answer['error']}")
        return {name: seal for answer in answers for name, seal in answer["files"].items()}

    def _begin(self, partial: Path) -> None:
        """Remove what broken saves have left, and make the folder to write to."""
        for left_over in self.folder.glob("step-*.*"):
            if re.fullmatch(r"step-[0-9]{8,}\.(partial|old)", left_over.name):
                shutil.rmtree(left_over, ignore_errors=True)
        make_folder(partial)

    def _write_own(self, partial: Path, groups: ShardGroups) -> dict[str, Any]:
        """Write this process's files, and return their sizes and hashes."""
        shards_of = {f"{name}-{self.world.rank:05d}.safetensors": shards for name, shards in groups.items() if shards}
        for file, shards in shards_of.items():
            write_shards(partial / file, shards)
        return {file: _seal(partial / file) for file in shards_of}

    def _complete(self, partial: Path, state: dict[str, Any], files: dict[str, Any]) -> None:
        """Complete the folder once all processes have written, and give it its name."""
        target, old = partial.with_suffix(""), partial.with_suffix(".old")
        with writing(partial):
            (partial / STATE).write_text(json.dumps(state) + "\n", "utf-8")
            self.describe(partial)
            files |= {path.name: _seal(path) for path in partial.iterdir() if path.name not in files}
            manifest = json.dumps({"format": FORMAT, "files": files}, indent=1)
            (partial / MANIFEST).write_text(manifest + "\n", "utf-8")
            to_disk(partial / MANIFEST)
            to_disk(partial)
            if target.exists():  # a damaged one, that a run went back behind
                target.rename(old)
            partial.rename(target)
            to_disk(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        # Later steps than the one just saved are damaged ones that the run went back behind: they stay.
        steps = {_step(path): path for path in self._paths()}
        for step in sorted(step for step in steps if step <= _step(target))[: -self.cfg.last]:
            if not self.cfg.milestones or step % self.cfg.milestones:
                shutil.rmtree(steps[step], ignore_errors=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _seal(path: Path) -> dict[str, Any]:
    to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def find_problem(folder: Path, rank: int = 0, size: int = 1) -> str | None:
    """Return the fault of a checkpoint, with the file; None if every byte is as it was written.

    Of `size` processes each reads its share of the files.
    """
    try:
        manifest = read_json(inside(folder, MANIFEST))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"{folder / MANIFEST} has format {manifest['format']!r}, not {FORMAT}"
        if odd := sorted({path.name for path in folder.iterdir()} ^ {*files, MANIFEST}):
            return f"{folder / odd[0]} is {'missing' if odd[0] in files else 'no file of this checkpoint'}"
        for name in sorted(files)[rank::size]:
            path, expected = inside(folder, name), files[name]
            if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                return f"{path} is damaged"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{folder / MANIFEST} cannot be used ({type(error).__name__}: {error})"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """Return the numbers of a checkpoint that `newest` gave.

    Raises:
        ValueError: they are not those of a checkpoint.
    """
    # The losses of a run that has diverged are NaN.
    state = read_json(inside(folder, STATE), finite=False)
    if not isinstance(state, dict) or type(state.get("step")) is not int or not isinstance(state.get("guard"), dict):
        raise ValueError(
            f"{folder / STATE} holds no step and guard; remove {folder}, and go on from an older checkpoint"
        )
    return state


NamedShards = dict[Tensor, tuple[str, TensorShard]]
"""Name and shard of each parameter of this process."""


def optimizer_shards(optimizer: torch.optim.Optimizer, parameters: NamedShards) -> dict[str, TensorShard]:
    """Return the whole state of an optimizer, by parameter and field."""
    return {
        f"{parameters[p][0]}/{field}": replace(parameters[p][1], local=x.to_local() if isinstance(x, DTensor) else x)
        for p, fields in optimizer.state.items()
        for field, x in fields.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: NamedShards, reader: ShardReader, group: str
) -> None:
    """Put back the state that `optimizer_shards` gave, whatever the number of processes was then."""
    ordered = [p for options in optimizer.param_groups for p in options["params"]]
    index = {parameters[p][0]: i for i, p in enumerate(ordered)}
    state: dict[int, dict[str, Tensor]] = {}
    for key in reader.names(group):
        name, field = key.rsplit("/", 1)
        p = ordered[index[name]]
        shard = parameters[p][1]
        x = reader.read(group, key, shard.start, len(shard.local) if shard.local.ndim else 1)
        if isinstance(p, DTensor) and x.ndim and field != "momentum":
            x = DTensor.from_local(x.to(p.device), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        state.setdefault(index[name], {})[field] = x
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
