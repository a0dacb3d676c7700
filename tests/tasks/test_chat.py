"""The task chat: rows, what it skips, and a model that learns to answer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from open_mythos.cli import main
from open_mythos.generation.generate import reply
from open_mythos.model import OpenMythos
from open_mythos.tasks import Chat
from open_mythos.tasks.task import IGNORE
from open_mythos.tokenization.chat_template import render
from open_mythos.tokenization.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
from open_mythos.train.config import TrainConfig

RNG = np.random.default_rng(0)
CONVERSATIONS = Path(__file__).parent / "chat.jsonl"


def conversation(i: int) -> dict:
    asked, said = f"What is {i} + {i}?", f"{2 * i}" + "!" * (i % 7)
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> str:
    """200 conversations."""
    path = tmp_path_factory.mktemp("chat") / "sums.jsonl"
    path.write_text("\n".join(json.dumps(conversation(i)) for i in range(200)))
    return str(path)


def split(ids: list[int]) -> list[tuple[int, ...]]:
    """The conversations of a row over bytes: each has two turns."""
    ids = [i for i in ids if i != ByteTokenizer.pad_id]
    ends = [place + 1 for place, i in enumerate(ids) if i == ByteTokenizer.eos_id][1::2]
    return [tuple(ids[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def test_rows_hold_whole_conversations_and_the_loss_is_on_answers(sums: str) -> None:
    task = Chat((sums,), seq_len=150, held_out=0.1)
    tokenizer = ByteTokenizer()
    known = {tuple(render(conversation(i)["messages"], tokenizer)[0]): i for i in range(200)}
    validation = {
        known[split([*row, tokenizer.eos_id])[0]] for row in task.validation_batch(RNG, 64).input_ids.tolist()
    }
    seen: list[int] = []
    for row in range(1000):
        batch = task.batch(RNG, 1, first_row=row)
        ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
        assert len(ids) == len(labels) == 150
        # The last label may be the end of the last conversation, which the model is never given.
        whole = [*ids, labels[-1] if labels[-1] != IGNORE else tokenizer.pad_id]
        found = split(whole)
        assert len(found) > 1 and all(one in known for one in found)
        expected = [IGNORE] * len(whole)
        at = 0
        for one in found:
            answer = render(conversation(known[one])["messages"], tokenizer)[1]
            expected[at : at + len(one)] = [i if said else IGNORE for i, said in zip(one, answer, strict=True)]
            at += len(one)
        assert labels == expected[1:]
        seen += [known[one] for one in found]
        if len(set(seen)) + len(validation) >= 200 and len(seen) > len(set(seen)):
            break
    # Every conversation that is not held out came before any came again.
    assert not set(seen) & validation and 5 < len(validation) < 40
    assert len(set(seen)) == 200 - len(validation) == len(set(seen[: 200 - len(validation)]))


def test_rows_do_not_depend_on_how_they_are_asked_for(sums: str) -> None:
    whole = Chat((sums,), seq_len=100).batch(RNG, 200)
    for first, rows in ((0, 1), (7, 63), (199, 1)):
        part = Chat((sums,), seq_len=100).batch(np.random.default_rng(first), rows, first_row=first)
        assert torch.equal(part.input_ids, whole.input_ids[first : first + rows])
        assert torch.equal(part.labels, whole.labels[first : first + rows])
    other = Chat((sums,), seq_len=100, order_seed=1).batch(RNG, 200)
    assert not torch.equal(other.input_ids, whole.input_ids)


def test_bad_records_are_skipped_and_counted(tmp_path: Path) -> None:
    good = json.dumps(conversation(3))
    path = tmp_path / "chat.jsonl"
    bad = [
        "no json",
        '{"text": "another format"}',
        '{"messages": [{"role": "tool", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "assistant", "content": "' + 200 * "a" + '"}]}',
        '{"messages": [{"role": "assistant", "content": "<|user|>"}]}',
        '{"messages": [{"role": "assistant", "content": 3}]}',
        "[" * 100_000,
    ]
    path.write_text("\n".join(["", good, *bad, "   ", good]))
    with pytest.warns(UserWarning, match="8 of 10 conversations skipped: 2 invalid JSON, 1 no messages") as caught:
        batch = Chat((str(path),), seq_len=100, held_out=0).batch(RNG, 2)
    for reason in ("unknown role", "no assistant turn", "too long", "marker in the text", "content is no text"):
        assert f"1 {reason}" in str(caught[0].message)
    assert len(split([*batch.input_ids[0].tolist(), ByteTokenizer.eos_id])) == 2

    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"holds no conversation to train on \(0 whole ones, skipped: 1 invalid JSON"):
        Chat((str(path),)).batch(RNG, 1)


def test_a_row_that_just_fits(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(conversation(3)))
    n = len(render(conversation(3)["messages"], ByteTokenizer())[0])
    labels = Chat((str(path),), seq_len=n - 1, held_out=0).batch(RNG, 1).labels
    assert labels[0, -1] == ByteTokenizer.eos_id
    with pytest.raises(ValueError, match="skipped: 1 too long"):
        Chat((str(path),), seq_len=n - 2, held_out=0).batch(RNG, 1)


def test_refuses(sums: str) -> None:
    for named, make in (
        ("data.paths='a.jsonl' must be a list", lambda: Chat("a.jsonl")),
        ("data.paths is empty", lambda: Chat().batch(RNG, 1)),
        ("nowhere.jsonl cannot be read", lambda: Chat(("nowhere.jsonl",)).batch(RNG, 1)),
        ("data.held_out=0.95", lambda: Chat(held_out=0.95)),
        ("data.held_out=0.0001 holds out none of 200", lambda: Chat((sums,), held_out=1e-4).batch(RNG, 1)),
        ("data.seq_len=0", lambda: Chat(seq_len=0)),
    ):
        with pytest.raises((ValueError, TypeError), match=named):
            make()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model of two steps, over a BPE."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("Who wrote Persuasion? What is a loop? It is one application of the block. " * 30)
    small = ["--model.dim", "64", "--model.vocab-size", "320", "--data.kind", "bpe", "--data.bpe-vocab-size", "320"]
    command = [
        "train",
        "tiny-text",
        "--out",
        str(folder / "run"),
        "--steps",
        "2",
        *small,
        "--data.path",
        str(folder / "text.txt"),
        "--data.seq-len",
        "32",
    ]
    assert main([*command, "--device", "cpu", "--threads", "1"]) == 0
    return folder / "run" / "final"


def test_a_model_learns_to_answer(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--data.seq-len", "192", "--data.held-out", "0", "--steps", "120", "--batch-size", "2"]
    options += ["--optim.kind", "muon", "--optim.lr", "5e-3", "--optim.muon-lr", "2e-2", "--eval.every", "0"]
    command = ["train", "chat", "--init-from", str(base), "--data.paths", str(CONVERSATIONS), *options]
    assert main([*command, "--loops.mean", "2", "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    cfg = TrainConfig.load(tmp_path / "run" / "config.yaml")
    assert cfg.init_from == cfg.data.tokenizer_from == str(base) and cfg.model.dim == 64

    final = tmp_path / "run" / "final"
    model, tokenizer = OpenMythos.from_pretrained(final), load_tokenizer(final)
    assert isinstance(tokenizer, BPETokenizer)
    for line in CONVERSATIONS.read_text("utf-8").splitlines():
        messages = json.loads(line)["messages"]
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                assert reply(model, tokenizer, messages[:place], 48, temperature=0) == message["content"]
    capsys.readouterr()
    generate = ["generate", str(final), "Who wrote Persuasion?", "--chat", "--temperature", "0", "--device", "cpu"]
    assert main(generate) == 0
    assert capsys.readouterr() == ("Jane Austen.\n", "")
    assert main(["generate", str(base), "Who?", "--chat", "--max-new-tokens", "1", "--device", "cpu"]) == 0
    told = capsys.readouterr().err
    assert f"mythos generate: {base} was not trained on conversations" in told and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "--init-from is missing"),
        (["--init-from", "nowhere"], "nowhere/config.json does not exist"),
        (["--init-from", "{base}"], "data.paths is empty; name files of JSON lines"),
        (["--init-from", "{base}", "--data.paths", "nowhere.jsonl"], "nowhere.jsonl does not exist; check the path"),
    ],
)
def test_the_recipe_names_what_is_missing(
    args: list[str], told: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    args = [arg.format(base=base) for arg in args]
    assert main(["train", "chat", "--out", str(tmp_path / "run"), *args]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
