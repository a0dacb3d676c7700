"""The machine that the figures were measured on: processor, software, load, and its limits without any model."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from benchmarks.harness import Bench
from benchmarks.job import Job

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
SQUARES = ((1024, 1024, 1024), (2048, 2048, 2048))
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Settings of the libraries in the environment; workers inherit them, and they decide what a figure means."""


def describe() -> dict[str, Any]:
    """Describe the processor and the environment, without starting anything."""
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in (_cpuinfo("flags") or "").split()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def file_name(cpu: str) -> str:
    """Name the results of a processor: AMD EPYC -> amd-epyc."""
    return re.sub(r"[^a-z0-9]+", "-", cpu.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def load() -> float:
    """Return the mean number of running processes over the last minute."""
    return os.getloadavg()[0]


def limits(bench: Bench) -> dict[str, Any]:
    """Measure the best matrix products, in float32 and bf16, and the memory streams."""
    device = bench.settings.device
    bench.tell("limits of the machine", 0, 1)
    with bench.workers("limits") as [worker]:
        found: dict[str, Any] = {"worker": worker.ask("hello"), "products": {}}
        for dtype in ("float32", "bfloat16"):
            job = Job("products", device=device, arguments={"shapes": SQUARES, "dtype": dtype})
            found["products"][dtype] = worker.prepare(dtype, job)["rates"]
        worker.prepare("stream", Job("stream", device=device))
        stream = worker.ask("call", id="stream")["reading"]
        found["stream"] = {name: stream[name] for name in ("read", "copy")}
    return found


def _cpuinfo(name: str) -> str | None:
    """Return the first value of a line of /proc/cpuinfo, or None where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split("\t")[0] == name), None)
