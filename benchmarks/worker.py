"""One side of a comparison in a process of its own: `python -m benchmarks.worker SIDE THREADS CONNECTION`.

A request names a method of `Worker` and its arguments. Nothing runs between requests, so that an idle worker does not
disturb the other.
"""

import contextlib
import gc
import importlib
import json
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.job import Job

SIDES = ("ours", "exits", "trainer", "engine", "clients", "open_mythos_0_5", "hf", "limits")


class Worker:
    """The jobs that this process has prepared, by id."""

    def __init__(self, side: str, threads: int) -> None:
        name, _, checkout = side.partition("@")
        if name not in SIDES:
            raise ValueError(f"side={name!r} must be one of {', '.join(SIDES)}")
        if checkout:
            sys.path.insert(0, checkout)
        self.module = importlib.import_module(f"benchmarks.sides.{name}")
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        self.tasks: dict[str, Any] = {}
        self.models: dict[str, Any] = {}
        # The peak starts from what is resident now.
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self.idle_bytes = _status_bytes("VmRSS")

    def hello(self) -> dict[str, Any]:
        """Describe what this process runs on."""
        torch = self.torch
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        }

    def prepare(self, id: str, job: Job) -> dict[str, Any]:
        """Build what the job needs; jobs on the same model share it."""
        from benchmarks.tasks import TASKS, ModelTask

        task, model = {**TASKS, **getattr(self.module, "TASKS", {})}[job.task], []
        if issubclass(task, ModelTask):
            key = json.dumps([job.model, job.load, job.checkpoint, job.compiled, job.seed, job.halting_loop])
            if key not in self.models:
                self.models[key] = self.module.make(job)
            model = [self.models[key]]
        self.tasks[id] = task(job, self.module, *model)
        return self.tasks[id].info()

    def call(self, id: str, n: int = 1, warm_up: int = 0) -> dict[str, Any]:
        """Run a task `n` times -> mean seconds of one run by clock, and what the task measured itself."""
        task, spent = self.tasks[id], {}
        for i in range(warm_up + n):
            for clock, seconds in task.time().items():
                spent[clock] = spent.get(clock, 0.0) + seconds * (i >= warm_up)
        mean = {clock: seconds / n for clock, seconds in spent.items()}
        return {"seconds": mean, "reading": task.measured, "whole": task.whole}

    def method(self, id: str, name: str, **arguments: Any) -> Any:
        """Call a method of a task that only its side has."""
        return getattr(self.tasks[id], name)(**arguments)

    def outputs(self, id: str, seed: int) -> dict[str, np.ndarray]:
        """Return what the task computes on the inputs of `seed`, which later calls use, for the other side's gate."""
        return {name: x.numpy() for name, x in self._outputs(id, seed).items()}

    def gate(self, id: str, seed: int, reference: dict[str, np.ndarray], layout: str) -> dict[str, Any]:
        """Compare with the outputs of the reference -> the agreement, or why there is none.

        `layout` is the side that computed it: gradients of 0.5.0 have other names and shapes.
        """
        from benchmarks.gate import GRADIENT, LOOPS, Different, compare

        ours, theirs = self._outputs(id, seed), {name: self.torch.from_numpy(x) for name, x in reference.items()}
        gradients = {k.removeprefix(GRADIENT): theirs.pop(k) for k in list(theirs) if k.startswith(GRADIENT)}
        if gradients and layout == "open_mythos_0_5":
            gradients = self.tasks[id].side.regroup(gradients)
        # The head is the embedding, which a state dict names twice and the parameters once.
        theirs |= {GRADIENT + name: x for name, x in gradients.items() if name != "head.weight"}
        if LOOPS not in ours:
            theirs.pop(LOOPS, None)
        try:
            return vars(compare(ours, theirs))
        except Different as different:
            return {"different": str(different)}

    def _outputs(self, id: str, seed: int) -> dict[str, Any]:
        from benchmarks.gate import GRADIENT, LOOPS
        from benchmarks.tasks import counted

        task = self.tasks[id]
        task.draw(seed)
        fresh = task.fresh()
        module = task.side.loop_module() if task.counts_loops and not task.job.depths else None
        with counted(module) if module else contextlib.nullcontext() as calls:
            outputs = task.run(fresh)
        if calls is not None:
            outputs[LOOPS] = self.torch.tensor(len(calls))
        if task.training:
            outputs |= {GRADIENT + name: x for name, x in task.side.weight_gradients().items()}
        return {name: x.detach().contiguous().cpu() for name, x in outputs.items()}

    def peak(self, id: str) -> dict[str, Any]:
        """Return the peak bytes above an idle process, after the calls so far; on CUDA the allocator's peak."""
        if self.tasks[id].job.device == "cuda":
            return {"bytes": self.torch.cuda.max_memory_allocated()}
        return {"bytes": _status_bytes("VmHWM") - self.idle_bytes}


def _status_bytes(field: str) -> int:
    """Return a field of this process's memory status, which Linux gives in KiB."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) * 1024


def main(side: str, threads: int, connection: Connection) -> None:
    """Answer requests until the coordinator closes the connection, with (failed, answer or error).

    A worker that cannot start fails at every request; where an error happened goes to standard error.
    """
    worker: Worker | None = None
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = connection.recv()
            try:
                worker = worker or Worker(side, threads)
                answer = (False, getattr(worker, method)(**arguments))
            except Exception as error:
                traceback.print_exc()
                answer = (True, f"{type(error).__name__}: {error}")
            connection.send(answer)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Connection(int(sys.argv[3])))
