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
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from open_mythos.checks import check_int, check_number
from open_mythos.files import inside, make_folder, naming, read_json, sha256, to_disk
from open_mythos.train import tensor_shards as pieces
from open_mythos.train.distributed import World, wait
from open_mythos.train.tensor_shards import Groups, Piece, Stored

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
PATIENCE = timedelta(hours=1)
"""For the other processes to write their files: what a very large model takes on a very slow disk."""


@dataclass(frozen=True)
class Keeping:
    """When to save, and what to keep. None of it changes a run's result."""

    every: int = 0
    """Steps between checkpoints; 0: only `minutes` decides."""
    last: int = 2
    """Newest checkpoints to keep."""
    milestones: int = 0
    """Also keep those at multiples of so many steps; 0: none."""
    minutes: float = 5.0
    """Minutes after which a checkpoint is saved in any case; 0: never."""

    def __post_init__(self) -> None:
        check_int("checkpoint_every", self.every, 0)
        check_int("keep_last", self.last, 1)
        check_int("keep_every", self.milestones, 0)
        check_number("checkpoint_minutes", self.minutes, 0)


class Checkpoints:
    """The checkpoints of one run. Files are written in a thread, from copies, while training goes on."""

    def __init__(self, folder: Path, keeping: Keeping, world: World, describe: Callable[[Path], None]) -> None:
        """Args: describe: writes what does not change during the run into a checkpoint's folder."""
        self.folder, self.keeping, self.world, self.describe = folder, keeping, world, describe
        self._store = world.store()
        self._thread: threading.Thread | None = None
        self._step = 0
        self._failed: Exception | None = None
        self._n_saves = 0
        self._written_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return whether the number of steps asks for a checkpoint after `step`."""
        return bool(self.keeping.every) and step % self.keeping.every == 0

    def is_late(self) -> bool:
        """Return whether the clock asks for a checkpoint: `keeping.minutes` have passed since the last was complete."""
        writing = self._thread is not None and self._thread.is_alive()
        return 0 < self.keeping.minutes * 60 <= time.monotonic() - self._written_at and not writing

    def save(self, step: int, groups: Groups, state: dict[str, Any]) -> None:
        """Copy and start to write; `state` is JSON. One save at a time: a second waits for the first.

        A save that fails, as on a full disk, is a warning: the older checkpoints are there, and training goes on.
        """
        self.wait()
        self._step = step
        copies = {
            file: {
                name: replace(p, local=p.local.detach().to("cpu", copy=True).contiguous())
                for name, p in tensors.items()
                if self.world.rank < self.world.size // p.copies
            }
            for file, tensors in groups.items()
        }
        self._n_saves += 1
        self._thread = threading.Thread(target=self._write, args=(step, copies, {"step": step, **state}))
        self._thread.start()

    def join(self) -> None:
        """Wait until nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> bool:
        """Wait for the save in progress; whether the last one succeeded."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._failed is not None and self.world.is_first:
                warnings.warn(
                    f"the checkpoint of step {self._step} could not be saved in {self.folder} ({self._failed}); older "
                    "ones stand, and training goes on",
                    stacklevel=2,
                )
        return self._failed is None

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, if there is any. Newer ones that are damaged are named in a warning.

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
        """The checkpoints, the oldest first."""
        found = [path for path in self.folder.glob("step-*") if re.fullmatch("step-[0-9]{8,}", path.name)]
        return sorted((path for path in found if path.is_dir()), key=_step)

    def _write(self, step: int, groups: Groups, state: dict[str, Any]) -> None:
        self._failed = None
        target = self.folder / f"step-{step:08d}"
        partial, old = target.with_suffix(".partial"), target.with_suffix(".old")
        try:
            if self.world.is_first:
                for left_over in self.folder.glob("step-*.*"):
                    if re.fullmatch(r"step-[0-9]{8,}\.(partial|old)", left_over.name):
                        shutil.rmtree(left_over, ignore_errors=True)
                make_folder(partial)
            self._pass_on(f"{self._n_saves}/begun")
            self._finish(step, self._guarded(lambda: self._write_own(partial, groups)), partial, old, state)
        except Exception as error:
            # Whatever it is, the one who waits has to hear of it: an exception ends nothing but this thread.
            self._failed = error
            if self.world.is_first:
                shutil.rmtree(partial, ignore_errors=True)
                for key in ("begun", "done"):
                    self._store.compare_set(f"{self._n_saves}/{key}", "", f"{type(error).__name__}: {error}")
        finally:
            self._written_at = time.monotonic()

    def _write_own(self, partial: Path, groups: Groups) -> dict[str, Any]:
        """This process's files; their sizes and hashes."""
        paths = []
        for name, tensors in groups.items():
            if tensors:
                paths.append(partial / f"{name}-{self.world.rank:05d}.safetensors")
                pieces.write(paths[-1], tensors)
        return {path.name: _seal(path) for path in paths}

    @staticmethod
    def _guarded(write: Callable[[], dict[str, Any]]) -> str:
        try:
            return json.dumps({"files": write()})
        except Exception as error:  # for the first process, which decides about the whole
            return json.dumps({"error": f"{type(error).__name__}: {error}"})

    def _pass_on(self, key: str) -> None:
        """Wait for the first process to come to this point."""
        if self.world.is_first:
            self._store.compare_set(key, "", "ok")
        wait(self._store, [key], PATIENCE)
        if (said := self._store.get(key).decode()) != "ok":
            raise OSError(said)

    def _finish(self, step: int, written: str, partial: Path, old: Path, state: dict[str, Any]) -> None:
        """Let the first process see what all have written, complete the folder and give it its name."""
        self._store.set(f"{self._n_saves}/{self.world.rank}", written)
        if self.world.is_first:
            keys = [f"{self._n_saves}/{rank}" for rank in range(self.world.size)]
            wait(self._store, keys, PATIENCE)
            parts = [json.loads(self._store.get(key)) for key in keys]
            for rank, part in enumerate(parts):
                if "error" in part:
                    raise OSError(part["error"] if self.world.size == 1 else f"rank {rank}: {part['error']}")
            files = {name: seal for part in parts for name, seal in part["files"].items()}
            with naming(partial):
                (partial / STATE).write_text(json.dumps(state) + "\n", "utf-8")
                self.describe(partial)
                files |= {path.name: _seal(path) for path in partial.iterdir() if path.name not in files}
                manifest = json.dumps({"format": FORMAT, "files": files}, indent=1)
                (partial / MANIFEST).write_text(manifest + "\n", "utf-8")
                to_disk(partial / MANIFEST)
                to_disk(partial)
                target = self.folder / f"step-{step:08d}"
                if target.exists():  # a damaged one, that a run went back behind
                    target.rename(old)
                partial.rename(target)
                to_disk(self.folder)
            shutil.rmtree(old, ignore_errors=True)
            self._drop(step)
        self._pass_on(f"{self._n_saves}/done")

    def _drop(self, newest: int) -> None:
        """Remove what need not be kept. Later steps than `newest` are damaged ones that the run went back behind."""
        steps = {_step(path): path for path in self._paths()}
        for step in sorted(step for step in steps if step <= newest)[: -self.keeping.last]:
            if not self.keeping.milestones or step % self.keeping.milestones:
                shutil.rmtree(steps[step], ignore_errors=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _seal(path: Path) -> dict[str, Any]:
    to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def find_problem(folder: Path, rank: int = 0, size: int = 1) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every byte is as it was written.

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


def optimizer_pieces(optimizer: torch.optim.Optimizer, held: dict[Tensor, tuple[str, Piece]]) -> dict[str, Piece]:
    """Everything that an optimizer remembers, by parameter and field.

    Args:
        held: for each parameter its name and what this process holds of it.
    """
    found = {}
    for p, fields in optimizer.state.items():
        name, piece = held[p]
        for field, x in fields.items():
            x = x.to_local() if isinstance(x, DTensor) else x
            found[f"{name}/{field}"] = replace(piece, local=x)
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer, held: dict[Tensor, tuple[str, Piece]], stored: Stored, group: str
) -> None:
    """Put back what `optimizer_pieces` gave, whatever the number of processes was then."""
    parameters = [p for options in optimizer.param_groups for p in options["params"]]
    place = {held[p][0]: i for i, p in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key in stored.names(group):
        name, field = key.rsplit("/", 1)
        p = parameters[place[name]]
        piece = held[p][1]
        x = stored.read(group, key, piece.start, len(piece.local) if piece.local.ndim else 1)
        if isinstance(p, DTensor) and x.ndim and field != "momentum":
            x = DTensor.from_local(x.to(p.device), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        state.setdefault(place[name], {})[field] = x
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
