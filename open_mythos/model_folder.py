"""A model folder: `config.json` beside `model.safetensors`. Nothing here is ever unpickled.

The weights carry the configuration that they were saved with, so that one rename replaces both: see `read_config`.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from open_mythos.checks import shown
from open_mythos.config import MythosConfig
from open_mythos.files import blamed_on, inside, make_folder, open_ordinary, parse_json, read_json, to_disk, writing

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
REMOTE_CODE = "modeling_open_mythos"
"""Module in a folder by which transformers finds this package: it only imports `open_mythos.hf`."""
HUB_CLASSES = {"AutoConfig": "MythosHFConfig", "AutoModel": "MythosModel", "AutoModelForCausalLM": "MythosForCausalLM"}
FOLDER_KEYS = {
    "model_type": "open_mythos",
    "architectures": [HUB_CLASSES["AutoModelForCausalLM"]],
    "auto_map": {auto: f"{REMOTE_CODE}.{name}" for auto, name in HUB_CLASSES.items()},
}
SAVED_CONFIG, SAVED_DIGEST = "open_mythos_config", "saved_config_sha256"
"""The keys of the configuration, behind its digest, in the weights' metadata, and of the digest in `config.json`."""
MAX_CONFIG_BYTES = 2**20
MAX_HEADER_BYTES, MAX_TENSORS = 8 * 2**20, 100_000
"""Limits of `model.safetensors`: beyond them, reading takes seconds and gigabytes before anything is known of it."""
DTYPES = ("F64", "F32", "F16", "BF16")


def save(folder: str | Path, cfg: MythosConfig, state: dict[str, Tensor]) -> None:
    """Write both files, so that at any instant a reader finds either the model that was there or this one, whole."""
    folder = Path(folder)
    make_folder(folder)
    # The head is the embedding; safetensors refuses to store one memory twice.
    tensors = {name: x.detach().contiguous() for name, x in state.items() if name not in tied(cfg)}
    saved = json.dumps({**FOLDER_KEYS, **cfg.to_dict()}, sort_keys=True)
    config = {**FOLDER_KEYS, SAVED_DIGEST: _digest(saved), **cfg.to_dict()}
    partial = {name: folder / f"{name}.partial" for name in (WEIGHTS_FILE, CONFIG_FILE)}
    save_tensors(tensors, partial[WEIGHTS_FILE], {"format": "pt", SAVED_CONFIG: f"{_digest(saved)} {saved}"})
    with writing(folder):
        code = f"# Needs the package open_mythos.\nfrom open_mythos.hf import {', '.join(HUB_CLASSES.values())}\n"
        (folder / f"{REMOTE_CODE}.py").write_text(code, "utf-8")
        partial[CONFIG_FILE].write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        for path in partial.values():
            to_disk(path)
        # From this rename on the folder holds the new model. Its `config.json` is still the old one, and is not used.
        os.replace(partial[WEIGHTS_FILE], folder / WEIGHTS_FILE)
        os.replace(partial[CONFIG_FILE], folder / CONFIG_FILE)
        to_disk(folder)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file of tensors.

    Raises:
        OSError: it cannot be written; the message names it, and says so when the disk is full.
    """
    with writing(path):
        save_file(tensors, path, metadata=metadata)
        with path.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            # The library writes metadata in an order that varies. The same tensors and metadata get the same bytes.
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
            if len(ordered) != size:
                raise ValueError(f"the header of {path} would change its length from {size} to {len(ordered)} bytes")
            file.seek(8)
            file.write(ordered)


def load(folder: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder."""
    with _weights(folder) as path:
        tensors = load_file(path)
    # Copies: the loaded ones are mapped from the file, at odd offsets, where kernels round differently.
    return {name: x.clone() for name, x in tensors.items()}


def open_slices(folder: str | Path) -> dict[str, Any]:
    """Return the tensors of a model folder as safetensors' slices: mapped, with `get_shape()` and rows by index."""
    with _weights(folder) as path:
        file = safe_open(path, "pt")
        return {name: file.get_slice(name) for name in file.keys()}


