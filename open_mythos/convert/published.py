"""Folders of the families that docs/families.md lists, in the layout in which their authors publish them.

A family is a module with two functions: `to_config(values)`, and `places(cfg)`, which says where each tensor goes.
Strict names and shapes are checked here, and the model is filled here, shard by shard.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from open_mythos.checks import check_int, check_number, shown
from open_mythos.config import MythosConfig
from open_mythos.files import blamed_on, inside, read_json

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Place:
    """Where a published tensor goes."""

    name: str
    """Tensor of the model."""
    shape: tuple[int, ...]
    """Shape of the published tensor."""
    row: int = 0
    """First row in the model's tensor."""
    change: Callable[[Tensor], Tensor] | None = None
    """Rearranges the published tensor to rows of the model's; None: as it is."""


Places = dict[str, Place | None]
"""Places by published name; None: the tensor repeats another or can be computed, and is dropped."""


def to_state(tensors: Mapping[str, Tensor], places: Places) -> dict[str, Tensor]:
    """Return the model's state from a family's tensors.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message lists them.
    """
    check_shapes({name: tuple(x.shape) for name, x in tensors.items()}, places, "the state")
    return fill(tensors.items(), places)


def check_shapes(shapes: Mapping[str, tuple[int, ...]], places: Places, where: str) -> None:
    """Refuse tensors that are missing, unknown or of another shape than the configuration's."""
    wanted = {name: place for name, place in places.items() if place is not None}
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - shapes.keys())]
    problems += [f"{name:.80} is unknown" for name in sorted(shapes.keys() - places.keys())]
    problems += [
        f"{name} has shape {shown(shapes[name])}, not {place.shape}"
        for name, place in wanted.items()
        if name in shapes and tuple(shapes[name]) != place.shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{where} does not fit {CONFIG_FILE}: {'; '.join(problems[:8])}{more}; download it again")


def fill(tensors: Iterable[tuple[str, Tensor]], places: Places, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the model's tensors, each made when its first part comes; `dtype`: theirs, None: each part's."""
    rows: dict[str, int] = {}
    for place in places.values():
        if place is not None:
            n = math.prod(place.shape) // math.prod(place.shape[1:]) if place.change is None else -1
            rows[place.name] = max(rows.get(place.name, 0), place.row + n)
    state: dict[str, Tensor] = {}
    for name, x in tensors:
        if (place := places[name]) is None:
            continue
        x = x if place.change is None else place.change(x)
        if place.name not in state:
            n = max(rows[place.name], place.row + len(x))
            state[place.name] = torch.empty(n, *x.shape[1:], dtype=dtype or x.dtype, device=x.device)
        state[place.name][place.row : place.row + len(x)] = x
    return state


@dataclass(frozen=True)
class Published:
    """A folder of a known family, whose tensors are known to be those of its configuration."""

    cfg: MythosConfig
    places: Places
    files: list[Path]

    def load(self) -> dict[str, Tensor]:
        """Return the model's state. One file is mapped at a time: beyond the state, memory holds at most one shard."""
        dtypes = {dtype for dtype in self._dtypes() if dtype is not None}
        widest = next(dtype for dtype in FLOATS if dtype in dtypes)
        return fill(self._tensors(), self.places, widest)

    def _dtypes(self) -> Iterator[torch.dtype | None]:
        names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        for path in self.files:
            with _opened(path) as file:
                for name in file.keys():
                    if self.places[name] is not None:
                        yield names[file.get_slice(name).get_dtype()]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path in self.files:
            with _opened(path) as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)


def find_published(folder: str | Path) -> Published | None:
    """Return the folder's model if its `config.json` names a family; None for a folder of this package, or of nobody.

    Raises:
        ValueError: a value of the configuration is one that the family's code never had, or the tensors do not fit it.
        FileNotFoundError: the weights are missing, or there are only pickled ones.
    """
    from open_mythos.convert import FAMILIES

    path = inside(Path(folder), CONFIG_FILE)
    if not path.is_file():
        return None
    values = read_json(path, 2**20)
    family = FAMILIES.get(values.get("model_type")) if isinstance(values, dict) else None
    if family is None:
        return None
    with blamed_on(path):
        cfg = family.to_config(values)
    places, files = family.places(cfg), weight_files(Path(folder))
    shapes: dict[str, tuple[int, ...]] = {}
    for file_path in files:
        with _opened(file_path) as file:
            for name in file.keys():
                rows = file.get_slice(name)
                if name in shapes:
                    raise ValueError(f"{file_path} has {name:.80} again; download the folder again")
                if rows.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{file_path} has {name:.80} in {rows.get_dtype()}, which is no float of a weight")
                shapes[name] = tuple(rows.get_shape())
    check_shapes(shapes, places, str(folder))
    return Published(cfg, places, files)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder's tensors: one, or the shards that its index names."""
    single, index = inside(folder, WEIGHTS_FILE), inside(folder, INDEX_FILE)
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise FileNotFoundError(
                f"{folder} has its weights only in {pickled[0]}, which was pickled and could run code when it is read; "
                f"get its {WEIGHTS_FILE}, or write one with safetensors.torch.save_file where you trust the file"
            )
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; download the folder again")
    names = read_json(index, 2**26)
    try:
        shards = sorted(set(names["weight_map"].values()))
        paths = [inside(folder, name) for name in shards]
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{index} holds no weight_map of tensors to files; download it again") from error
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, but {INDEX_FILE} names it; download it")
    return paths


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again") from error


class Values:
    """The values of a published `config.json`, checked by name as they are read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def int(self, name: str, low: int = 1) -> int:
        check_int(name, self._get(name), low, 2**30)
        return self.values[name]

    def number(self, name: str, low: float = 0, above: bool = True) -> float:
        check_number(name, self._get(name), low, math.inf, above=above)
        return float(self.values[name])

    def only(self, name: str, *allowed: Any) -> Any:
        """Return a value that has to be one of `allowed`, the first of which stands for one that is not there."""
        value = self.values.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{name}={shown(value)} is not supported; this family runs here with {json.dumps(allowed[0])}"
            )
        return value

    def _get(self, name: str) -> Any:
        if name not in self.values:
            raise ValueError(f"{name} is missing; download config.json again")
        return self.values[name]


def interleaved(x: Tensor, head_dim: int) -> Tensor:
    """Reorder rows so that channels which a rotation pairs across half a head, (i, i + K/2), stand side by side.

    Scores are sums over a head's channels, so queries and keys may be reordered together.
    """
    heads = x.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)
