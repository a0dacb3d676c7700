"""Tensors of which each process has some rows, in files from which any number of processes can read theirs.

A file is safetensors; its header names the shards in it that are not the whole tensor. Nothing is ever unpickled.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from open_mythos.model_folder import save_tensors


@dataclass(frozen=True)
class TensorShard:
    """Rows of a tensor, which are its first dimension."""

    local: Tensor
    start: int = 0
    """Number of the first of these rows."""
    n_rows: int = 1
    """Rows of the whole tensor."""
    n_copies: int = 1
    """Processes that have this same shard: those of the lowest ranks write it."""


ShardGroups = dict[str, dict[str, TensorShard]]
"""Shards by file and name."""


def write_shards(path: Path, shards: dict[str, TensorShard]) -> None:
    """Write one file, the same for the same tensors in any order. They have to be on the CPU and contiguous."""
    shards = dict(sorted(shards.items()))
    places = {name: [s.start, s.n_rows] for name, s in shards.items() if s.local.ndim and len(s.local) < s.n_rows}
    save_tensors({name: s.local for name, s in shards.items()}, path, {"pieces": json.dumps(places)})


class ShardReader:
    """The tensors of a folder whose files are named GROUP-RANK.safetensors."""

    def __init__(self, folder: Path) -> None:
        self._parts: dict[str, dict[str, list[tuple[int, Any]]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            # The file is mapped: only the rows that are asked for are read.
            file = safe_open(path, "pt")
            places = json.loads(file.metadata()["pieces"])
            group = self._parts.setdefault(path.stem.partition("-")[0], {})
            for name in file.keys():
                group.setdefault(name, []).append((places.get(name, [0])[0], file.get_slice(name)))

    def names(self, group: str) -> list[str]:
        """Return the names of a group's tensors; none if there is no such group."""
        return list(self._parts.get(group, {}))

    def read(self, group: str, name: str, start: int, n: int) -> Tensor:
        """Return rows `start` to `start + n` of a tensor, or all of one that has no dimension."""
        parts = self._parts[group][name]
        if not parts[0][1].get_shape():
            # A copy: mapped tensors stand at odd offsets, where kernels round differently.
            return parts[0][1][...].clone()
        found = [parts[0][1][:0]]
        for first, part in sorted(parts, key=lambda part: part[0]):
            a, b = max(start, first), min(start + n, first + part.get_shape()[0])
            if a < b:
                found.append(part[a - first : b - first])
        return torch.cat(found)
