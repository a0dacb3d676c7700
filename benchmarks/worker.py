"""One side of a comparison in a process of its own: `python -m benchmarks.worker`, JSON lines in, JSON lines out.

Requests name an operation and its arguments; the reply is {"answer": ...}, or {"error": ...} if it failed. Nothing
runs between requests, so that an idle worker does not disturb the other.
"""

import contextlib
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from benchmarks.job import Job

SIDES = ("ours", "exits", "trainer", "open_mythos_0_5", "hf", "limits")


def _free_channel() -> IO[str]:
    """The real standard output, for answers alone: what libraries print goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return channel


class Worker:
    """The jobs that this process has prepared, by id."""

    def __init__(self, side: str, threads: int) -> None:
        if side not in SIDES:
            raise ValueError(f"side={side!r} must be one of {', '.join(SIDES)}")
        self.module = importlib.import_module(f"benchmarks.sides.{side}")
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        self.tasks: dict[str, Any] = {}
        self.models: dict[str, Any] = {}
        self.idle_bytes = _reset_peak()

    def hello(self) -> dict[str, Any]:
        """What this process runs on."""
        torch = self.torch
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": gpu,
        }

    def prepare(self, id: str, job: dict[str, Any]) -> dict[str, Any]:
        """Build what the job needs; jobs on the same model share it."""
        from benchmarks.tasks import BUILDS, TASKS

        asked = Job.from_dict(job)
        if asked.task in BUILDS:
            self.tasks[id] = BUILDS[asked.task](self.module.construct, asked)
        elif asked.task not in TASKS:
            self.tasks[id] = self.module.TASKS[asked.task](asked)
        else:
            names = ("model", "load", "checkpoint", "compiled", "seed")
            key = json.dumps([*(job[name] for name in names), asked.halting_loop])
            if key not in self.models:
                self.models[key] = self.module.make(asked)
            self.tasks[id] = TASKS[asked.task](self.models[key], asked)
        return self.tasks[id].info()

    def call(self, id: str, n: int = 1, warm_up: int = 0) -> dict[str, Any]:
        """Run a task `n` times -> mean seconds of one run, and what the task read off itself."""
        task, spent = self.tasks[id], {}
        for _ in range(warm_up):
            self._time(task)
        for _ in range(n):
            for clock, seconds in self._time(task).items():
                spent[clock] = spent.get(clock, 0.0) + seconds
        return {clock: seconds / n for clock, seconds in spent.items()} | task.reading()

    def _time(self, task: Any) -> dict[str, float]:
        fresh = task.fresh()
        cuda = self.torch.cuda if task.job.device == "cuda" else None
        if cuda:
            start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            cuda.synchronize()
            start.record()
        wall, cpu = time.perf_counter(), time.process_time()
        task.run(fresh)
        if cuda:
            end.record()
            cuda.synchronize()
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        return spent | ({"device": start.elapsed_time(end) / 1e3} if cuda else {})

    def outputs(self, id: str, seed: int, path: str) -> dict[str, Any]:
        """Write what the task computes on the inputs of `seed`, which later calls keep, for the other side's gate."""
        from safetensors.torch import save_file

        save_file(self._outputs(id, seed), path)
        return {}

    def gate(self, id: str, seed: int, path: str, layout: str) -> dict[str, Any]:
        """Compare with what the reference wrote -> the agreement, or why there is none.

        `layout` is the side that wrote it: gradients of 0.5.0 have other names and shapes.
        """
        from safetensors.torch import load_file

        from benchmarks.gate import GRADIENT, LOOPS, Different, compare

        ours, theirs = self._outputs(id, seed), load_file(path)
        gradients = {k.removeprefix(GRADIENT): theirs.pop(k) for k in list(theirs) if k.startswith(GRADIENT)}
        if gradients and layout == "open_mythos_0_5":
            gradients = self.tasks[id].side.regroup(gradients)
        # The head is the embedding, which a state dict names twice and the parameters once.
        theirs |= {GRADIENT + name: x for name, x in gradients.items() if name != "head.weight"}
        if LOOPS not in ours:
            theirs.pop(LOOPS, None)
        try:
            agreement = compare(ours, theirs)
        except Different as different:
            return {"different": str(different)}
        return {"forward": agreement.forward, "gradients": agreement.gradients, "loops": agreement.loops}

    def _outputs(self, id: str, seed: int) -> dict[str, Any]:
        from benchmarks.gate import GRADIENT, LOOPS

        task = self.tasks[id]
        task.draw(seed)
        fresh = task.fresh()
        counter = task.side.count_loops() if task.counts_loops and not task.job.depths else None
        with counter or contextlib.nullcontext():
            outputs = task.run(fresh)
        if counter is not None:
            outputs[LOOPS] = self.torch.tensor(counter.count)
        if task.training:
            outputs |= {GRADIENT + name: x for name, x in task.side.weight_gradients().items()}
        return {name: x.detach().contiguous().cpu() for name, x in outputs.items()}

    def peak(self, id: str) -> dict[str, Any]:
        """Peak bytes above an idle process, after the calls so far; on CUDA the allocator's peak."""
        if self.tasks[id].job.device == "cuda":
            return {"bytes": self.torch.cuda.max_memory_allocated()}
        return {"bytes": _status_bytes("VmHWM") - self.idle_bytes}

    def read(self, what: str, job: dict[str, Any]) -> dict[str, Any]:
        """A figure that is no time: one of `benchmarks.readings`."""
        from benchmarks.readings import READINGS

        return READINGS[what](self.module, Job.from_dict(job))


def _status_bytes(field: str) -> int:
    """A field of this process's memory status, which Linux gives in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _reset_peak() -> int:
    """Let the peak start from what is resident now, and return that."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def main(side: str, threads: int) -> None:
    """Answer requests until standard input closes."""
    channel = _free_channel()
    failed, worker = "", None
    try:
        worker = Worker(side, threads)
    except Exception as error:
        # Nobody has asked yet: it is the answer to every request.
        failed = _said(error)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        reply: dict[str, Any] = {"error": failed}
        if worker is not None:
            try:
                operation: Callable[..., dict[str, Any]] = getattr(worker, request.pop("do"))
                reply = {"answer": operation(**request)}
            except Exception as error:
                reply = {"error": _said(error)}
        print(json.dumps(reply), file=channel, flush=True)


def _said(error: Exception) -> str:
    """The error in a line; where it happened goes to standard error."""
    traceback.print_exc()
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
