"""Writing the model folder that a run leaves behind."""

import shutil
from pathlib import Path

from open_mythos.model import OpenMythos
from open_mythos.tokenizer import Tokenizer


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
    partial.rename(folder)
