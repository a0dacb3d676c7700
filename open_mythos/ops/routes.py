"""Which of torch's two libraries for float32 products is faster on this machine: measured once, and kept on disk.

MKL leaves AVX-512 unused on AMD (105 against oneDNN's 242 GFLOP/s on one core of a Zen 5) and is ahead almost always on
Intel (39 against 245 microseconds for one row), so no constant fits both. The table is a file in the user's cache
folder, one for each processor, version of torch and number of threads. It is never changed once it is there, so that
runs stay reproducible; delete it to measure again.
"""

import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from bisect import bisect
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

ROWS = (1, 4, 16, 64, 512)
"""Rows of x that are measured."""
ROW_BOUNDS = (2, 8, 32, 128)
"""Least rows of every class but the first."""
WEIGHTS = ((256, 256), (512, 1024), (1024, 2048))
"""Weights that are measured: they fit the first cache, the second, and neither."""
SIZE_BOUNDS = (2**17, 2**20)
"""Least values of a weight of every class but the first."""
MARGIN = 0.9
"""Share of plain torch's time that oneDNN may take at most to be chosen."""
REPEATS = 5

HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
"""True where oneDNN is worth measuring."""

Table = list[list[bool]]
"""True where oneDNN is chosen, by class of weight and class of rows."""

log = logging.getLogger(__name__)


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x @ weight^T by oneDNN, without a gradient."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


@torch.compiler.assume_constant_result
def prefers_onednn(n_rows: int, weight_values: int) -> bool:
    """Return whether float32 products of so many rows with a weight of so many values go to oneDNN."""
    return HAS_ONEDNN and table(torch.get_num_threads())[bisect(SIZE_BOUNDS, weight_values)][bisect(ROW_BOUNDS, n_rows)]


@functools.cache
def table(n_threads: int) -> Table:
    """Return this machine's table; the first process measures it. All false, plain torch, if it cannot be stored."""
    path = _folder() / f"{_name(n_threads)}.json"
    if (known := _read(path)) is not None:
        return known
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial") as file:
            json.dump({"machine": _machine(n_threads), "onednn": measure()}, file)
            file.flush()
            path.unlink(missing_ok=True)  # a damaged one
            # Unlike a rename, a link never replaces the table of a process that was faster.
            with suppress(FileExistsError):
                os.link(file.name, path)
    except OSError as error:
        log.warning("%s cannot be written (%s), so products use torch's own choice of library", path, error.strerror)
    return _read(path) or [[False] * len(ROWS) for _ in WEIGHTS]


def measure() -> Table:
    """Time both libraries on every class of product, in about half a second."""
    with torch.inference_mode(), _disable_current_modes(), torch.autocast("cpu", enabled=False):
        return [[_is_faster(n_rows, shape) for n_rows in ROWS] for shape in WEIGHTS]


def _is_faster(n_rows: int, shape: tuple[int, int]) -> bool:
    weight = torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)
    x = torch.linspace(-1, 1, n_rows * shape[1]).view(n_rows, -1)
    # Enough calls to last longer than the clock's steps, and the best of a few: other processes only ever add time.
    n_calls = max(1, 2**23 // (n_rows * weight.numel()))
    best = {F.linear: float("inf"), onednn: float("inf")}
    for _ in range(REPEATS):
        for product in best:
            start = time.perf_counter()
            for _ in range(n_calls):
                product(x, weight)
            best[product] = min(best[product], time.perf_counter() - start)
    return best[onednn] < MARGIN * best[F.linear]


def _read(path: Path) -> Table | None:
    """Return a stored table, or None if there is none that is whole."""
    try:
        found = json.loads(path.read_text())["onednn"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rows = found if isinstance(found, list) and len(found) == len(WEIGHTS) else [[]]
    whole = all(isinstance(row, list) and list(map(type, row)) == [bool] * len(ROWS) for row in rows)
    return found if whole else None


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open_mythos"


def _name(n_threads: int) -> str:
    return "products-" + hashlib.sha256(_machine(n_threads).encode()).hexdigest()[:16]


def _machine(n_threads: int) -> str:
    """Describe what the table depends on."""
    try:
        # A virtual machine's name of a processor may say little; its family, model and stepping say which it is.
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        cpu = " ".join(facts.get(name, "?") for name in ("model name", "cpu family", "model", "stepping"))
    except OSError:
        cpu = platform.processor()
    return f"{cpu}, torch {torch.__version__}, {n_threads} threads"
