"""A stream against a plain reading of all its files: the order, exact resume, ranks, epochs, bad rows, the hub."""

import dataclasses
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch

from open_mythos.data import row_groups as groups
from open_mythos.data.documents import place_of
from open_mythos.data.parquet import _remote_metadata
from open_mythos.data.permutation import in_epochs
from open_mythos.recipes import load_recipe
from open_mythos.tasks import Stream
from open_mythos.tokenization.tokenizer import BPETokenizer, ByteTokenizer, SymbolTokenizer
from open_mythos.train.config import TrainConfig
from tests.data.fake_hub import FakeHub, serve, use

RNG = np.random.default_rng(0)
B, T = 4, 23
END = ByteTokenizer.eos_id
Texts = list[list[str | None]]


def make(folder: Path) -> Texts:
    """Two files of 4 and 3 row groups, documents of 1 to 60 bytes; some rows are bad. Returns the rows by group."""
    rng, made = random.Random(1), []
    folder.mkdir(parents=True)
    for file, n in (("a.parquet", 4), ("b.parquet", 3)):
        rows: list[str | None] = ["".join(rng.choices("abcdefgh \u20ac", k=rng.randint(1, 60))) for _ in range(9 * n)]
        rows[2], rows[10] = None, " "
        parquet.write_table(pyarrow.table({"text": rows, "id": rows}), folder / file, row_group_size=9)
        made += [rows[i : i + 9] for i in range(0, len(rows), 9)]
    return made


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    return make(tmp_path / "data")


@pytest.fixture
def task(texts: Texts, tmp_path: Path) -> Stream:
    return Stream(str(tmp_path / "data"), vocabulary="bytes", seq_len=T, held_out=0.2)


