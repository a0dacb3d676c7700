"""Golden files of the families: small models in the published layout, with what the authors' code computes."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from open_mythos import OpenMythos

TOLERANCE = 1e-5


class Golden:
    def __init__(self, source: Path, folder: Path) -> None:
        """`folder`: made anew; it links the files under the names of a published folder."""
        self.folder = folder
        folder.mkdir()
        for path in source.iterdir():
            if path.name not in ("expected.safetensors", "meta.json"):
                published = "model.safetensors" if path.name == "weights.safetensors" else path.name
                (folder / published).write_bytes(path.read_bytes())
        self.meta = json.loads((source / "meta.json").read_text())
        self.expected = load_file(source / "expected.safetensors")
        self.ids = self.expected["input_ids"]
        self.model = OpenMythos.from_pretrained(folder)


def worst(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, over the largest wanted value."""
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def cached(model: OpenMythos, ids: Tensor, cuts: list[int], h0: Tensor | None = None, **call: object) -> Tensor:
    """Logits with a cache, of the pieces that end at `cuts`."""
    cache = model.make_cache(len(ids), ids.shape[1])
    parts, start = [], 0
    for end in cuts:
        first = None if h0 is None else h0[:, start:end]
        parts.append(model(ids[:, start:end], cache=cache, initial_state=first, **call))
        start = end
    return torch.cat(parts, dim=1)
