"""What an engine finds out before its first request: what its steps cost, and whether requests keep to themselves."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from open_mythos.accounting import n_layers
from open_mythos.nn.halting import Fixed
from open_mythos.serve.costs import Curve, StepCosts
from open_mythos.serve.paged import GRID
from open_mythos.serve.runner import Chunk, Row, Runner

LOOPS = 3
"""Of the sequences that are tried out."""
ENOUGH_S = 0.05
"""Seconds after which a size is not measured again."""


def measure_costs(runner: Runner) -> StepCosts:
    """Seconds of a loop, and of what is around it, by the number of sequences; the pages must be nobody's."""
    loop, outer = {}, {}
    n, most = 1, len(runner.in_loop)
    while n <= most:
        loop[n], outer[n] = _measure(runner, n)
        n = 2 * n if n == most else min(2 * n, most)
    return StepCosts(Curve(loop), Curve(outer))


def _measure(runner: Runner, n: int) -> tuple[float, float]:
    """The least seconds of a loop of n tokens, and of their coda, head, embedding and prelude."""
    cfg = runner.model.cfg
    generator = torch.Generator().manual_seed(n)
    # Other tokens choose other experts. They share their pages: what is in them does not matter.
    ids = torch.randint(cfg.vocab_size, (n,), generator=generator).tolist()
    pages = [(0,) * n_layers(cfg, LOOPS)] * (GRID // runner.kv.page_tokens)
    rows = [runner.admit(Fixed(), LOOPS) for _ in range(n)]
    for row in rows:
        row.rule = rows[0].rule
    chunks = [Chunk(row, GRID // 2, [token], pages) for row, token in zip(rows, ids, strict=True)]
    loops: list[float] = []
    outers: list[float] = []
    while len(outers) < 2 or (len(outers) < 8 and sum(loops) + sum(outers) < ENOUGH_S):
        start = time.perf_counter()
        runner.start(chunks)
        outers.append(time.perf_counter() - start)
        while runner.running:
            start = time.perf_counter()
            runner.loop()
            loops.append(time.perf_counter() - start)
        start = time.perf_counter()
        logits, _ = runner.read_out(rows, [True] * n)
        logits.argmax(-1).tolist()
        outers[-1] += time.perf_counter() - start
    for row in rows:
        runner.release(row)
    return min(loops), min(outers)


def computes_alone(runner: Runner) -> bool:
    """Whether a sequence gets the same bits alone as beside others of other lengths and depths; no if pages for two are
    lacking, and it cannot be tried."""
    cfg, page_tokens = runner.model.cfg, runner.kv.page_tokens
    n_blocks = -(-24 // page_tokens)
    each = n_blocks * n_layers(cfg, LOOPS)
    n = min(13, len(runner.in_loop), runner.kv.null // each)
    if n < min(2, len(runner.in_loop)):
        return False
    prompts = [
        torch.randint(cfg.vocab_size, (1 + 5 * i % 17,), generator=torch.Generator().manual_seed(i)).tolist()
        for i in range(n)
    ]
    alone = None
    for k in {1, 2, 3, 6, n}:
        if k <= n:
            found = _run(runner, prompts[:k], n_blocks)
            alone = found if alone is None else alone
            if not all(map(torch.equal, alone, found)):
                return False
    return True


def _run(runner: Runner, prompts: Sequence[Sequence[int]], n_blocks: int) -> list[Tensor]:
    """Logits of the first of these sequences behind its prompt and behind two more tokens."""
    cfg, kept, free = runner.model.cfg, [], 0
    rows: list[Row] = []
    pages = []
    for i, _ in enumerate(prompts):
        n_loops = LOOPS if i % 2 == 0 else 1
        rows.append(runner.admit(rows[0].rule if rows else Fixed(), n_loops))
        size = n_layers(cfg, n_loops)
        pages.append([tuple(range(free + b * size, free + (b + 1) * size)) for b in range(n_blocks)])
        free += n_blocks * size
    for step in range(3):
        runner.start(
            [
                Chunk(row, 0 if step == 0 else len(prompt) + step - 1, prompt if step == 0 else [step], own)
                for row, prompt, own in zip(rows, prompts, pages, strict=True)
            ]
        )
        while runner.running:
            runner.loop()
        kept.append(runner.read_out(rows, [True] * len(rows))[0][0])
    for row in rows:
        runner.release(row)
    return kept
