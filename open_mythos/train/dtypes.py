"""The dtypes of a run that leaves them open: those in which this machine is faster, measured before the first step.

A step is timed and not only its products: on a Xeon with AMX the latter are 2 to 4 times as fast in bfloat16, and steps
0.5 to 1.8 times while torch's attention had a slow kernel. The results are stored as those of `ops.routes` are, and the
run's config.yaml names the choice, so that the run goes on in it anywhere.
"""

import contextlib
import functools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from open_mythos.accounting import count_parameters
from open_mythos.config import MAX_LOOPS
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import LoopPlan
from open_mythos.ops import routes
from open_mythos.train.config import TrainConfig
from open_mythos.train.distributed import World
from open_mythos.train.losses import total_loss
from open_mythos.train.muon import orthogonalize
from open_mythos.train.optim import is_hidden_matrix

LEAST_GAIN = 1.1
"""Speed of bfloat16 over float32 from which it is chosen."""
WORK = 2**33
"""Parameters times tokens times loops of the measured step, unless one row has more or the run's step less: a second
on one core. Fewer tokens would do for a large model, but stay in the cache for a small one."""
ROUNDS, SECONDS = (2, 32), 1.0
"""Least and most rounds, and the time after which there is no further one. The first has costs of its own."""
WITHOUT_UNITS = 0.3
"""Speed of products in bfloat16 over float32 below which no step is tried in it: it could take minutes."""
MOST, WIDEST = 8, 256
"""Matrices, and rows and columns of each, in the measured iteration of Muon at most."""

log = logging.getLogger(__name__)


def settled(cfg: TrainConfig, device: torch.device, world: World, report: Callable[[str], None]) -> TrainConfig:
    """Return the run with the dtypes that dtype="auto" leaves open. Rank 0 chooses for all processes."""
    if cfg.dtype != "auto":
        return cfg
    mine = _choose(cfg, device, len(world.rows(cfg.batch_size))) if world.is_first else None
    dtype, muon_dtype, line = json.loads(world.exchange(json.dumps(mine))[0])
    log.info(line)
    report(line)
    return replace(cfg, dtype=dtype, optim=replace(cfg.optim, muon_dtype=cfg.optim.muon_dtype or muon_dtype))


def _choose(cfg: TrainConfig, device: torch.device, n_rows: int) -> tuple[str, str | None, str]:
    """Return the dtype of a step, that of Muon's iteration or None for the same, and a line that says why."""
    if device.type != "cpu":
        dtype = str(routes.faster_dtype((), device)).removeprefix("torch.")
        return dtype, None, f"dtype auto: steps in {dtype}, as {device.type} suggests; --dtype float32 is exact"
    gains = measured_gains(cfg, n_rows)
    dtype, muon_dtype = ("bfloat16" if gain >= LEAST_GAIN else "float32" for gain in gains)
    line = f"dtype auto: steps in {dtype} (bfloat16 is {gains[0]:.2f} times as fast as float32 here)"
    if cfg.optim.kind == "muon" and cfg.optim.muon_dtype is None:
        line += f", Muon in {muon_dtype} ({gains[1]:.2f} times)"
    return dtype, muon_dtype if cfg.optim.kind == "muon" else None, f"{line}; --dtype float32 is exact"


def measured_gains(cfg: TrainConfig, n_rows: int) -> tuple[float, float]:
    """Return how many times as fast a CPU is in bfloat16, in a step of so many rows and in Muon's iteration."""
    with torch.device("meta"):
        model = OpenMythos(cfg.model)
    matrices = [p for name, p in model.named_parameters() if is_hidden_matrix(name, p)]
    muon_gain = _muon_gain(matrices) if matrices and cfg.optim.kind == "muon" else 1.0
    products = routes.bfloat16_gain(routes.shapes_of(model.parameters()), (64,))
    return products if products < WITHOUT_UNITS else _step_gain(cfg, n_rows), muon_gain


def _step_gain(cfg: TrainConfig, n_rows: int) -> float:
    """Measure the forward and the backward pass of some rows, uncompiled, on a model that is then thrown away."""
    depth = min(round(cfg.loops.mean), cfg.loops.max_loops or MAX_LOOPS)
    fitting = WORK // (count_parameters(cfg.model).total * cfg.data.seq_len * depth)
    rows = max(1, min(n_rows, cfg.parallel.rows or n_rows, fitting))
    plan = LoopPlan((depth,) * rows, cfg.loops.backprop_depth)

    def measure() -> float:
        model = OpenMythos(cfg.model)
        if model.recurrent is not None:
            model.recurrent.checkpoint_loops = cfg.checkpoint_loops
        ids = torch.randint(cfg.model.vocab_size, (rows, cfg.data.seq_len))

        def step(autocast: bool) -> None:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                out = model(ids, plan=plan, trace=cfg.losses.per_loop)
            total_loss(out, ids, cfg.losses)[0].backward()

        return _ratio([functools.partial(step, autocast) for autocast in (False, True)])

    shown = json.dumps([cfg.model.to_dict(), cfg.loops.backprop_depth, cfg.losses.per_loop, cfg.checkpoint_loops])
    return routes.stored_gain(f"bfloat16 step of {rows} x {cfg.data.seq_len} tokens, {depth} loops, {shown}", measure)


def _muon_gain(matrices: Sequence[Tensor]) -> float:
    """Measure the iteration on some matrices of the shape that takes the longest."""
    counts: Counter[tuple[int, int]] = Counter()
    for p in matrices:
        counts[p.shape[-2], p.shape[-1]] += math.prod(p.shape[:-2])
    (rows, columns), n = max(counts.items(), key=lambda item: item[1] * math.prod(item[0]) * min(item[0]))
    shape = min(n, MOST), min(rows, WIDEST), min(columns, WIDEST)

    def measure() -> float:
        x = torch.randn(shape)
        return _ratio([functools.partial(orthogonalize, x, dtype) for dtype in (torch.float32, torch.bfloat16)])

    return routes.stored_gain(f"bfloat16 Muon {shape}", measure)


def _ratio(ways: list[Callable[[], object]]) -> float:
    """Return how many times as fast the second way is as the first, tried in turns."""
    # The processor's time, which does not count other processes; threads that wait for one another spin, and do count.
    best, began = [math.inf, math.inf], time.process_time()
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.process_time() - began > SECONDS:
            break
        for i, way in enumerate(ways):
            start = time.process_time()
            way()
            best[i] = min(best[i], time.process_time() - start)
    return best[0] / best[1]
