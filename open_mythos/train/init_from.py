"""Starting a run from the weights of a model folder."""

import copy
import dataclasses
from typing import Any

import torch

from open_mythos import model_folder as weights
from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.tasks import Chat
from open_mythos.tokenization.tokenizer import Tokenizer, load_tokenizer
from open_mythos.train.config import TrainConfig
from open_mythos.train.identity import tokenizer_digest

FREE = ("max_seq_len", "max_output_tokens", "dropout")
"""What may differ from the folder: it changes neither a tensor nor what one is for."""


def adopt(cfg: TrainConfig, folder: str) -> TrainConfig:
    """`cfg` with the folder's architecture in place of its own, and the folder's tokenizer for a task that names one.

    Its sections are not held against each other: fields may still be given that make them fit.
    """
    adopted = {"init_from": folder, "model": weights.read_config(weights.locate(folder))}
    if isinstance(cfg.data, Chat):
        adopted["data"] = dataclasses.replace(cfg.data, tokenizer_from=folder)
    cfg = copy.copy(cfg)
    for name, value in adopted.items():
        object.__setattr__(cfg, name, value)
    return cfg


def open_initial(cfg: MythosConfig, tokenizer: Tokenizer, folder: str) -> dict[str, Any]:
    """The tensors of a model folder, or of a hub repository, for a model of configuration `cfg`.

    They are slices of the file, which read the rows that they are asked for: no process reads more than it keeps.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks a file.
        ValueError: its configuration differs (see FREE), its tensors are not those of its configuration, or its
            tokenizer is not `tokenizer`.
    """
    path = weights.locate(folder)
    theirs, state = weights.read_config(path), weights.open_slices(path)
    ours = cfg.to_dict()
    for name, value in theirs.to_dict().items():
        if name not in FREE and ours[name] != value:
            raise ValueError(
                f"model.{name}={ours[name]!r} is not the {value!r} of init_from={folder!r}; use model.{name}={value!r}"
            )
    if tokenizer_digest(tokenizer) != tokenizer_digest(load_tokenizer(path)):
        raise ValueError(
            f"the data's tokenizer is not the one of init_from={folder!r}, whose ids mean other text; use data made "
            f"with it: data.tokenizer_from={folder!r} for chat, mythos prepare-data --tokenizer {folder} for shards"
        )
    with torch.device("meta"):
        weights.check({name: tuple(rows.get_shape()) for name, rows in state.items()}, OpenMythos(cfg).state_dict())
    return state
