"""The machine itself: how fast it multiplies matrices of given shapes, and how fast it streams memory.

The limit of a shape is the best of two library kernels: MKL's, which `F.linear` calls, and oneDNN's, which torch
reaches through an operator of its own; which of them is ahead depends on the processor's maker.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tasks import Task, clocked

Kernel = Callable[[Tensor, Tensor], Tensor]


def kernels(device: str) -> dict[str, Kernel]:
    """Return the matrix products of this build of torch, by name."""
    found: dict[str, Kernel] = {"F.linear": F.linear}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise.default
        found["oneDNN"] = lambda x, weight: onednn(x, weight, None, "none", [], "")
    return found


class Limit(Task):
    """A measurement of the machine, without a model."""

    whole = True

    def seconds(self, work: Callable[[], Any]) -> float:
        """Time one call on the clock that ratios are taken on."""
        seconds = clocked(work, self.job.device)
        return seconds.get("device", seconds["cpu" if torch.get_num_threads() == 1 else "wall"])


class MatrixProducts(Limit):
    """FLOP/s of each shape in `arguments`, by the kernel that was fastest when the task was prepared."""

    def setup(self) -> None:
        job = self.job
        self.dtype = getattr(torch, job.arguments.get("dtype", "float32"))
        self.shapes = [tuple(shape) for shape in job.arguments["shapes"]]
        self.operands = {
            (m, k, n): tuple(torch.randn(size).to(job.device, self.dtype) for size in ((m, k), (n, k)))
            for m, k, n in self.shapes
        }
        available, self.rates, self.best = kernels(job.device), list[dict[str, float]](), list[Kernel]()
        for shape in self.shapes:
            rates = {}
            for name, kernel in available.items():
                # oneDNN has no product of a dtype that the processor, or the environment, does not allow.
                with contextlib.suppress(RuntimeError):
                    rates[name] = self.rate(kernel, shape, 3)
            if not rates:
                raise RuntimeError(f"no library multiplies {shape} in {self.dtype}; leave the dtype out")
            self.rates.append(rates)
            self.best.append(available[max(rates, key=lambda name: rates[name])])

    def info(self) -> dict[str, Any]:
        return {"rates": self.rates}

    def rate(self, kernel: Kernel, shape: tuple[int, int, int], repeats: int) -> float:
        """Return the best FLOP/s of some repeats; each repeats small products, which the clock could not time."""
        x, weight = self.operands[shape]
        work = 2 * math.prod(shape)
        inner = min(200, max(1, round(1e8 / work)))

        def repeat() -> None:
            for _ in range(inner):
                kernel(x, weight)

        with torch.no_grad():
            repeat()
            return inner * work / min(self.seconds(repeat) for _ in range(repeats))

    def run(self, fresh: None) -> None:
        self.measured = {"rates": [self.rate(best, s, 2) for best, s in zip(self.best, self.shapes, strict=True)]}


class Stream(Limit):
    """Bytes per second through main memory: read alone (a matrix times a vector), and read plus written (a copy)."""

    def setup(self) -> None:
        # 512 MiB: far above any cache.
        self.matrix = torch.ones(2**13, 2**14, device=self.job.device)
        self.vector = torch.ones(2**14, device=self.job.device)
        self.target = torch.empty_like(self.matrix)

    def run(self, fresh: None) -> None:
        n = self.matrix.nbytes
        # The first one only loads the library.
        read = min(self.seconds(lambda: F.linear(self.vector, self.matrix)) for _ in range(3))
        summed = min(self.seconds(lambda: self.matrix.sum()) for _ in range(2))
        copy = min(self.seconds(lambda: self.target.copy_(self.matrix)) for _ in range(3))
        self.measured = {"read": n / min(read, summed), "copy": 2 * n / copy}


TASKS: dict[str, type[Task]] = {"products": MatrixProducts, "stream": Stream}
