"""Tensors of which each process holds some rows, in files from which any number of processes can read theirs.

A file is safetensors; its header names the pieces in it that are not the whole tensor. Nothing is ever unpickled.
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
class Piece:
    """The rows from `start` on of a tensor that has `rows` of them, its first dimension, in all."""

    local: Tensor
    start: int = 0
    rows: int = 1
    copies: int = 1
    """Processes that hold this same piece: those of the lowest ranks write it."""


Groups = dict[str, dict[str, Piece]]
"""Pieces by file and name."""


def write(path: Path, pieces: dict[str, Piece]) -> None:
    """One file, the same for the same tensors in any order. They have to be on the CPU and contiguous."""
    pieces = dict(sorted(pieces.items()))
    places = {name: [p.start, p.rows] for name, p in pieces.items() if p.local.ndim and len(p.local) < p.rows}
    save_tensors({name: p.local for name, p in pieces.items()}, path, {"pieces": json.dumps(places)})


class Stored:
    """The tensors of a folder whose files are named GROUP-RANK.safetensors."""

    def __init__(self, folder: Path) -> None:
        self._parts: dict[str, dict[str, list[tuple[int, Any]]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            # Mapped, not read: only what is asked for is.
            file = safe_open(path, "pt")
            places = json.loads(file.metadata()["pieces"])
            group = self._parts.setdefault(path.stem.partition("-")[0], {})
            for name in file.keys():
                group.setdefault(name, []).append((places.get(name, [0])[0], file.get_slice(name)))

    def names(self, group: str) -> list[str]:
        """The names of a group's tensors; none if there is no such group."""
        return list(self._parts.get(group, {}))

    def read(self, group: str, name: str, start: int, n: int) -> Tensor:
        """Rows `start` to `start + n` of a tensor, or all of one that has no dimension."""
        parts = self._parts[group][name]
        if not parts[0][1].get_shape():
            # A copy: what is mapped from a file stands at odd offsets, where kernels round differently.
            return parts[0][1][...].clone()
        found = []
        for first, part in sorted(parts, key=lambda part: part[0]):
            a, b = max(start, first), min(start + n, first + part.get_shape()[0])
            if a < b:
                found.append(part[a - first : b - first])
        return torch.cat(found) if found else parts[0][1][:0].clone()
