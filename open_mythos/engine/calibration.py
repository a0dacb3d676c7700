"""What an engine finds out before its first request: the cost of its steps, and kernels that are batch-invariant."""

import math
import time
from itertools import pairwise

import torch

from open_mythos.accounting import n_layers
from open_mythos.engine.model_runner import Chunk, Runner
from open_mythos.engine.sequence import GRID, Block
from open_mythos.engine.step_costs import Curve, StepCosts
from open_mythos.nn.halting import Fixed
from open_mythos.ops.batch_invariant import REFERENCE, SIZES

LOOPS = 3
"""Loops of the tokens that are timed."""
ROUNDS = 8
"""Over all sizes, at most."""
ENOUGH_S = 1.5
"""Seconds after which there is no further round."""


def measure_costs(runner: Runner) -> StepCosts:
    """Seconds of a loop, and of what is around it, by the number of sequences; the pages must be nobody's.

    The least of a few rounds over all sizes, so that what else the machine does strikes none of them alone.
    """
    runner.least_rows = 1 if runner.invariance is None else _choose_rows(runner)
    sizes = sorted({min(1 << i, len(runner.in_loop)) for i in range(len(runner.in_loop).bit_length() + 1)})
    loop, outer = dict.fromkeys(sizes, math.inf), dict.fromkeys(sizes, math.inf)
    n_rounds, start = 0, time.perf_counter()
    while n_rounds < 2 or (n_rounds < ROUNDS and time.perf_counter() - start < ENOUGH_S):
        for n in sizes:
            for least, seconds in zip((loop, outer), _measure(runner, n), strict=True):
                least[n] = min(least[n], seconds)
        n_rounds += 1
    for n, larger in reversed(list(pairwise(sizes))):
        # Fewer cost no more than many.
        loop[n], outer[n] = min(loop[n], loop[larger]), min(outer[n], outer[larger])
    return StepCosts(Curve(loop), Curve(outer), runner.least_rows)


def _choose_rows(runner: Runner) -> int:
    """Return the least rows of a batch-invariant call by the time of one token.

    Small products run fastest in a call that has the rows which their kernels need. Large ones need fewer rows, and
    small ones beside them are then padded one by one.
    """
    seconds = dict.fromkeys([size for size in SIZES if size <= REFERENCE], math.inf)
    for _ in range(3):
        for runner.least_rows in seconds:
            seconds[runner.least_rows] = min(seconds[runner.least_rows], sum(_measure(runner, 1)))
    return min(seconds, key=seconds.__getitem__)


def run_once(runner: Runner) -> None:
    """Take one token through every stage, so that each product has shown whether it can be batch-invariant."""
    _measure(runner, 1)


def _measure(runner: Runner, n: int) -> tuple[float, float]:
    """Seconds of the shortest loop of n tokens, and of their coda, head, embedding and prelude."""
    cfg, loops = runner.model.cfg, []
    # Of this thread alone, unless it waits for a GPU.
    clock = time.thread_time if runner.kv.device.type == "cpu" else time.perf_counter
    generator = torch.Generator().manual_seed(n)
    # Other tokens choose other experts. They share their pages: what is in them does not matter.
    ids = torch.randint(cfg.vocab_size, (n,), generator=generator).tolist()
    blocks = [Block((0,) * n_layers(cfg, LOOPS))] * (GRID // runner.kv.page_tokens)
    rule = Fixed()
    rows = [runner.admit(rule, LOOPS) for _ in range(n)]
    began = clock()
    runner.start([Chunk(row, GRID // 2, [token], blocks) for row, token in zip(rows, ids, strict=True)])
    outer = clock() - began
    while runner.running:
        began = clock()
        runner.loop()
        loops.append(clock() - began)
    began = clock()
    runner.read_out(rows, [True] * n).logits.argmax(-1).tolist()
    outer += clock() - began
    for row in rows:
        runner.release(row)
    return min(loops), outer
