"""The model folder at the end of a run: written whole, checked, and set aside when the run goes on."""

import os
import shutil
import warnings
from pathlib import Path

from torch import Tensor

from open_mythos import model_folder as weights
from open_mythos.config import MythosConfig
from open_mythos.files import make_folder, to_disk, writing
from open_mythos.model import OpenMythos
from open_mythos.tokenization.chat_template import save_template
from open_mythos.tokenization.tokenizer import Tokenizer, load_tokenizer

FINAL = "final"


def save_model_folder(
    cfg: MythosConfig, state: dict[str, Tensor], tokenizer: Tokenizer, folder: Path, knows_turns: bool = False
) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer to `folder`, which must not exist.

    The folder appears complete or not at all: it is written beside its place and renamed.

    Args:
        knows_turns: write the chat template too, since the model was trained on conversations.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; use another folder or remove it")
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    make_folder(partial)
    with writing(folder):
        weights.save(partial, cfg, state)
        tokenizer.save(partial)
        if knows_turns:
            save_template(partial)
        for path in (*partial.iterdir(), partial):
            to_disk(path)
        partial.rename(folder)
        to_disk(folder.parent)


def find_problem(folder: Path) -> str | None:
    """Return why a model folder cannot be used; None if its configuration, its weights and its tokenizer can be read.

    Weights are looked at as far as their header and the size of the file go.
    """
    try:
        OpenMythos.without_weights(folder)
        load_tokenizer(folder)
    except (OSError, ValueError, TypeError) as error:
        return str(error)
    return None


def set_aside(folder: Path, steps: int) -> None:
    """Give a run's model folder another name, because the run goes on: that of its step, or `final.damaged`."""
    problem = find_problem(folder)
    aside = folder.with_name(f"{FINAL}-step-{steps:08d}" if problem is None else f"{FINAL}.damaged")
    if problem is not None:
        warnings.warn(
            f"{folder} cannot be used ({problem}); it is now {aside}, and is made again from the newest checkpoint",
            stacklevel=2,
        )
    with writing(aside):
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)
        os.replace(folder, aside)
        to_disk(folder.parent)