@pytest.fixture
def server(texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    _remote_metadata.cache_clear()
    monkeypatch.setattr(groups, "WAITS_S", (0.0, 0.0, 0.0))
    with serve(FakeHub("some/data", tmp_path / "data")) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def expected(texts: Texts, lane: int, order_seed: int = 0, share: float = 0.2) -> Iterator[int]:
    """The tokens of a lane, without end."""
    turn = 0
    while True:
        group = in_epochs(np.array([lane + turn * B]), len(texts), (order_seed,))[0]
        for text in texts[int(group)]:
            if text is not None and text.strip() and place_of(text) >= share:
                yield from (*text.encode(), END)
        turn += 1


def windows(task: Stream, n: int, rows: range = range(B), state: np.ndarray | None = None) -> torch.Tensor:
    """(n, B, T + 1)"""
    lanes = task.lanes(rows, B, state)
    return torch.stack([joined(lanes.next()) for _ in range(n)])


def joined(batch) -> torch.Tensor:
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    return torch.cat((batch.input_ids, batch.labels[:, -1:]), dim=1)


@pytest.mark.parametrize("order_seed", [0, 5])
def test_lanes_read_what_the_order_says(texts: Texts, task: Stream, order_seed: int) -> None:
    """Over more than two epochs."""
    n = 2 * sum(len((text or "").encode()) for group in texts for text in group) // (B * T) + 20
    got = windows(dataclasses.replace(task, order_seed=order_seed), n)
    for lane in range(B):
        tokens = list(islice(expected(texts, lane, order_seed), n * T + 1))
        assert got[:, lane].tolist() == [tokens[i * T : i * T + T + 1] for i in range(n)]


def test_an_epoch_reads_every_document_once(texts: Texts, tmp_path: Path) -> None:
    """One lane, so that the epoch's end is one place."""
    task = Stream(str(tmp_path / "data"), vocabulary="bytes", seq_len=1, held_out=0.2)
    good = sorted(t for t in chain(*texts) if t and t.strip() and place_of(t) >= 0.2)
    n = sum(len(text.encode()) + 1 for text in good)
    lanes, epochs = task.lanes(range(1), 1), []
    for _ in range(2):
        ids = [int(lanes.next().input_ids[0, 0]) for _ in range(n)]
        read = bytes(255 if i == END else i for i in ids).split(b"\xff")
        assert sorted(part.decode() for part in read[:-1]) == good
        epochs.append(ids)
    assert epochs[0] != epochs[1]
    assert lanes.skipped == {"no text in the record": 4, "empty": 4}


def test_resumes_anywhere(task: Stream) -> None:
    whole = windows(task, 60)
    lanes = task.lanes(range(B), B)
    states = [lanes.state.copy()]
    for _ in range(40):
        lanes.next()
        states.append(lanes.state.copy())
    assert states[7].shape == (B, 6) and states[7].dtype == np.int64
    for cut in (0, 1, 2, *random.Random(0).sample(range(3, 40), 12), 40):
        again = pickle.loads(pickle.dumps(task)) if cut % 2 else dataclasses.replace(task)
        assert torch.equal(windows(again, 20, state=states[cut]), whole[cut : cut + 20])


def test_ranks_share_the_rows(task: Stream) -> None:
    whole = windows(task, 30)
    for parts in ((range(2), range(2, 4)), (range(1), range(1, 4)), tuple(range(i, i + 1) for i in range(4))):
        assert torch.equal(torch.cat([windows(task, 30, rows) for rows in parts], dim=1), whole)
    # One process took a checkpoint, two go on with its rows.
    lanes = task.lanes(range(B), B)
    for _ in range(11):
        lanes.next()
    halves = [windows(task, 5, rows, lanes.state[rows.start : rows.stop]) for rows in (range(1), range(1, 4))]
    assert torch.equal(torch.cat(halves, dim=1), whole[11:16])


def test_validation_is_held_out(texts: Texts, task: Stream) -> None:
    held_out = {t for t in chain(*texts) if t and t.strip() and place_of(t) < 0.2}
    ids = torch.cat(list(joined(task.validation_batch(RNG, 5))[:, :T])).tolist()
    parts = bytes(255 if i == END else i for i in ids).split(b"\xff")
    assert len(parts) > 3 and {part.decode() for part in parts[:-1]} <= held_out
    again = dataclasses.replace(task, order_seed=9).validation_batch(np.random.default_rng(1), 5)
    assert torch.equal(joined(again), joined(task.validation_batch(RNG, 5)))
    n_bytes = sum(len(text.encode()) for text in held_out)
    assert task.bytes_per_token == pytest.approx(n_bytes / (n_bytes + len(held_out)))
    with pytest.raises(ValueError, match=r"keeps \d+ tokens for validation, and 500 rows of 23 need 11501"):
        task.validation_batch(RNG, 500)
    with pytest.raises(ValueError, match=r"data.held_out=0 keeps no document"):
        dataclasses.replace(task, held_out=0).validation_batch(RNG, 1)


def test_from_the_hub_as_from_disk(task: Stream, server: FakeHub) -> None:
    remote = dataclasses.replace(task, dataset="some/data")
    assert torch.equal(windows(remote, 40), windows(task, 40))
    assert torch.equal(joined(remote.validation_batch(RNG, 5)), joined(task.validation_batch(RNG, 5)))
    # Where the files have gone on, a run stays at the commit that its state names.
    lanes = remote.lanes(range(B), B)
    for _ in range(3):
        lanes.next()
    whole = windows(remote, 10)
    server.known[server.commit], server.commit = server.folder, "b" * 40
    server.folder = server.folder.parent / "new"
    make(server.folder)
    parquet.write_table(pyarrow.table({"text": ["other"] * 99}), server.folder / "a.parquet", row_group_size=9)
    new = dataclasses.replace(remote)
    assert torch.equal(windows(new, 7, state=lanes.state), whole[3:])
    assert not torch.equal(windows(new, 10), whole)


def test_a_run_that_goes_on_validates_on_what_it_began_with(task: Stream, server: FakeHub) -> None:
    remote = dataclasses.replace(task, dataset="some/data")
    before, commit = joined(remote.validation_batch(RNG, 5)), remote.digests()["data.dataset"]
    server.known[server.commit], server.commit = server.folder, "b" * 40
    server.folder = server.folder.parent / "new"
    server.folder.mkdir()
    parquet.write_table(pyarrow.table({"text": ["other", "texts"] * 999}), server.folder / "a.parquet")
    moved, stays = dataclasses.replace(remote), dataclasses.replace(remote)
    stays.resume({"data.dataset": commit}, stays.tokenizer())
    assert torch.equal(joined(stays.validation_batch(RNG, 5)), before) and stays.digests() == remote.digests()
    assert moved.digests() == {"data.dataset": "b" * 40}


def test_a_row_group_that_does_not_come(task: Stream, server: FakeHub) -> None:
    remote, whole = dataclasses.replace(task, dataset="some/data"), windows(task, 20)
    lanes = remote.lanes(range(B), B)
    lanes.next()
    server.broken = [404, 403, 404]
    assert torch.equal(torch.stack([joined(lanes.next()) for _ in range(19)]), whole[1:])
    lanes = remote.lanes(range(B), B)
    server.broken = [404] * 1000
    start = lanes.state.copy()
    match = r"row group \d of hf://datasets/some/data@a+/[ab]\.parquet cannot be read \(.*404.*; tries: 4\)"
    with pytest.raises(OSError, match=match):
        lanes.next()
    assert np.array_equal(lanes.state, start)


def test_goes_on_where_a_read_broke_off(task: Stream, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, read, broken = windows(task, 30), groups.read_documents, set()

    def breaks_off_once(unit, reading):
        for i, document in enumerate(read(unit, reading)):
            if i == 4 and unit not in broken:
                broken.add(unit)
                raise ConnectionError("lost")
            yield document

    monkeypatch.setattr(groups, "read_documents", breaks_off_once)
    assert torch.equal(windows(dataclasses.replace(task, dataset="some/data"), 30), whole)
    assert len(broken) == 7


def test_damage_is_named(task: Stream, tmp_path: Path) -> None:
    """At once: a file on disk gets no better by waiting."""
    task.lanes(range(1), 1)
    path = tmp_path / "data" / "a.parquet"
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"row group 0 of .*a\.parquet cannot be read"):
        list(task._groups.read(0))
    path.write_bytes(b"PAR1")
    with pytest.raises(OSError, match=r"a\.parquet is damaged"):
        dataclasses.replace(task).lanes(range(1), 1)


def test_refuses(task: Stream, texts: Texts, tmp_path: Path) -> None:
    state = task.lanes(range(B), B).state
    SymbolTokenizer(["a"]).save(tmp_path / "symbols")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    parquet.write_table(pyarrow.table({"text": [" "] * 9}), nothing / "a.parquet", row_group_size=2)
    changed = state.copy()
    changed[:, 3] += 1
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("x")
    for make_it, message in (
        (lambda: task.batch(RNG, 1), r"read it through lanes\(\)"),
        (lambda: task.lanes(range(2, 5), B), r"rows=range\(2, 5\) must be some of the 4 rows"),
        (lambda: task.lanes(range(0, 4, 2), B), "must be some of the 4 rows"),
        (lambda: task.lanes(range(2), B, state), r"state has the shape \(4, 6\), not \(2, 6\)"),
        (lambda: task.lanes(range(B), B, changed), "are not those that the run began with"),
        (lambda: dataclasses.replace(task, column="body").lanes(range(1), 1).next(), "column='body' is not in"),
        (lambda: dataclasses.replace(task, subset="x").lanes(range(1), 1), "data.subset='x' is for a dataset of"),
        (lambda: dataclasses.replace(task, vocabulary=str(tmp_path / "symbols")).vocab_size, "has no end token"),
        (lambda: dataclasses.replace(task, dataset=str(nothing)).lanes(range(1), 1).next(), "no document to train on"),
        (lambda: dataclasses.replace(task, dataset="absent").lanes(range(1), 1), "must be OWNER/NAME"),
        (lambda: dataclasses.replace(task, dataset=str(tmp_path / "mixed")).lanes(range(1), 1), "is no parquet file"),
        (lambda: Stream(""), "data.dataset='' must name"),
        (lambda: Stream("a/b", held_out=0.9), r"data.held_out=0.9"),
        (lambda: Stream("a/b", limit_files=0), r"data.limit_files=0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_it()


def test_ids_that_the_vocabulary_lacks_are_counted(task: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: [999] if "\u20ac" in text else encode(self, text))
    lanes = task.lanes(range(1), 1)
    for _ in range(20):
        assert lanes.next().input_ids.max() < 259
    assert lanes.skipped["ids out of range"] > 5


def test_in_a_configuration(task: Stream, tmp_path: Path) -> None:
    BPETokenizer.train(["some text"], 259).save(tmp_path / "bpe")
    recipe = load_recipe("tiny-text")
    data = dataclasses.replace(task, vocabulary=str(tmp_path / "bpe"))
    cfg = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=259), data=data)
    assert TrainConfig.from_yaml(cfg.to_yaml()) == cfg
    cfg.check_data()
    # The configuration can be made where the data and the network are not.
    dataclasses.replace(cfg, data=Stream("no/where", seq_len=16))
    with pytest.raises(ValueError, match=r"model.vocab_size=200 is too small for data 'stream'"):
        dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=200)).check_data()


def test_ends_quietly_in_the_middle_of_a_row_group(task: Stream) -> None:
    code = f"from open_mythos.tasks import Stream; lanes = {task!r}.lanes(range(4), 4); lanes.next()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
