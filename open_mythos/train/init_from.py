"""Starting a run from the weights of a model folder."""

import copy
import dataclasses
from typing import Any

import torch

from open_mythos import model_folder as weights
from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.tokenization.tokenizer import Tokenizer, load_tokenizer
from open_mythos.train.config import TrainConfig
from open_mythos.train.identity import tokenizer_digest

FREE = ("max_seq_len", "max_output_tokens", "dropout")
"""Fields that may differ from the folder's: they change neither a tensor nor its meaning."""


def adopt(cfg: TrainConfig, folder: str) -> TrainConfig:
    """Return `cfg` with the architecture of a folder, and with its tokenizer for a task that names a tokenizer.

    The sections are not checked against each other: flags that are applied later may make them fit.
    """
    adopted, cfg = weights.read_config(weights.locate(folder)), copy.copy(cfg)
    changes = {"init_from": folder, "model": adopted, "data": cfg.data.with_tokenizer_of(folder)}
    for name, value in changes.items():
        object.__setattr__(cfg, name, value)
    return cfg


def open_initial(cfg: MythosConfig, tokenizer: Tokenizer, folder: str) -> dict[str, Any]:
    """Open the tensors of a model folder, or of a hub repository, for a model of configuration `cfg`.

    They are slices of the file, and reading rows of a slice reads no others: a process reads its own shards only.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks a file.
        ValueError: its configuration differs (see FREE), its tensors are not those of its configuration, or its
            tokenizer is not `tokenizer`.
    """
    path = weights.locate(folder)
    theirs, state = weights.read_config(path), weights.open_slices(path)
    for name in (field.name for field in dataclasses.fields(cfg)):
        ours, value = getattr(cfg, name), getattr(theirs, name)
        if name not in FREE and ours != value:
            raise ValueError(
                f"model.{name}={ours!r} is not the {value!r} of init_from={folder!r}; use model.{name}={value!r}"
            )
    if tokenizer_digest(tokenizer) != tokenizer_digest(load_tokenizer(path)):
        raise ValueError(
            f"the data's tokenizer is not the one of init_from={folder!r}, whose ids mean other text; use data made "
            f"with it: data.tokenizer_from={folder!r} for chat, mythos prepare-data --tokenizer {folder} for shards"
        )
    with torch.device("meta"):
        weights.check(
            {name: tuple(rows.get_shape()) for name, rows in state.items()}, OpenMythos(cfg).state_dict(), cfg
        )
    return state
