"""A model folder: `config.json` beside `model.safetensors`. Nothing here is ever unpickled."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from open_mythos.config import MythosConfig

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FOLDER_KEYS = {"model_type": "open_mythos", "architectures": ["OpenMythosForCausalLM"]}


def save(folder: str | Path, cfg: MythosConfig, state: dict[str, Tensor]) -> None:
    """Write both files, each first under another name, so that a reader sees a whole file or none."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The head is the embedding; safetensors refuses to store one memory twice.
    tensors = {name: x.detach().contiguous() for name, x in state.items() if name != "head.weight"}
    partial = folder / (WEIGHTS_FILE + ".partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written ({error}); make room, and run the command again") from error
    os.replace(partial, folder / WEIGHTS_FILE)
    partial = folder / (CONFIG_FILE + ".partial")
    partial.write_text(json.dumps({**FOLDER_KEYS, **cfg.to_dict()}, indent=2) + "\n")
    os.replace(partial, folder / CONFIG_FILE)


def load(folder_or_repo: str | Path) -> tuple[MythosConfig, dict[str, Tensor]]:
    """The configuration and the tensors of a model folder, or of a hub repository when there is no such folder."""
    folder = locate(folder_or_repo)
    cfg, path = read_config(folder), _file(folder, WEIGHTS_FILE)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); copy or save it again") from error
    # Copies: the loaded ones are mapped from the file, at odd offsets, where kernels round differently.
    return cfg, {name: x.clone() for name, x in tensors.items()}


def locate(folder_or_repo: str | Path) -> Path:
    """The folder, or the local copy of a hub repository when there is no such folder."""
    folder = Path(folder_or_repo)
    return _download(str(folder_or_repo)) if not folder.exists() and str(folder_or_repo).count("/") == 1 else folder


def open_slices(folder: str | Path) -> dict[str, Any]:
    """The tensors of a model folder as safetensors' slices: mapped, with `get_shape()` and rows by index."""
    path = _file(Path(folder), WEIGHTS_FILE)
    try:
        file = safe_open(path, "pt")
        return {name: file.get_slice(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); copy or save it again") from error


def read_config(folder: str | Path) -> MythosConfig:
    """The configuration of a model folder."""
    values: dict[str, Any] = json.loads(_file(Path(folder), CONFIG_FILE).read_text())
    if values.get("model_type") != FOLDER_KEYS["model_type"]:
        raise ValueError(
            f"{folder}/{CONFIG_FILE} has model_type={values.get('model_type')!r}, not 'open_mythos'; "
            "give a folder written by save_pretrained"
        )
    return MythosConfig.from_dict({name: value for name, value in values.items() if name not in FOLDER_KEYS})


def check(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse tensors that are missing, unknown or of another shape than the configuration says."""
    names = expected.keys() - {"head.weight"}
    problems = [f"{name} is missing" for name in sorted(names - state.keys())]
    problems += [f"{name} is unknown" for name in sorted(state.keys() - names)]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(expected[name].shape)}"
        for name in sorted(names & state.keys())
        if state[name].shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{WEIGHTS_FILE} does not fit {CONFIG_FILE}: {'; '.join(problems[:5])}{more}. For weights of open-mythos "
            "0.5.0 use open_mythos.convert"
        )


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give a folder written by save_pretrained or by 'mythos train', "
            "which has it under DIR/final"
        )
    return path


def _download(repo: str) -> Path:
    # `tokenizers` depends on huggingface_hub, so it is there; it is slow to import and needed here only.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        # Configuration and tokenizer are JSON.
        return Path(snapshot_download(repo, allow_patterns=["*.json", WEIGHTS_FILE]))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{repo!r} is no folder here and the Hugging Face hub does not give it; check the path, or the name of the "
            "repository and the connection"
        ) from error
