"""What is timed, the same for every side: a side gives the operations of `Side`, a task composes them.

Shapes: B rows, T tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.job import Job


class Side(ABC):
    """A model of one package, with the operations that tasks need."""

    model: Any
    vocab_size: int

    @abstractmethod
    def logits(self, ids: Tensor, n_loops: int) -> Tensor:
        """(B, T) -> (B, T, V), without a cache."""

    @abstractmethod
    def loss(self, ids: Tensor, labels: Tensor, job: Job) -> Tensor:
        """Mean cross-entropy of a training step's forward pass."""

    @abstractmethod
    def new_cache(self, rows: int, max_len: int, n_loops: int) -> Any:
        """An empty cache."""

    @abstractmethod
    def feed(self, ids: Tensor, cache: Any, start: int, n_loops: int) -> Tensor:
        """Append (B, T) tokens to a cache that holds `start` -> logits of the last position, (B, V)."""

    @abstractmethod
    def copy_cache(self, cache: Any) -> Any:
        """A cache that can be written to without changing `cache`."""

    @abstractmethod
    def generate(self, ids: Tensor, new_tokens: int, n_loops: int) -> Tensor:
        """Greedy: (B, T) -> (B, T + new_tokens)."""

    @abstractmethod
    def cache_tensors(self, cache: Any) -> list[Tensor]:
        """What a cache consists of."""

    def info(self) -> dict[str, Any]:
        """What the report says of the model besides its parameters."""
        return {}

    def weight_gradients(self) -> dict[str, Tensor]:
        """Gradients by parameter name, zeros where there is none."""
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.model.named_parameters()}

    def count_loops(self) -> "LoopCounter | None":
        """A counter of the loops that the next calls run; None for a model without loops."""
        return None


class LoopCounter:
    """How often a module runs while the counter is entered."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.count = module, 0

    def __enter__(self) -> "LoopCounter":
        self._hook = self.module.register_forward_pre_hook(self._called)
        return self

    def _called(self, *_: Any) -> None:
        self.count += 1

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()


class Task(ABC):
    """One thing to time. `fresh` is made anew, untimed, before every `run`."""

    training = False
    counts_loops = True
    """Whether the core's calls are the loops run, so that the gate can compare them; not with a depth for each row."""

    def __init__(self, side: Side, job: Job) -> None:
        self.side, self.job = side, job
        self.draw(0)

    def info(self) -> dict[str, Any]:
        """What the report says of the model."""
        return {"parameters": sum(p.numel() for p in self.side.model.parameters())} | self.side.info()

    def draw(self, seed: int) -> None:
        """Other inputs, from `seed`."""
        self.side.model.train(self.training)
        generator = torch.Generator().manual_seed(1000 * self.job.seed + seed)
        shape = (self.job.rows, self.job.tokens)
        self.ids = torch.randint(self.side.vocab_size, shape, generator=generator).to(self.job.device)
        self.labels = torch.randint(self.side.vocab_size, shape, generator=generator).to(self.job.device)

    def fresh(self) -> Any:
        # Tasks of different modes may share a model.
        self.side.model.train(self.training)

    def reading(self) -> dict[str, Any]:
        """What the last `run` measured itself."""
        return {}

    @abstractmethod
    def run(self, fresh: Any) -> dict[str, Tensor]:
        """The timed work -> what the gate compares."""


class Forward(Task):
    """Logits of every position, without a cache."""

    def run(self, fresh: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": self.side.logits(self.ids, self.job.n_loops)}


class Train(Task):
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
    """The same, one row after the other, each at its own depth: the slow reference of a batch with depths."""

    counts_loops = False

    def run(self, fresh: Any) -> dict[str, Tensor]:
        rows, total = self.job.rows, torch.zeros((), device=self.job.device)
        for i in range(rows):
            row, alone = slice(i, i + 1), replace(self.job, rows=1, depths=self.job.depths[i : i + 1])
            loss = self.side.loss(self.ids[row], self.labels[row], alone) / rows
            loss.backward()
            total += loss.detach()
        return {"loss": total}


class Prefill(Task):
    """A prompt into an empty cache, and the logits of its last position."""

    def run(self, fresh: Any) -> dict[str, Tensor]:
        rows, tokens, n_loops = self.job.rows, self.job.tokens, self.job.n_loops
        with torch.no_grad():
            cache = self.side.new_cache(rows, tokens + self.job.new_tokens, n_loops)
            return {"logits": self.side.feed(self.ids, cache, 0, n_loops)}


class Decode(Task):
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


class Generate(Task):
    """Greedy continuation of a prompt."""

    def run(self, fresh: Any) -> dict[str, Tensor]:
        return {"tokens": self.side.generate(self.ids, self.job.new_tokens, self.job.n_loops)}


TASKS: dict[str, type[Task]] = {
    "forward": Forward,
    "train": Train,
    "train_rows": TrainRows,
    "prefill": Prefill,
    "decode": Decode,
    "generate": Generate,
}


class Build:
    """Construct a model, which is dropped again, untimed: the next side then finds the same free memory."""

    device: str

    def __init__(self, construct: Callable[[dict[str, Any]], nn.Module], job: Job) -> None:
        self.construct, self.job = construct, job
        self.model: nn.Module | None = None

    def info(self) -> dict[str, Any]:
        return {}

    def reading(self) -> dict[str, Any]:
        assert self.model is not None
        parameters = sum(p.numel() for p in self.model.parameters())
        self.model = None
        return {"parameters": parameters}

    def fresh(self) -> None:
        # Of several calls that make one sample.
        self.model = None

    def run(self, fresh: None) -> None:
        if self.device == "cpu":
            self.model = self.construct(self.job.model)
            return
        with torch.device(self.device):
            self.model = self.construct(self.job.model)


class BuildMeta(Build):
    """Without memory: what a large model costs to describe."""

    device = "meta"


class BuildCpu(Build):
    """With weights, on the CPU."""

    device = "cpu"


BUILDS: dict[str, type[Build]] = {"build": BuildCpu, "build_meta": BuildMeta}
