"""Conversations in the layouts of others, against the same in the layout of messages."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from open_mythos.data.conversations import to_messages
from open_mythos.tasks import Chat
from open_mythos.tokenization.chat_template import render
from open_mythos.tokenization.tokenizer import ByteTokenizer

RNG = np.random.default_rng(0)
ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
]
SHARE = {"system": "system", "user": "human", "assistant": "gpt"}
SAME = {
    "messages": {"messages": ASKED, "id": 7},
    "messages with more fields": {"messages": [{**m, "name": "x", "tool_calls": None} for m in ASKED]},
    "sharegpt": {"conversations": [{"from": SHARE[m["role"]], "value": m["content"]} for m in ASKED]},
    "sharegpt, system apart": {
        "system": "Be brief.",
        "conversations": [{"from": SHARE[m["role"]], "value": m["content"]} for m in ASKED[1:]],
    },
    "sharegpt, no system prompt but a turn": {
        "system_prompt": None,
        "conversations": [{"from": SHARE[m["role"]], "value": m["content"]} for m in ASKED],
    },
    "sharegpt with the roles of messages": {
        "conversations": [{"from": m["role"], "value": m["content"]} for m in ASKED]
    },
    "conversation of messages": {"conversation": ASKED},
    "alpaca": {"system": "Be brief.", "instruction": "What is 2 + 2?", "input": "", "output": "4"},
}


@pytest.mark.parametrize("name", SAME)
def test_layouts(name: str) -> None:
    messages = to_messages(SAME[name])
    assert [{"role": m["role"], "content": m["content"]} for m in messages] == ASKED  # ty: ignore[not-iterable]


def test_alpaca_with_input_and_history() -> None:
    record = {"instruction": "Add.", "input": "2 and 2", "output": "4", "history": [["Hello", "Good morning"]]}
    contents = [message["content"] for message in to_messages(record)]  # ty: ignore[not-iterable]
    assert contents == ["Hello", "Good morning", "Add.\n\n2 and 2", "4"]


BAD = {
    "unknown role": [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
        {"messages": [{"content": "a"}]},
        {"conversations": ["a", "b"]},
    ],
    "content is no text": [
        {"instruction": "a", "input": 7, "output": "b"},
        {"instruction": "a", "output": None},
        {"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]},
    ],
    "no messages": [{"conversations": "text"}, {"conversations": []}, {"text": "a"}, [1], {"instruction": "a"}],
}


def test_what_is_no_conversation_is_skipped_by_name(tmp_path: Path) -> None:
    records = [record for reason in BAD.values() for record in reason]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, [*records, *SAME.values()])))
    with pytest.warns(UserWarning, match=f"{len(records)} of {len(records) + len(SAME)} conversations") as caught:
        Chat((str(path),), held_out=0).batch(RNG, 1)
    told = str(caught[0].message)
    for reason, bad in BAD.items():
        assert f"{len(bad)} {reason}" in told and f"Skipped, {reason}: {len(bad)} in 1 file" in told
    assert f"{path}, line 1: messages[1] has role='function_call'; use one of system, user" in told
    assert "a conversation has the field messages, or conversations, or instruction and output, not text" in told


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_kinds_of_files(tmp_path: Path, name: str) -> None:
    """All layouts in each kind of file give the same rows."""
    path, n = tmp_path / name, len(SAME)
    text = json.dumps(list(SAME.values())) if "json." in name + "." else "\n".join(map(json.dumps, SAME.values()))
    data = text.encode("utf-8-sig")
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    ids = render(ASKED, ByteTokenizer())[0]
    batch = Chat((str(path),), seq_len=n * len(ids) - 1, held_out=0).batch(RNG, 1)
    assert torch.equal(batch.input_ids[0], torch.tensor((ids * n)[:-1]))


def test_the_reported_case(shared: Path) -> None:
    with pytest.warns(UserWarning, match="2 conversations are few"):
        train, held_out = Chat((str(shared / "cases" / "sharegpt" / "share.jsonl"),))._parts
    assert len(train) == len(held_out) == 1


def conversations(n: int, copies: int, path: Path) -> str:
    messages = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(n)]
    path.write_text("\n".join(json.dumps({"messages": one}) for one in messages * copies))
    return str(path)


def test_few_conversations(tmp_path: Path) -> None:
    """At least one is held out by default, with all its copies; a share that is given is obeyed or refused."""
    for n in (2, 3, 5):
        path, parts = conversations(n, 10, tmp_path / f"{n}.jsonl"), None
        if all(place >= 0.05 for place in places(path)):
            with pytest.warns(
                UserWarning, match=rf"{10 * n} conversations are few: 10 of them, all alike.*--data.held-out 0"
            ):
                parts = Chat((path,))._parts
            assert [len(part) for part in parts] == [10 * (n - 1), 10]
            assert not {ids.tobytes() for ids, _ in parts[0]} & {ids.tobytes() for ids, _ in parts[1]}
            with pytest.raises(ValueError, match=r"holds out none of \d+ conversations; use --data.held-out 0"):
                Chat((path,), held_out=0.05).batch(RNG, 1)
        train, held_out = Chat((path,), held_out=0)._parts
        assert len(train) == 10 * n and train is held_out
    with pytest.raises(ValueError, match=r"holds out none of 3 conversations; use --data.held-out 0"):
        Chat((conversations(1, 3, tmp_path / "one.jsonl"),)).batch(RNG, 1)


def places(path: str) -> list[float]:
    from open_mythos.tasks.chat import _place

    return [_place(json.loads(line)["messages"]) for line in Path(path).read_text().splitlines()]


def test_many_conversations_are_held_out_as_by_the_share(tmp_path: Path) -> None:
    path = conversations(400, 1, tmp_path / "many.jsonl")
    ours, theirs = Chat((path,))._parts, Chat((path,), held_out=0.05)._parts
    assert [len(part) for part in ours] == [len(part) for part in theirs] and 5 < len(ours[1]) < 50
