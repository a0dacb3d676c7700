"""This package, of any checkout."""

import copy
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.job import Job
from benchmarks.sides import first_of
from benchmarks.sides.looped import Looped
from open_mythos import KVCache, LoopPlan, MythosConfig, OpenMythos, convert_open_mythos_0_5
from open_mythos.device import keep_freed_memory
from open_mythos.nn.rope import rotary_table
from open_mythos.nn.static_cache import StaticKVCache
from open_mythos.train.losses import LossConfig, total_loss

compile_model = first_of("open_mythos.compile:compile_model", "open_mythos.compiling:compile_model")


class Ours(Looped):
    """Weights converted from a file of 0.5.0, or from the job's seed."""

    def __init__(self, job: Job) -> None:
        if job.device == "cpu":
            keep_freed_memory()  # as every command of the package does
        torch.manual_seed(job.seed)
        with torch.device(job.device):
            model = construct(job.model)
        if job.load:
            model.load_state_dict(convert_open_mythos_0_5(load_file(job.load), model.cfg))
        super().__init__(model, model.cfg.vocab_size)
        self.cfg = model.cfg
        self.halt_at(job.halting_loop)
        if model.recurrent is not None:
            model.recurrent.checkpoint_loops = job.checkpoint
        self.compiled = job.compiled
        scope = "decode" if job.task in ("decode", "generate") else "model"
        self.called = compile_model(model, scope) if job.compiled else model
        self.static: tuple[KVCache, StaticKVCache] | None = None
        """A cache, and the static cache made from it."""
        self.countable = not (job.compiled or job.checkpoint)

    def logits(self, ids: Tensor, n_loops: int) -> Tensor:
        return self.called(ids, n_loops=n_loops)

    def loss(self, ids: Tensor, labels: Tensor, job: Job) -> Tensor:
        out = self.called(ids, plan=LoopPlan(job.depths or (job.n_loops,) * job.rows))
        return total_loss(out, labels, LossConfig())[0]

    def new_cache(self, rows: int, max_len: int, n_loops: int) -> Any:
        return self.model.make_cache(rows, max_len, n_loops)

    def feed(self, ids: Tensor, cache: Any, start: int, n_loops: int) -> Tensor:
        return self.called(ids, cache=cache, n_loops=n_loops, last_only=True)[:, -1]

    def copy_cache(self, cache: Any) -> Any:
        if not self.compiled:
            return copy.deepcopy(cache)
        if self.static is None or self.static[0] is not cache:
            self.static = cache, StaticKVCache.over(copy.deepcopy(cache))
        # The same cache again, as in the middle of a text: work done once for each cache is not part of a token.
        self.static[1].rewind(cache.length)
        return self.static[1]

    def cache_tensors(self, cache: Any) -> list[Tensor]:
        return [x for layer in cache.layers for x in layer]

    def generate(self, ids: Tensor, new_tokens: int, n_loops: int) -> Tensor:
        return self.model.generate(ids, new_tokens, n_loops, temperature=0, compiled=self.compiled)

    def loop_module(self) -> nn.Module | None:
        # A hook makes a model compile again, and counts recomputed loops twice; the outputs have to do then.
        return super().loop_module() if self.countable else None

    def regroup(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put gradients of 0.5.0 under our names: what regroups weights regroups their gradients."""
        return convert_open_mythos_0_5(gradients, self.cfg)


def construct(model: dict[str, Any]) -> OpenMythos:
    """Make a fresh model on the default device."""
    return OpenMythos(MythosConfig(**model))


def rope(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine as the model uses them, each (len(positions), dim // 2)."""
    return rotary_table(positions, dim, theta, torch.float32)[:2]


make = Ours
