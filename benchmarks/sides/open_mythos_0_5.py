"""open-mythos 0.5.0, as published.

Its `main.py` is loaded from the file: importing the package needs transformers, which the model does not use.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.job import Job
from benchmarks.peers import OPEN_MYTHOS, installed
from benchmarks.sides.looped import Looped

NAME = "open_mythos_0_5"


def package() -> ModuleType:
    """Load the module `open_mythos.main` of 0.5.0, under a name of its own."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, installed(OPEN_MYTHOS) / "open_mythos" / "main.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
    return sys.modules[NAME]


class OpenMythos05(Looped):
    """Weights from the job's seed."""

    def __init__(self, job: Job) -> None:
        torch.manual_seed(job.seed)
        with torch.device(job.device):
            model = construct(job.model)
        super().__init__(model, job.model["vocab_size"])
        self.halt_at(job.halting_loop)
        if job.save:
            # The head is the embedding; the complex rotary tables are no weights and no safetensors type.
            state = {name: x for name, x in model.state_dict().items() if not x.is_complex() and name != "head.weight"}
            save_file(state, job.save)

    def logits(self, ids: Tensor, n_loops: int) -> Tensor:
        return self.model(ids, n_loops=n_loops)

    def loss(self, ids: Tensor, labels: Tensor, job: Job) -> Tensor:
        return F.cross_entropy(self.logits(ids, job.n_loops).flatten(0, 1), labels.flatten())

    def new_cache(self, rows: int, max_len: int, n_loops: int) -> dict[str, Any]:
        return {}

    def feed(self, ids: Tensor, cache: dict[str, Any], start: int, n_loops: int) -> Tensor:
        return self.model(ids, n_loops=n_loops, kv_cache=cache, start_pos=start)[:, -1]

    def copy_cache(self, cache: dict[str, Any]) -> dict[str, Any]:
        return {layer: {name: x.clone() for name, x in layer_cache.items()} for layer, layer_cache in cache.items()}

    def cache_tensors(self, cache: dict[str, Any]) -> list[Tensor]:
        return [x for layer_cache in cache.values() for x in layer_cache.values()]

    def generate(self, ids: Tensor, new_tokens: int, n_loops: int) -> Tensor:
        # It always samples; among one candidate there is nothing to sample.
        return self.model.generate(ids, max_new_tokens=new_tokens, n_loops=n_loops, top_k=1)


def construct(model: dict[str, Any]) -> nn.Module:
    """Make a fresh model on the default device."""
    return package().OpenMythos(package().MythosConfig(**model))


def rope(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine as the model uses them, each (len(positions), dim // 2)."""
    table = package().precompute_rope_freqs(dim, int(positions.max()) + 1, theta)[positions]
    return table.real, table.imag


make = OpenMythos05
