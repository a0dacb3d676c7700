"""Pointer chasing: answers by walking the pairs one hop at a time, and what every row must contain."""

import numpy as np
import pytest

from open_mythos.train.data import IGNORE
from open_mythos.train.tasks import KHop


def rows_of(task: KHop, rows: int = 100) -> list[tuple[dict[int, int], list[int], list[int], int]]:
    """(successor table, queries, answers, min_loops) of each row, read back from the ids."""
    batch = task.batch(np.random.default_rng(0), rows)
    assert batch.min_loops is not None
    n = 2 * task.n_symbols
    out = []
    for ids, labels, loops in zip(batch.input_ids.tolist(), batch.labels.tolist(), batch.min_loops, strict=True):
        assert set(labels[:n]) == {IGNORE}
        out.append((dict(zip(ids[0:n:2], ids[1:n:2], strict=True)), ids[n:], labels[n:], loops))
    return out


def walk(successor: dict[int, int], symbol: int) -> tuple[int, int]:
    """The root of `symbol` and the number of hops to it."""
    hops = 0
    while successor[symbol] != symbol:
        symbol, hops = successor[symbol], hops + 1
    return symbol, hops


TASKS = [KHop(), KHop(n_symbols=5, long_chain=3, max_distance=2), KHop(min_distance=16, max_distance=16, n_queries=1)]


@pytest.mark.parametrize("task", TASKS)
def test_answers_and_distances(task: KHop) -> None:
    for successor, queries, answers, min_loops in rows_of(task):
        assert len(successor) == task.n_symbols
        walked = [walk(successor, q) for q in queries]
        assert [root for root, _ in walked] == answers
        hops = [h for _, h in walked]
        assert task.min_distance <= min(hops) and max(hops) <= task.max_distance
        assert min_loops == max(hops)


def test_every_distance_is_drawn() -> None:
    hops = [walk(successor, q)[1] for successor, queries, _, _ in rows_of(KHop()) for q in queries]
    assert set(hops) == {1, 2, 3, 4}


def test_chains() -> None:
    task = KHop()
    for successor, *_ in rows_of(task):
        # A chain: no two symbols but a root and the symbol before it point to the same one.
        inner = [t for s, t in successor.items() if s != t]
        assert len(set(inner)) == len(inner)
        lengths = sorted(
            1 + max(walk(successor, s)[1] for s in successor if walk(successor, s)[0] == root)
            for root in successor
            if successor[root] == root
        )
        assert lengths[-1] == task.long_chain
        assert lengths[-2] <= task.short_chain


def test_the_prompt_gives_nothing_away() -> None:
    """Pairs, symbols and queries are in random order: neither ids nor places say how far a symbol is from its root."""
    task = KHop()
    batch = task.batch(np.random.default_rng(1), 4000)
    keys = batch.input_ids[:, 0 : 2 * task.n_symbols : 2].numpy()
    mean = (task.n_symbols - 1) / 2
    spread = 5 * task.n_symbols / np.sqrt(12 * 4000)
    assert np.abs(keys.mean(0) - mean).max() < spread
    assert abs(batch.labels.numpy()[:, -1].mean() - mean) < spread
