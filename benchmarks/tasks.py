"""What is timed, the same for every side: a side gives the operations of `Side`, a task composes them.

Shapes: B rows, T tokens, V vocabulary.
"""

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.job import Job


class Side:
    """A model of one package. A side defines these operations, on rows of tokens (B, T):

    - `logits(ids, n_loops)` -> (B, T, V), without a cache; `loss(ids, labels, job)`, the mean cross-entropy of a step.
    - `new_cache(rows, max_len, n_loops)`; `copy_cache(cache)`, which may be written to; `cache_tensors(cache)`.
    - `feed(ids, cache, start, n_loops)`: append to a cache of `start` tokens -> logits of the last position, (B, V).
    - `generate(ids, new_tokens, n_loops)`: continue greedily -> (B, T + new_tokens).
    """

    model: Any
    vocab_size: int

    def info(self) -> dict[str, Any]:
        """Return what the report says of the model besides its parameters."""
        return {}

    def weight_gradients(self) -> dict[str, Tensor]:
        """Return gradients by parameter name, zeros where there is none."""
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.model.named_parameters()}

    def loop_module(self) -> nn.Module | None:
        """Return the module that runs once in each loop; None for a model without loops."""
        return None


@contextlib.contextmanager
def counted(module: nn.Module) -> Generator[list[int]]:
    """Add to the list that this yields whenever the module runs."""
    calls: list[int] = []
    hook = module.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def clocked(work: Callable[[], Any], device: str) -> dict[str, float]:
    """Call `work` -> seconds by clock."""
    cuda = torch.cuda if device == "cuda" else None
    if cuda:
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda.synchronize()
        start.record()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if cuda:
        end.record()
        cuda.synchronize()
    spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return spent | ({"device": start.elapsed_time(end) / 1e3} if cuda else {})


class Task:
    """One thing to time. `fresh` is made anew, untimed, before every `run`."""

    training = False
    whole = False
    """Whether one call is a sample, however short: for tasks that repeat inside the call."""
    counts_loops = False
    """Whether the core's calls are the loops run, so that the gate can compare them."""

    def __init__(self, job: Job, module: Any = None) -> None:
        self.job, self.module = job, module
        self.measured: dict[Any, Any] = {}
        """What the last run measured itself."""
        self.setup()

    def setup(self) -> None:
        """Build what the task needs."""

    def info(self) -> dict[str, Any]:
        """Return what the report says of the model."""
        return {}

    def draw(self, seed: int) -> None:
        """Draw other inputs, from `seed`."""

    def fresh(self) -> Any:
        """Make what a run uses up."""

    def run(self, fresh: Any) -> Any:
        """Do the timed work -> what the gate compares, tensors by name."""

    def time(self) -> dict[str, float]:
        """Run once -> seconds by clock."""
        fresh = self.fresh()
        return clocked(lambda: self.run(fresh), self.job.device)


class ModelTask(Task):
    """A task on the model of a side."""

    counts_loops = True

    def __init__(self, job: Job, module: Any, side: Any) -> None:
        self.side = side
        super().__init__(job, module)

    def setup(self) -> None:
        self.draw(0)

    def info(self) -> dict[str, Any]:
        return {"parameters": sum(p.numel() for p in self.side.model.parameters())} | self.side.info()

    def draw(self, seed: int) -> None:
        self.side.model.train(self.training)
        generator = torch.Generator().manual_seed(1000 * self.job.seed + seed)
        shape = (2, self.job.rows, self.job.tokens)
        self.ids, self.labels = torch.randint(self.side.vocab_size, shape, generator=generator).to(self.job.device)

    def fresh(self) -> Any:
        # Tasks of different modes may share a model.
        self.side.model.train(self.training)


