"""Brackets, parity and their mixture: answers by a slow reader, and what rows must contain."""

from collections import Counter

import numpy as np
import pytest

from open_mythos.tasks import Addition, Brackets, Mixed, Parity
from open_mythos.tasks.brackets import first_break, nesting
from open_mythos.tasks.task import IGNORE

PARTNER = {")": "(", "]": "[", "}": "{"}


def read(text: str) -> tuple[int, int]:
    """The place of the first break, -1 for none, and the most brackets open at once before it."""
    stack: list[str] = []
    most = 0
    for place, bracket in enumerate(text):
        if bracket in PARTNER:
            if not stack or stack.pop() != PARTNER[bracket]:
                return place, most
        else:
            stack.append(bracket)
            most = max(most, len(stack))
    return (len(text) if stack else -1), most


def texts_of(task: Brackets, rows: int = 1000) -> tuple[list[str], np.ndarray, np.ndarray]:
    strings, lengths = task.draw(np.random.default_rng(0), rows)
    symbols = task.tokenizer().symbols
    return ["".join(symbols[i] for i in s[:n]) for s, n in zip(strings, lengths, strict=True)], strings, lengths


@pytest.mark.parametrize(
    ("text", "answer"), [("((()))", "--$"), ("([)]", "02$"), ("(()(", "04$"), ("))", "00$"), ("{[]}()", "--$")]
)
def test_published_examples(text: str, answer: str) -> None:
    task = Brackets(max_length=16)
    ids = np.array(task.tokenizer().encode(text))[None]
    padded = np.pad(ids, ((0, 0), (0, 16 - len(text))), constant_values=18)
    batch = task.encode(padded, np.array([len(text)]))
    symbols = task.tokenizer().symbols
    assert "".join(symbols[i] for i in batch.input_ids[0].tolist()).replace("<pad>", "") == f"{text}={answer}"
    said = {place: symbols[i] for place, i in enumerate(batch.labels[0].tolist()) if i != IGNORE}
    assert said == dict(enumerate(answer, len(text)))


@pytest.mark.parametrize(
    "task", [Brackets(), Brackets(2, 5, 1, 2), Brackets(12, 12, 6, 6), Brackets(2, 98, 1, 49)], ids=str
)
def test_reader_agrees(task: Brackets) -> None:
    texts, strings, lengths = texts_of(task)
    read_back = [read(text) for text in texts]
    assert first_break(strings, lengths).tolist() == [place for place, _ in read_back]
    assert nesting(strings, lengths).tolist() == [most for _, most in read_back]


def test_strings_are_as_asked() -> None:
    texts, _, lengths = texts_of(Brackets(min_length=5, max_length=12, min_nesting=2, max_nesting=5), 4000)
    assert set(lengths.tolist()) == {6, 8, 10, 12}
    balanced = [(text, most) for text, (place, most) in zip(texts, map(read, texts), strict=True) if place < 0]
    assert abs(len(balanced) - 2000) < 150
    counts = Counter(most for _, most in balanced)
    assert set(counts) == {2, 3, 4, 5}
    assert all(abs(n - len(balanced) / 4) < 120 for n in counts.values())
    assert {bracket for text in texts for bracket in text} == set("()[]{}")
    # Nothing but the answer tells where a string breaks: breaks are everywhere.
    assert {place for place, _ in map(read, texts)} == {-1, *range(13)}


@pytest.mark.parametrize("depth", [1, 3, 9])
def test_parity_of_no_more_bits_than_loops(depth: int) -> None:
    batch = Parity(6).batch(np.random.default_rng(0), 50, np.full(50, depth))
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        assert ids[0] == 2
        expected = [IGNORE] + [sum(ids[1 : n + 1]) % 2 if n <= depth else IGNORE for n in range(1, 7)]
        assert labels == expected


def test_parity_without_depths_asks_everything() -> None:
    labels = Parity(6).batch(np.random.default_rng(0), 500).labels
    assert (labels[:, 1:] != IGNORE).all()
    assert 0.4 < labels[:, 1:].double().mean() < 0.6


def test_mixed_rows_are_those_of_the_three() -> None:
    task = Mixed(max_bits=5, max_digits=2, max_length=8)
    depths = np.full(300, 3)
    batch = task.batch(np.random.default_rng(0), 300, depths)
    symbols, seen = task.tokenizer().symbols, Counter()
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        text = "".join(symbols[i] for i in ids).replace("<pad>", "")
        answer = "".join(symbols[i] for i in labels if i != IGNORE)
        if text[0] == "^":
            kind, expected = "parity", "".join(str(text[1 : n + 1].count("1") % 2) for n in (1, 2, 3))
        elif "+" in text:
            a, b = text.split("=")[0].split("+")
            kind, expected = "addition", str(int(a) + int(b))[::-1] + "$"
        else:
            place, _ = read(text.split("=")[0])
            kind, expected = "brackets", "--$" if place < 0 else f"{place:02}$"
        seen[kind] += 1
        assert answer == expected
    assert all(70 < seen[kind] < 130 for kind in ("parity", "addition", "brackets"))
    assert task.seq_len == max(Parity(5).seq_len, Addition(1, 2).seq_len, Brackets(2, 8, 1, 4).seq_len)
