"""What an engine finds out before its first request: what its steps cost, and whether requests keep to themselves."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from open_mythos.accounting import n_layers
from open_mythos.nn.halting import Fixed, HaltingRule
from open_mythos.serve.costs import Curve, StepCosts
from open_mythos.serve.runner import Chunk, Runner
from open_mythos.serve.sequence import GRID, Block

LOOPS = 3
"""Of the sequences that are tried out."""
N_MORE = 2
"""Tokens behind their prompts."""
ROUNDS = 8
"""Over all sizes, at most."""
ENOUGH_S = 1.5
"""Seconds after which there is no further round."""


def measure_costs(runner: Runner) -> StepCosts:
    """Seconds of a loop, and of what is around it, by the number of sequences; the pages must be nobody's.

    The least of a few rounds over all sizes, so that what else the machine does strikes none of them alone.
    """
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
    return StepCosts(Curve(loop), Curve(outer))


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


def computes_alone(runner: Runner) -> bool:
    """Whether a sequence gets the same bits alone as beside others of other lengths and depths, and from other chunks.

    No if there are no pages for two of them, and it cannot be tried.
    """
    tried = _sequences(runner)
    if len(tried) < min(2, len(runner.in_loop)):
        return False
    alone = _run(runner, tried[:1], cut=False)
    return all(
        all(map(torch.equal, alone, _run(runner, tried[:n], cut=n > 1)))
        for n in sorted({1, 2, 3, 7, len(tried)})
        if n <= len(tried)
    )


@dataclass(frozen=True)
class _Tried:
    """A sequence that is tried out."""

    ids: list[int]
    n_prompt: int
    rule: HaltingRule
    n_loops: int
    blocks: list[Block]


def _sequences(runner: Runner) -> list[_Tried]:
    """A long prompt and shorter ones, as many as there are rows and pages for."""
    cfg, block = runner.model.cfg, runner.model.recurrent
    rules = [Fixed()] if block is None else [block.rule, Fixed()]
    tried: list[_Tried] = []
    free = 0
    for i in range(len(runner.in_loop)):
        n_prompt = 1 + 5 * i % 17 if i else min(GRID + 9, cfg.max_seq_len - N_MORE)
        n_loops, n_tokens = LOOPS - i % 3, n_prompt + N_MORE
        n_pages = n_layers(cfg, n_loops)
        first, free = free, free + -(-n_tokens // runner.kv.page_tokens) * n_pages
        if free > runner.kv.null:
            break
        ids = torch.randint(cfg.vocab_size, (n_tokens,), generator=torch.Generator().manual_seed(i)).tolist()
        blocks = [Block(tuple(range(page, page + n_pages))) for page in range(first, free, n_pages)]
        tried.append(_Tried(ids, n_prompt, rules[i % len(rules)], n_loops, blocks))
    return tried


def _run(runner: Runner, tried: Sequence[_Tried], cut: bool) -> list[Tensor]:
    """Logits of the first of these behind its prompt, which may be cut in two, and behind two more tokens."""
    rows = [runner.admit(one.rule, one.n_loops) for one in tried]
    done, kept = [0] * len(tried), []
    cuts = [GRID] if cut and tried[0].n_prompt > GRID else []
    for step, end in enumerate([*cuts, *range(tried[0].n_prompt, len(tried[0].ids) + 1)]):
        chunks = []
        for i, one in enumerate(tried):
            first, done[i] = done[i], min(one.n_prompt + step, len(one.ids)) if i else end
            if first < done[i]:
                chunks.append(Chunk(rows[i], first, one.ids[first : done[i]], one.blocks))
        runner.start(chunks)
        while runner.running:
            runner.loop()
        logits = runner.read_out([chunk.row for chunk in chunks], [True] * len(chunks)).logits
        if end not in cuts:
            kept.append(logits[0])
    for row in rows:
        runner.release(row)
    return kept