class Forward(ModelTask):
    """Logits of every position, without a cache."""

    def run(self, fresh: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": self.side.logits(self.ids, self.job.n_loops)}


class Train(ModelTask):
    """Forward, cross-entropy and backward. The optimizer, the same on both sides, is left out."""

    training = True

    def fresh(self) -> None:
        super().fresh()
        self.side.model.zero_grad(set_to_none=True)

    def run(self, fresh: Any) -> dict[str, Tensor]:
        loss = self.side.loss(self.ids, self.labels, self.job)
        loss.backward()
        return {"loss": loss.detach()}


class TrainRows(Train):
    """One row after the other, each at its own depth: the slow reference of a training step with depths."""

    counts_loops = False

    def run(self, fresh: Any) -> dict[str, Tensor]:
        rows, total = self.job.rows, torch.zeros((), device=self.job.device)
        for i in range(rows):
            row, alone = slice(i, i + 1), replace(self.job, rows=1, depths=self.job.depths[i : i + 1])
            loss = self.side.loss(self.ids[row], self.labels[row], alone) / rows
            loss.backward()
            total += loss.detach()
        return {"loss": total}


class Prefill(ModelTask):
    """A prompt into an empty cache, and the logits of its last position."""

    def run(self, fresh: Any) -> dict[str, Tensor]:
        rows, tokens, n_loops = self.job.rows, self.job.tokens, self.job.n_loops
        with torch.no_grad():
            cache = self.side.new_cache(rows, tokens + self.job.new_tokens, n_loops)
            return {"logits": self.side.feed(self.ids, cache, 0, n_loops)}


class Decode(ModelTask):
    """One token, with a cache of `tokens` before it."""

    def draw(self, seed: int) -> None:
        super().draw(seed)
        with torch.no_grad():
            self.cache = self.side.new_cache(self.job.rows, self.job.tokens + 1, self.job.n_loops)
            self.side.feed(self.ids, self.cache, 0, self.job.n_loops)

    def fresh(self) -> Any:
        super().fresh()
        return self.side.copy_cache(self.cache)

    def run(self, fresh: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": self.side.feed(self.labels[:, :1], fresh, self.job.tokens, self.job.n_loops)}


class Generate(ModelTask):
    """Greedy continuation of a prompt."""

    def run(self, fresh: Any) -> dict[str, Tensor]:
        return {"tokens": self.side.generate(self.ids, self.job.new_tokens, self.job.n_loops)}


class CacheBytes(ModelTask):
    """Bytes of a cache after a prompt of `tokens` and `new_tokens` decoded ones, unused room included; nothing runs."""

    def info(self) -> dict[str, Any]:
        job, side = self.job, self.side
        total = job.tokens + job.new_tokens
        cache = side.new_cache(job.rows, total, job.n_loops)
        ids = torch.zeros(job.rows, total, dtype=torch.int64, device=job.device)
        with torch.no_grad():
            for start, end in ((0, job.tokens), *((at, at + 1) for at in range(job.tokens, total))):
                side.feed(ids[:, start:end], cache, start, job.n_loops)
        # Storages, not tensors: a view keeps the whole of what it is a part of.
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in side.cache_tensors(cache)}
        n_bytes = sum(storages.values())
        return {"bytes": n_bytes, "bytes_per_token": n_bytes / (job.rows * total)}


class Rope(Task):
    """The cost of a long context before it is used, and how exact its rotary angles are; nothing runs."""

    def info(self) -> dict[str, Any]:
        names = ("max_seq_len", "qk_rope_head_dim", "rope_theta")
        longest, width, theta = (self.job.model[name] for name in names)
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        positions, worst = torch.arange(longest), 0.0
        cos, sin = self.module.rope(positions, width, theta)
        # In parts: the float64 angles of all positions take gigabytes.
        for at in positions.split(2**17):
            angle = at.double()[:, None] * frequency
            worst = max(worst, (cos[at] - angle.cos()).abs().max().item(), (sin[at] - angle.sin()).abs().max().item())
        return {"bytes": (self._bytes(longest) - self._bytes(1)) * longest / (longest - 1), "error": worst}

    def _bytes(self, max_seq_len: int) -> int:
        """Return the bytes of parameters and buffers of a model for so many tokens."""
        with torch.device("meta"):
            model = self.module.construct({**self.job.model, "max_seq_len": max_seq_len})
        return sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


class Build(Task):
    """Construct a model, which is dropped again, untimed: the next side then finds the same free memory."""

    model: nn.Module | None = None

    def fresh(self) -> None:
        # Untimed, also between several calls that make one sample.
        self.model = None

    def run(self, fresh: None) -> None:
        # A device mode slows construction, so there is none for the default device.
        with torch.device(self.job.device) if self.job.device != "cpu" else contextlib.nullcontext():
            self.model = self.module.construct(self.job.model)

    def time(self) -> dict[str, float]:
        seconds = super().time()
        assert self.model is not None
        self.measured = {"parameters": sum(p.numel() for p in self.model.parameters())}
        self.model = None
        return seconds


TASKS: dict[str, type[Task]] = {
    "forward": Forward, "train": Train, "train_rows": TrainRows, "prefill": Prefill, "decode": Decode,
    "generate": Generate, "cache_bytes": CacheBytes, "rope": Rope, "build": Build,
}  # fmt: skip
