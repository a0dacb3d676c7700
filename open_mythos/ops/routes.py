"""What is faster on this machine, measured once and kept on disk: the library for float32 products, and bfloat16.

MKL leaves AVX-512 unused on AMD (105 against oneDNN's 242 GFLOP/s on one core of a Zen 5) and is ahead almost always on
Intel (39 against 245 microseconds for one row), so no constant fits both. What was measured is a file in the user's
cache folder, for each processor, version of torch and number of threads. It is never changed once it is there, so that
runs stay reproducible; delete it to measure again.
"""

import errno
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import math
import operator
import os
import platform
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
REPEATS = 3
LEAST_GAIN = 1.3
"""Speed of bfloat16 over float32 from which it is chosen."""
LARGEST = 2**20
"""Values of a weight that are measured at most."""

HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
"""True where oneDNN is worth measuring."""

Table = list[list[bool]]
"""True where oneDNN is chosen, by class of weight and class of rows."""
Shapes = tuple[tuple[tuple[int, int], int], ...]
"""(outputs, inputs) of a model's matrices, and how many of each there are."""

log = logging.getLogger(__name__)


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x @ weight^T by oneDNN, without a gradient."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def prefers_onednn(n_rows: int, weight_values: int) -> bool:
    """Return whether float32 products of so many rows with a weight of so many values go to oneDNN."""
    return HAS_ONEDNN and table(torch.get_num_threads())[bisect(SIZE_BOUNDS, weight_values)][bisect(ROW_BOUNDS, n_rows)]


@functools.cache
def table(n_threads: int) -> Table:
    """Return this machine's table; the first process measures it. All false, plain torch, if it cannot be stored."""
    found = _stored("products", n_threads, measure, _is_table)
    return [[False] * len(ROWS) for _ in WEIGHTS] if found is None else found


# A compiler calls it and takes the result as a constant. `torch.compiler.assume_constant_result` does the same, but
# imports the whole compiler.
prefers_onednn._dynamo_marked_constant = True  # ty: ignore[missing-attribute]


def faster_dtype(weights: Iterable[Tensor], device: torch.device) -> torch.dtype:
    """Return bfloat16 where it computes a model's products clearly faster than float32, else float32.

    On a CPU the model's own matrices are measured, at the rows of a decode step and of a prompt. Without a large one
    nothing is measured: calling the operations then takes longer than they do.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type != "cpu":
        return torch.float32
    shapes = shapes_of(weights)
    has_large = any(n * k >= SIZE_BOUNDS[0] for (n, k), _ in shapes)
    gain = bfloat16_gain(shapes) if has_large else 1.0
    return torch.bfloat16 if gain >= LEAST_GAIN else torch.float32


def shapes_of(weights: Iterable[Tensor]) -> Shapes:
    """Count the matrices by shape. A slice of a large one stands for all of it."""
    counts = Counter((min(x.shape[-2], max(1, LARGEST // x.shape[-1])), x.shape[-1]) for x in weights if x.ndim > 1)
    return tuple(sorted(counts.items()))


@functools.cache
def bfloat16_gain(shapes: Shapes, rows: tuple[int, ...] = (1, 8, 64)) -> float:
    """Return how many times as fast products of these shapes are in bfloat16 as in float32, on this CPU.

    Args:
        rows: numbers of rows that count alike; the result is the geometric mean over them.
    """

    def measure_gain() -> float:
        with _undisturbed():
            return math.prod(_gain(shapes, n) for n in rows) ** (1 / len(rows))

    return stored_gain(f"bfloat16 {shapes} {rows}", measure_gain)


def stored_gain(subject: str, measure: Callable[[], float]) -> float:
    """Return a ratio of speeds that was measured before, or measure and store it; 1.0 if it cannot be stored."""
    found = _stored(subject, torch.get_num_threads(), measure, _is_ratio)
    return 1.0 if found is None else found


@functools.cache
def transposed_gain(n_threads: int) -> float:
    """Return how many times as fast products of a few rows are with float32 weights that are stored transposed.

    MKL then takes another kernel: on an Intel Xeon with AMX 4 rows of 1024 x 512 take 98 microseconds, not 206.
    """

    def measure_gain() -> float:
        seconds = [0.0, 0.0]
        with _undisturbed():
            for n_rows, shape in itertools.product(ROWS[1:3], WEIGHTS[1:]):
                x, weight = _operands(n_rows, shape, torch.float32)
                ways = [functools.partial(_product, x, w) for w in (weight, stored_transposed(weight))]
                seconds = list(map(operator.add, seconds, _best(n_rows * weight.numel(), ways)))
        return seconds[0] / seconds[1]

    found = _stored("transposed", n_threads, measure_gain, _is_ratio)
    return 1.0 if found is None else found


def stored_transposed(weight: Tensor) -> Tensor:
    """Return the same matrix or matrices, (..., N, K), with all N outputs of an input side by side in memory."""
    return weight.mT.contiguous().mT


def measure() -> Table:
    """Time both libraries on every class of product, in about half a second."""
    with _undisturbed():
        return [[_is_faster(n_rows, shape) for n_rows in ROWS] for shape in WEIGHTS]


@contextmanager
def _undisturbed() -> Generator[None]:
    """Measure without gradients, autocast and whatever watches the operations of the caller."""
    with torch.inference_mode(), _disable_current_modes(), torch.autocast("cpu", enabled=False):
        yield


def _is_faster(n_rows: int, shape: tuple[int, int]) -> bool:
    x, weight = _operands(n_rows, shape, torch.float32)
    plain, one = _best(n_rows * weight.numel(), [lambda: F.linear(x, weight), lambda: onednn(x, weight)])
    return one < MARGIN * plain


def _gain(shapes: Shapes, n_rows: int) -> float:
    total = [0.0, 0.0]
    for shape, count in shapes:
        pairs = [_operands(n_rows, shape, dtype) for dtype in (torch.float32, torch.bfloat16)]
        best = _best(n_rows * shape[0] * shape[1], [functools.partial(_product, *pair) for pair in pairs])
        total = [seconds + count * more for seconds, more in zip(total, best, strict=True)]
    return total[0] / total[1]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x @ weight^T by the library that float32 products of this shape take."""
    is_plain = x.dtype is torch.float32 and weight.is_contiguous()
    return (onednn if is_plain and prefers_onednn(len(x), weight.numel()) else F.linear)(x, weight)


