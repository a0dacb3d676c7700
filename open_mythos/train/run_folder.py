"""A run's folder: the run that is in it, the trainer that has it, and the model at its end."""

import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from open_mythos import model_folder
from open_mythos.config import MythosConfig
from open_mythos.files import make_folder, to_disk, write_text, writing
from open_mythos.model import OpenMythos
from open_mythos.tokenization.chat_template import save_template
from open_mythos.tokenization.tokenizer import Tokenizer, load_tokenizer
from open_mythos.train.checkpoint import Checkpoints
from open_mythos.train.config import TrainConfig
from open_mythos.train.distributed import World
from open_mythos.train.identity import CONFIG_FILE, check_config
from open_mythos.train.lock import RunLock
from open_mythos.train.metrics import METRICS_FILE, last_step
from open_mythos.train.model_card import save_model_card

CHECKPOINTS, FINAL = "checkpoints", "final"


class RunFolder:
    """The folder of the run `cfg`, as the trainer finds it.

    Raises:
        ValueError: another trainer has it, or it holds a run: without `resume` any, with it one that `cfg` does not
            continue, or of which nothing is left to go on from.
    """

    def __init__(self, path: Path, cfg: TrainConfig, checkpoints: Checkpoints, world: World, resume: bool) -> None:
        self.path, self.cfg, self.world = path, cfg, world
        self.lock = RunLock(path)
        self.final, self.metrics, self._config = path / FINAL, path / METRICS_FILE, path / CONFIG_FILE
        self._seen = self._snapshot()
        if world.is_first:
            self.lock.refuse_if_held()
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            raise ValueError(f"{path} is a file, or a link to nothing; name a folder for the run")
        for name in () if resume else (CONFIG_FILE, METRICS_FILE, CHECKPOINTS, FINAL):
            if (path / name).exists():
                raise ValueError(
                    f"{path} already holds a run ({name}); go on with it with --resume, use another folder, or remove "
                    "this one"
                )
        run = check_config(cfg, self._config) if self._config.exists() else None
        self.newest = checkpoints.newest() if resume else None
        """The checkpoint that the run goes on from."""
        if self.newest is not None:
            # The folder's own file may be lost or replaced.
            saved = check_config(cfg, self.newest / CONFIG_FILE)
            run = run or saved
        if run is not None:
            # A run goes on in the dtypes that it began with, on another machine too.
            muon_dtype = cfg.optim.muon_dtype or run.optim.muon_dtype
            self.cfg = replace(cfg, dtype=run.dtype, optim=replace(cfg.optim, muon_dtype=muon_dtype))
        for left in (self.final, self.metrics):
            if run is None and left.exists():
                raise ValueError(
                    f"{left} is there and neither {CONFIG_FILE} nor a checkpoint, so it is not known which run it is "
                    f"of; put the run's {CONFIG_FILE} back, or use another folder"
                )
        self.steps_before = cfg.steps if run is None else run.steps
        """Steps of the run as it began. There may be more now."""
        self.is_done = world.agree({}, int(world.is_first and self._is_done())) > 0
        """True once the final model is there and whole."""

    def claim(self) -> None:
        """Take the folder's lock.

        Raises:
            ValueError: another trainer has the folder, or has been there since this one looked at it.
        """
        self.lock.acquire()
        if self._snapshot() != self._seen:
            raise ValueError(
                f"{self.path} has changed since this command looked at it: another trainer was there; run the command "
                "again"
            )

    def begin(self, steps_done: int) -> None:
        """Make the folder, whose lock this process has, that of this run, which goes on behind step `steps_done`."""
        # First of all, for as soon as config.yaml says more steps, final/ passes for the model after these.
        if self.final.exists():
            self._set_final_aside()
        if not self._config.exists() or self.steps_before != self.cfg.steps:
            write_text(self._config, self.cfg.to_yaml())
        every = self.cfg.log_every
        expected = steps_done // every * every or min(1, steps_done)  # step 1 is logged whatever `log_every` is
        if (last := last_step(self.metrics)) < expected:
            warnings.warn(
                f"{self.metrics} ends at step {last} and the run at step {steps_done}: the lines between are lost",
                stacklevel=3,
            )

    def warn_of_more_steps(self, steps_done: int) -> None:
        """Say how more steps than the run began with change its learning rate."""
        cfg, before = self.cfg, self.steps_before
        if self.world.is_first and before < cfg.steps:
            old = cfg.schedule.factor(before - 1, before) * cfg.optim.lr
            new = cfg.schedule.factor(steps_done, cfg.steps) * cfg.optim.lr
            warnings.warn(
                f"the run had {before} steps and goes on to {cfg.steps}, over which its schedule is now stretched: "
                f"step {steps_done + 1} has the learning rate {new:.3g}, where step {before} of {before} had {old:.3g}",
                stacklevel=3,
            )

    def _is_done(self) -> bool:
        if not self.final.exists():
            return False
        problem = find_problem(self.final)
        if problem is None and self.steps_before == self.cfg.steps:
            return True
        if self.newest is None and problem is not None:
            raise ValueError(
                f"{self.final} cannot be used ({problem}), and there is no checkpoint to make it again from; restore "
                f"it, or remove {self.path} to begin anew"
            )
        if self.newest is None:
            raise ValueError(
                f"{self.path} has no checkpoint to go on from: {self.final} is the model after {self.steps_before} "
                f"steps, without the optimizer's state; begin another run with --init-from {self.final}"
            )
        return False

    def _set_final_aside(self) -> None:
        """Rename the model folder, because the run goes on: after its step, or to `final.damaged`."""
        problem = find_problem(self.final)
        aside = self.path / (f"{FINAL}-step-{self.steps_before:08d}" if problem is None else f"{FINAL}.damaged")
        if problem is not None:
            warnings.warn(
                f"{self.final} cannot be used ({problem}); it is now {aside}, and is made again from the newest "
                "checkpoint",
                stacklevel=3,
            )
        with writing(aside):
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside)
            else:
                aside.unlink(missing_ok=True)
            os.replace(self.final, aside)
            to_disk(self.path)

    def _snapshot(self) -> tuple[bytes | None, list[str], bool]:
        """Return what another trainer in the folder would change."""
        saved = sorted(path.name for path in (self.path / CHECKPOINTS).glob("step-*") if not path.suffix)
        return self._config.read_bytes() if self._config.is_file() else None, saved, self.final.exists()


def save_model_folder(
    cfg: MythosConfig, state: dict[str, Tensor], tokenizer: Tokenizer, folder: Path, run: TrainConfig | None = None
) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer to `folder`, which must not exist.

    The folder appears complete or not at all: it is written beside its place and renamed.

    Args:
        run: write the model card of this run too, and the chat template if it trained on conversations.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; use another folder or remove it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    with writing(folder):
        model_folder.save(partial, cfg, state)
        tokenizer.save(partial)
        if run is not None:
            save_model_card(partial, run, tokenizer)
            if run.data.has_turns:
                save_template(partial)
        for path in (*partial.iterdir(), partial):
            to_disk(path)
        partial.rename(folder)
        to_disk(folder.parent)


def find_problem(folder: Path) -> str | None:
    """Return why a model folder cannot be used; None if its configuration, its weights and its tokenizer can be read.

    Weights are checked as far as their header and the size of the file go.
    """
    try:
        OpenMythos.without_weights(folder)
        load_tokenizer(folder)
    except (OSError, ValueError, TypeError) as error:
        return str(error)
    return None
