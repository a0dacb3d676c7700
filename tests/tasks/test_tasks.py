"""Every task's rows: answers recomputed from the decoded prompt, and the same rows for the same (seed, step)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from open_mythos.assets import novel
from open_mythos.tasks import Addition, Brackets, KHop, Mixed, Parity, Text
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE, Batch, Task

TASKS: list[Task] = [
    Addition(),
    KHop(),
    Parity(),
    Brackets(),
    Mixed(),
    Text(seq_len=32),
    Text(seq_len=32, kind="bpe", bpe_vocab_size=300),
]
IDS = ["addition", "khop", "parity", "brackets", "mixed", "bytes", "bpe"]


def draw(task: Task, rows: int, step: int = 0, seed: int = 0) -> Batch:
    return task.batch(stream(seed, step, Purpose.DATA), rows)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_batch_is_a_function_of_seed_and_step(task: Task) -> None:
    a, b = draw(task, 7, step=3), draw(task, 7, step=3)
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a.labels, b.labels)
    for other in (draw(task, 7, step=4), draw(task, 7, step=3, seed=1)):
        assert not torch.equal(a.input_ids, other.input_ids)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
@pytest.mark.parametrize("rows", [1, 63])
def test_batch_has_the_promised_shape(task: Task, rows: int) -> None:
    for batch in (draw(task, rows), task.validation_batch(stream(0, 0, Purpose.VALIDATION), rows)):
        assert batch.input_ids.shape == batch.labels.shape == (rows, task.seq_len)
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        assert 0 <= batch.input_ids.min()
        assert batch.input_ids.max() < task.vocab_size
        assert batch.labels[batch.labels != IGNORE].max() < task.vocab_size
        assert (batch.labels != IGNORE).any(dim=1).all()


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_tokenizer_is_the_tasks(task: Task) -> None:
    tokenizer = task.tokenizer()
    assert tokenizer.vocab_size <= task.vocab_size
    ids = [i for i in draw(task, 1).input_ids[0].tolist() if i not in (tokenizer.pad_id, tokenizer.eos_id)]
    if task.name != "text":
        assert tokenizer.encode(tokenizer.decode(ids)) == ids


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 5), (3, 3), (17, 17)])
def test_addition_answers(low: int, high: int) -> None:
    task = Addition(low, high)
    symbols = task.tokenizer().symbols
    batch = draw(task, 200)
    lengths = set()
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        text = "".join(symbols[i] for i in ids).replace("<pad>", "")
        question, answer = text.split("=")
        a, b = question.split("+")
        assert len(a) == len(b) == len(str(int(a))) and low <= len(a) <= high
        lengths.add(len(a))
        written = str(int(a) + int(b))[::-1] + "$"
        start = len(question)  # the position of "=" predicts the first digit
        assert [symbols[i] for i in labels[start : start + len(written)]] == list(written)
        assert set(labels[:start] + labels[start + len(written) :]) <= {IGNORE}
        assert written.startswith(answer)
    assert lengths == set(range(low, high + 1))


def test_addition_operands_cover_their_range() -> None:
    ids = draw(Addition(2, 2), 20_000).input_ids
    a, b = ids[:, 0] * 10 + ids[:, 1], ids[:, 3] * 10 + ids[:, 4]
    for operand in (a, b):
        assert operand.min() == 10
        assert operand.max() == 99
        assert operand.double().mean() == pytest.approx(54.5, abs=0.6)


def test_addition_protocol() -> None:
    assert Addition().vocab_size == 16
    assert Addition().tokenizer().encode("12+99=111$") == [1, 2, 10, 9, 9, 11, 1, 1, 1, 13]


def test_text_is_held_out_by_construction(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 900 + "z" * 100, encoding="utf-8")
    task = Text(str(path), seq_len=16)
    rng = np.random.default_rng(0)
    assert set(task.batch(rng, 500).labels.flatten().tolist()) == {ord("a")}
    assert set(task.validation_batch(rng, 500).labels.flatten().tolist()) == {ord("z")}


def test_text_labels_are_the_next_tokens() -> None:
    task = Text(seq_len=40)
    batch = draw(task, 5)
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    text = novel().encode()
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        assert bytes([*ids, labels[-1]]) in text


def test_text_reaches_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(100)) * 2)
    batch = Text(str(path), seq_len=95, held_out=0.5).batch(np.random.default_rng(0), 200)
    assert set(batch.input_ids[:, 0].tolist()) == set(range(5))


def test_bytes_per_token() -> None:
    assert Text().bytes_per_token == 1.0
    task = Text(kind="bpe", bpe_vocab_size=400)
    held_out = novel()[int(len(novel()) * 0.9) :]
    assert task.bytes_per_token == len(held_out) / len(task.tokenizer().encode(held_out))
    assert 1.5 < task.bytes_per_token < 4


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Addition(0, 5), "data.min_digits=0"),
        (lambda: Addition(6, 5), "data.min_digits=6"),
        (lambda: Addition(2, 18), "data.max_digits=18"),
        (lambda: KHop(n_symbols=63), "data.n_symbols=63"),
        (lambda: KHop(n_symbols=10), "data.long_chain=17"),
        (lambda: KHop(max_distance=17), "data.max_distance=17"),
        (lambda: KHop(min_distance=0), "data.min_distance=0"),
        (lambda: KHop(min_distance=5), "data.min_distance=5"),
        (lambda: KHop(target="tail"), "data.target='tail'"),
        (lambda: Parity(0), "data.max_bits=0"),
        (lambda: Brackets(max_length=15), "data.max_length=15"),
        (lambda: Brackets(max_length=99), "data.max_length=99"),
        (lambda: Brackets(min_nesting=9), "data.min_nesting=9"),
        (lambda: Mixed(max_length=1), "data.max_length=1"),
        (lambda: Mixed(max_digits=18), "data.max_digits=18"),
        (lambda: Text(kind="byte"), "data.kind='byte'"),
        (lambda: Text(bpe_vocab_size=258), "data.bpe_vocab_size=258"),
        (lambda: Text(seq_len=0), "data.seq_len=0"),
        (lambda: Text(held_out=0), "data.held_out=0"),
        (lambda: draw(Text("no such file.txt"), 1), "no such file.txt"),
        (lambda: draw(Text(seq_len=60_000), 1), "data.seq_len=60000"),
    ],
)
def test_refuses(make, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match="not UTF-8 at byte 3"):
        draw(Text(str(path), seq_len=4), 1)
