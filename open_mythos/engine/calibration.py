"""What an engine finds out before its first request: how to store weights, the times of a step, rows of a call."""

import math
import time
from itertools import pairwise

import torch
from torch import Tensor

from open_mythos.accounting import n_layers
from open_mythos.engine.model_runner import ModelRunner
from open_mythos.engine.readout_policy import Curve, StepCosts
from open_mythos.engine.sequence import GRID, Block, Sequence
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.model import OpenMythos
from open_mythos.nn.halting import Fixed
from open_mythos.nn.moe import MoEFFN
from open_mythos.ops.batch_invariant import REFERENCE, SIZES
from open_mythos.ops.experts import computes_all
from open_mythos.ops.linear import Linear
from open_mythos.ops.routes import MARGIN, stored_transposed, transposed_gain

LOOPS = 3
"""Loops of the tokens that are timed."""
MAX_ROUNDS = 8
"""Rounds over all sizes, at most."""
ENOUGH_S = 1.5
"""Seconds after which no further round begins."""


def store_weights(model: OpenMythos) -> None:
    """Store float32 matrices as products of a few rows are fastest on this CPU; names, shapes and values stay."""
    if (
        model.device.type != "cpu"
        or model.cfg.weights != "float"
        or transposed_gain(torch.get_num_threads()) * MARGIN < 1
    ):
        return
    for module in model.modules():
        weights: list[Tensor] = []
        # The embedding is also a table, whose rows have to lie together.
        if isinstance(module, Linear) and module.weight is not model.embed.weight:
            weights = [module.weight]
        # Where all experts are computed, they are one matrix.
        if isinstance(module, MoEFFN) and not computes_all(1, module.n_chosen, module.experts.down):
            weights = [module.experts.gate_up, module.experts.down]
        for weight in weights:
            if weight.dtype is torch.float32 and weight.is_contiguous():
                weight.data = stored_transposed(weight.data)


def measure_costs(runner: ModelRunner) -> StepCosts:
    """Measure the seconds of a loop, and of the work around it, by the number of sequences; all pages must be free.

    Each time is the shortest of a few rounds over all sizes, so that other work of the machine does not fall on one
    size alone.
    """
    # The smallest rows of a call come first, because they change the times that follow.
    runner.least_rows = 1 if runner.invariance is None else _choose_rows(runner)
    sizes = sorted({min(1 << i, runner.max_rows) for i in range(runner.max_rows.bit_length() + 1)})
    loop, outer = dict.fromkeys(sizes, math.inf), dict.fromkeys(sizes, math.inf)
    n_rounds, start = 0, time.perf_counter()
    while n_rounds < 2 or (n_rounds < MAX_ROUNDS and time.perf_counter() - start < ENOUGH_S):
        for n in sizes:
            for shortest, seconds in zip((loop, outer), _measure(runner, n), strict=True):
                shortest[n] = min(shortest[n], seconds)
        n_rounds += 1
    for n, larger in reversed(list(pairwise(sizes))):
        # A few tokens take no longer than many.
        loop[n], outer[n] = min(loop[n], loop[larger]), min(outer[n], outer[larger])
    return StepCosts(Curve(loop), Curve(outer), runner.least_rows)


def _choose_rows(runner: ModelRunner) -> int:
    """Return the least rows of a batch-invariant call for which one token takes the shortest time.

    Small products are fastest in a call that has the rows which their kernels need. Large ones need fewer rows, and the
    small ones beside them are then padded one by one.
    """
    seconds = dict.fromkeys([size for size in SIZES if size <= REFERENCE], math.inf)
    for _ in range(3):
        for runner.least_rows in seconds:
            seconds[runner.least_rows] = min(seconds[runner.least_rows], sum(_measure(runner, 1)))
    return min(seconds, key=seconds.__getitem__)


def run_once(runner: ModelRunner) -> None:
    """Take one token through every stage, so that each product has shown whether it can be batch-invariant."""
    _measure(runner, 1)


def _measure(runner: ModelRunner, n: int) -> tuple[float, float]:
    """Return the seconds of the shortest loop of n tokens, and of their coda, head, embedding and prelude."""
    cfg, loops = runner.model.cfg, []
    # Only this thread's time, unless it waits for a GPU.
    clock = time.thread_time if runner.kv.device.type == "cpu" else time.perf_counter
    # Different tokens, because they choose different experts. They share one page, whose contents do not matter.
    ids = torch.randint(cfg.vocab_size, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    blocks = [Block((0,) * n_layers(cfg, LOOPS))] * (GRID // runner.kv.page_tokens)
    rule, n_before, params = Fixed(), GRID // 2, SamplingParams()
    seqs = [Sequence(i, [0] * n_before + [token], params, LOOPS, None, True, 1) for i, token in enumerate(ids)]
    for seq in seqs:
        seq.rule, seq.blocks, seq.n_computed, seq.n_running = rule, blocks, n_before, 1
    began = clock()
    runner.start(seqs)
    outer = clock() - began
    while runner.running:
        began = clock()
        runner.loop()
        loops.append(clock() - began)
    began = clock()
    runner.read_out(seqs).logits.argmax(-1).tolist()
    outer += clock() - began
    for seq in seqs:
        runner.release(seq)
    return min(loops), outer