def _operands(n_rows: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)
    return torch.linspace(-1, 1, n_rows * shape[1]).view(n_rows, -1).to(dtype), weight.to(dtype)


def _best(multiplications: int, ways: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Return the seconds of each way, tried in turns."""
    # Enough calls to last longer than the clock's steps, and the best of a few: other processes only ever add time.
    n_calls = max(1, 2**23 // multiplications)
    best = [math.inf] * len(ways)
    for _ in range(REPEATS):
        for i, way in enumerate(ways):
            start = time.perf_counter()
            for _ in range(n_calls):
                way()
            best[i] = min(best[i], (time.perf_counter() - start) / n_calls)
    return best


def cache_folder() -> Path:
    """Return the folder of the measurements. Raises OSError for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open_mythos"
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "the user has no home folder; set XDG_CACHE_HOME") from None


def _stored(subject: str, n_threads: int, measure: Callable[[], Any], is_whole: Callable[[Any], bool]) -> Any:
    """Return what was measured before, or measure it and store it; None if it cannot be stored."""
    machine = f"{processor()}, torch {torch.__version__}, {n_threads} threads"
    name = hashlib.sha256(f"{subject}, {machine}".encode()).hexdigest()[:16]
    try:
        path = cache_folder() / f"{name}.json"
        if (known := _read(path, is_whole)) is not None:
            return known
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            # One process at a time: two would disturb each other's clock, and then use different results.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _read(path, is_whole) is None:
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps({"machine": machine, "subject": subject, "measured": measure()}))
                os.replace(partial, path)
    except OSError as error:
        log.warning("what is faster here cannot be stored (%s), so torch's own choices are taken", error.strerror)
        return None
    return _read(path, is_whole)


def _read(path: Path, is_whole: Callable[[Any], bool]) -> Any:
    """Return the measurement of a file, or None if there is none that is whole."""
    try:
        found = json.loads(path.read_text())["measured"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if is_whole(found) else None


def _is_table(value: Any) -> bool:
    rows = value if isinstance(value, list) and len(value) == len(WEIGHTS) else [[]]
    return all(isinstance(row, list) and list(map(type, row)) == [bool] * len(ROWS) for row in rows)


def _is_ratio(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < math.inf


def processor() -> str:
    """Name the processor. A virtual machine's name may say little; family, model and stepping say which it is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return " ".join(facts.get(name, "?") for name in ("model name", "cpu family", "model", "stepping"))
