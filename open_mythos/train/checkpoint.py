"""What a run leaves on disk: checkpoints to go on from, and the model folder at the end.

    checkpoints/step-00000200/
      model.safetensors, optimizer0.safetensors, ...
      state.json
      manifest.json            every file's size and SHA-256; written last

A folder appears under its name when all of it is on disk, so a crash at any instant leaves the older ones as they were.
Nothing is ever unpickled.
"""

import json
import shutil
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from open_mythos.checks import check_int
from open_mythos.files import sha256, to_disk
from open_mythos.model import OpenMythos
from open_mythos.tokenizer import Tokenizer

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
Groups = dict[str, dict[str, Tensor]]
"""Named tensors by file."""


@dataclass(frozen=True)
class Keeping:
    """When to save, and what to keep. None of it changes a run's result."""

    every: int = 0
    """Steps between checkpoints; 0: none."""
    last: int = 2
    """Newest checkpoints to keep."""
    milestones: int = 0
    """Also keep those at multiples of so many steps; 0: none."""

    def __post_init__(self) -> None:
        check_int("checkpoint_every", self.every, 0)
        check_int("keep_last", self.last, 1)
        check_int("keep_every", self.milestones, 0)


class Checkpoints:
    """The checkpoints of one run. Files are written in a thread, from copies, while training goes on."""

    def __init__(self, folder: Path, keeping: Keeping) -> None:
        self.folder, self.keeping = folder, keeping
        self._thread: threading.Thread | None = None
        self._failed: Exception | None = None

    def save(self, step: int, groups: Groups) -> None:
        """Copy and start to write. One save at a time: a second waits for the first.

        A save that fails, as on a full disk, is a warning: the older checkpoints are there, and training goes on.
        """
        self.wait()
        # safetensors refuses to store one memory twice, and the head is the embedding.
        copies = {
            file: {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
            for file, tensors in groups.items()
        }
        self._thread = threading.Thread(target=self._write, args=(step, copies))
        self._thread.start()

    def wait(self) -> bool:
        """Wait for the save in progress; whether the last one succeeded."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._failed is not None:
                warnings.warn(f"a checkpoint could not be saved ({self._failed}); the older ones stand", stacklevel=2)
        return self._failed is None

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole. Newer ones that are damaged are named in a warning."""
        for path in reversed(self._paths()):
            if (problem := find_problem(path)) is None:
                return path
            warnings.warn(f"{problem}; going back to the checkpoint before", stacklevel=2)
        return None

    def _paths(self) -> list[Path]:
        """The checkpoints, the oldest first."""
        return sorted(path for path in self.folder.glob("step-????????") if path.is_dir())

    def _write(self, step: int, groups: Groups) -> None:
        self._failed = None
        target = self.folder / f"step-{step:08d}"
        partial, old = target.with_suffix(".partial"), target.with_suffix(".old")
        try:
            for left_over in (partial, old):
                shutil.rmtree(left_over, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, tensors in groups.items():
                save_file(tensors, partial / f"{name}.safetensors")
            (partial / STATE).write_text(json.dumps({"step": step}) + "\n", "utf-8")
            files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in partial.iterdir()}
            (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n", "utf-8")
            for path in (*partial.iterdir(), partial):
                to_disk(path)
            if target.exists():  # a damaged one, that a run went back behind
                target.rename(old)
            partial.rename(target)
            to_disk(self.folder)
            shutil.rmtree(old, ignore_errors=True)
            self._drop(step)
        except Exception as error:
            # Whatever it is, the one who waits has to hear of it: an exception ends nothing but this thread.
            self._failed = error
            shutil.rmtree(partial, ignore_errors=True)

    def _drop(self, newest: int) -> None:
        """Remove what need not be kept. Later steps than `newest` are damaged ones that the run went back behind."""
        steps = {int(path.name.removeprefix("step-")): path for path in self._paths()}
        for step in sorted(step for step in steps if step <= newest)[: -self.keeping.last]:
            if not self.keeping.milestones or step % self.keeping.milestones:
                shutil.rmtree(steps[step], ignore_errors=True)


def find_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every byte is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"{folder / MANIFEST} has format {manifest['format']!r}, not {FORMAT}"
        if odd := sorted({path.name for path in folder.iterdir()} ^ {*files, MANIFEST}):
            return f"{folder / odd[0]} is {'missing' if odd[0] in files else 'no file of this checkpoint'}"
        for name, expected in files.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                return f"{path} is damaged"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{folder / MANIFEST} cannot be used ({type(error).__name__}: {error})"
    return None


def load(folder: Path) -> tuple[Groups, int]:
    """The tensors and the steps done of a checkpoint that `newest` gave."""
    groups = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    return groups, json.loads((folder / STATE).read_text("utf-8"))["step"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """Everything that an optimizer remembers, by parameter and field."""
    return {f"{names[p]}/{field}": x for p, fields in optimizer.state.items() for field, x in fields.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    place = {names[p]: i for i, p in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        name, field = key.rsplit("/", 1)
        # A copy: what is loaded is mapped from the file, at odd offsets, where kernels round differently.
        state.setdefault(place[name], {})[field] = x.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def save_model_folder(model: OpenMythos, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer to `folder`, which must not exist.

    The folder appears complete or not at all: it is written beside its place and renamed.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; use another folder or remove it")
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save(partial)
    for path in (*partial.iterdir(), partial):
        to_disk(path)
    partial.rename(folder)