def read_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model folder's tensors, which stay on disk.

    Raises:
        ValueError: the file is damaged, or a tensor is not of floating point, or `values` not int8.
    """
    slices = open_slices(folder)
    for name, rows in slices.items():
        allowed = ("I8",) if name.endswith("values") else DTYPES
        if rows.get_dtype() not in allowed:
            raise ValueError(
                f"{WEIGHTS_FILE} has {name:.80} in {rows.get_dtype()}, not one of {', '.join(allowed)}; save it again"
            )
    return {name: tuple(rows.get_shape()) for name, rows in slices.items()}


def locate(folder_or_repo: str | Path) -> Path:
    """Return the folder, or the local copy of a hub repository when there is no such folder."""
    folder = Path(folder_or_repo)
    if folder.exists() or str(folder_or_repo).count("/") != 1:
        return folder
    # `tokenizers` depends on huggingface_hub, so it is there; it is slow to import and needed here only.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        # Configuration and tokenizer are JSON.
        return Path(snapshot_download(str(folder_or_repo), allow_patterns=["*.json", "model*.safetensors"]))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{str(folder_or_repo)!r} is no folder here and the Hugging Face hub does not give it; check the path, or "
            "the name of the repository and the connection"
        ) from error


def read_config(folder: str | Path) -> MythosConfig:
    """Return the configuration of a model folder: `config.json`, also when it was edited by hand.

    A `config.json` that belongs to other weights, as after a save over an older folder that was cut off between the
    two files, gives way with a warning to the configuration that the weights were saved with.
    """
    path = _file(folder, CONFIG_FILE)
    values = _json_object(read_json(path, MAX_CONFIG_BYTES), path)
    if (saved := _saved_config(Path(folder))) is not None:
        digest = values.pop(SAVED_DIGEST, None) or _digest(json.dumps(values, sort_keys=True))
        if digest != _digest(saved):
            warnings.warn(
                f"{path} belongs to other weights than the {WEIGHTS_FILE} beside it, so the configuration in "
                f"{WEIGHTS_FILE} is used; save the model again, or copy both files together",
                stacklevel=2,
            )
            path = path.with_name(WEIGHTS_FILE)
            values = _json_object(parse_json(saved, str(path)), path)
    if values.get("model_type") != FOLDER_KEYS["model_type"]:
        raise ValueError(
            f"{path} has model_type={shown(values.get('model_type'))}, not 'open_mythos'; "
            "give a folder written by save_pretrained"
        )
    own = {*FOLDER_KEYS, SAVED_DIGEST}
    with blamed_on(path):
        return MythosConfig.from_dict({name: value for name, value in values.items() if name not in own})


def _json_object(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; copy or save it again")
    return values


def _saved_config(folder: Path) -> str | None:
    """Return the configuration in the weights' metadata; None where there is none, as in folders of other programs."""
    path = inside(folder, WEIGHTS_FILE)
    try:
        # A damaged header is reported by whoever opens the tensors.
        digest, _, saved = json.loads(_header(path))["__metadata__"][SAVED_CONFIG].partition(" ")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if len(saved) > MAX_CONFIG_BYTES or not saved.isascii() or _digest(saved) != digest:
        raise ValueError(f"{path} is damaged in its header; copy or save it again")
    return saved


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tied(cfg: MythosConfig) -> set[str]:
    """Return the names in a model's state that are other names of a tensor, and not stored."""
    return {"head.weight"} if cfg.tie_embeddings else set()


def check_size(shapes: Mapping[str, tuple[int, ...]], n_parameters: int, n_layers: int) -> None:
    """Refuse a configuration far beyond what the file holds, of which not even an empty model should be made."""
    held = sum(map(math.prod, shapes.values()))
    if n_layers > len(shapes) or n_parameters > 64 * (held + 1):
        raise ValueError(
            f"{WEIGHTS_FILE} does not fit {CONFIG_FILE}: it holds {len(shapes)} tensors with {held} numbers, for "
            f"{n_layers} layers with {n_parameters} parameters; copy or save both again"
        )


def check(shapes: Mapping[str, tuple[int, ...]], model: Mapping[str, Tensor], cfg: MythosConfig) -> None:
    """Refuse shapes of tensors that are missing, unknown or of another shape than those of a model's state."""
    expected = {name: tuple(x.shape) for name, x in model.items()}
    names = expected.keys() - tied(cfg)
    problems = [f"{name} is missing" for name in sorted(names - shapes.keys())]
    problems += [f"{name:.80} is unknown" for name in sorted(shapes.keys() - names)]
    problems += [
        f"{name} has shape {shown(shapes[name])}, not {expected[name]}"
        for name in sorted(names & shapes.keys())
        if shapes[name] != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{WEIGHTS_FILE} does not fit {CONFIG_FILE}: {'; '.join(problems[:5])}{more}. For weights of open-mythos "
            "0.5.0 use open_mythos.convert.open_mythos_0_5"
        )


@contextmanager
def _weights(folder: str | Path) -> Generator[Path]:
    """Give the file of the tensors, whose header is of a sane size, and name it in an error of the library."""
    path = _file(folder, WEIGHTS_FILE)
    if (n := _header(path).count(b'"data_offsets"')) > MAX_TENSORS:
        raise ValueError(f"{path} has {n} tensors, more than {MAX_TENSORS}; copy or save it again")
    try:
        yield path
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); copy or save it again") from error


def _header(path: Path) -> bytes:
    with open_ordinary(path) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"{path} cannot be read (a header of {size} bytes); copy or save it again")
        return file.read(size)


def _file(folder: str | Path, name: str) -> Path:
    path = inside(Path(folder), name)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a folder written by save_pretrained or by 'mythos train', "
            "which has it under DIR/final"
        )
    return path
