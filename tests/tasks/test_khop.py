"""Pointer chasing: answers by walking the table one hop at a time, and what every row must contain."""

import numpy as np
import pytest

from open_mythos.tasks import KHop
from open_mythos.tasks.task import IGNORE

Row = tuple[list[int], int, int]
"""What each symbol points to, the question, and the answer."""


def rows_of(task: KHop, rows: int = 300, depths: np.ndarray | None = None) -> list[Row]:
    """The rows of a batch, read back from its ids."""
    batch = task.batch(np.random.default_rng(0), rows, depths)
    assert set(batch.labels[:, :-1].flatten().tolist()) == {IGNORE}
    return [
        (ids[:-1], ids[-1], labels[-1])
        for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True)
    ]


def walk(table: list[int], symbol: int, hops: int) -> int:
    for _ in range(hops):
        symbol = table[symbol]
    return symbol


def distance(table: list[int], symbol: int) -> int:
    """Hops from `symbol` to its root."""
    hops = 0
    while table[symbol] != symbol:
        symbol, hops = table[symbol], hops + 1
    return hops


SHAPES = [
    KHop(),
    KHop(n_symbols=5, long_chain=3, short_chain=2, max_distance=2),
    KHop(min_distance=16, max_distance=16),
]


@pytest.mark.parametrize("task", SHAPES)
def test_answer_is_the_root(task: KHop) -> None:
    asked = set()
    for table, question, answer in rows_of(task):
        assert len(table) == task.n_symbols
        assert answer == walk(table, question, task.n_symbols)
        asked.add(distance(table, question))
    assert asked == set(range(task.min_distance, task.max_distance + 1))


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_hop_target_moves_on_by_one_symbol_a_loop(depth: int) -> None:
    batch = KHop(max_distance=5, target="hop").batch(np.random.default_rng(0), 300, np.full(300, depth))
    assert batch.labels.shape == (depth, *batch.input_ids.shape)
    assert set(batch.labels[:, :, :-1].flatten().tolist()) == {IGNORE}
    for row, (*table, question) in enumerate(batch.input_ids.tolist()):
        walked = [walk(table, question, loop + 1) for loop in range(depth)]
        assert batch.labels[:, row, -1].tolist() == walked


def test_root_target_asks_no_farther_than_the_row_loops() -> None:
    depths = np.resize([1, 2, 3, 7], 300)
    asked: dict[int, set[int]] = {}
    for depth, (table, question, answer) in zip(
        depths.tolist(), rows_of(KHop(target="root"), depths=depths), strict=True
    ):
        assert answer == walk(table, question, 24)
        asked.setdefault(depth, set()).add(distance(table, question))
    assert asked == {1: {1}, 2: {1, 2}, 3: {1, 2, 3}, 7: {1, 2, 3, 4}}


def test_chains() -> None:
    task = KHop()
    for table, *_ in rows_of(task):
        # A chain: no two symbols but a root and the symbol before it point to the same one.
        inner = [successor for symbol, successor in enumerate(table) if symbol != successor]
        assert len(set(inner)) == len(inner)
        lengths: dict[int, int] = {}
        for symbol in range(task.n_symbols):
            root = walk(table, symbol, task.n_symbols)
            lengths[root] = max(lengths.get(root, 0), 1 + distance(table, symbol))
        assert max(lengths.values()) == task.long_chain
        assert sorted(lengths.values())[-2] <= task.short_chain


def test_the_prompt_gives_nothing_away() -> None:
    """A symbol says nothing about its place in a chain: questions, answers and roots are uniform."""
    task, rows = KHop(), 6000
    read = rows_of(task, rows)
    roots = [symbol for table, *_ in read for symbol in range(task.n_symbols) if table[symbol] == symbol]
    for drawn in ([q for _, q, _ in read], [a for *_, a in read], roots):
        counts = np.bincount(drawn, minlength=task.n_symbols)
        mean = len(drawn) / task.n_symbols
        assert np.abs(counts - mean).max() < 5 * np.sqrt(mean)


def test_example_is_a_prompt_and_its_meaning() -> None:
    task = KHop()
    prompt, meaning, answer = task.example(seed=3).splitlines()
    ids = task.tokenizer().encode(prompt.removeprefix("prompt: "))
    hops = distance(ids[:-1], ids[-1])
    root = "abcdefghijklmnopqrstuvwx"[walk(ids[:-1], ids[-1], hops)]
    assert answer.startswith(f"answer: {root}, {hops} hop")
    assert f"b>{prompt.removeprefix('prompt: ')[1]} " in meaning
