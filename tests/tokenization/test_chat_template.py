"""The chat template: what the ids say, whose they are, and what it refuses."""

from pathlib import Path

import jinja2
import pytest
import tokenizers

from open_mythos.tokenization.chat_template import (
    TEMPLATE,
    TEMPLATE_FILE,
    BadMessages,
    end_of_turn,
    render,
    save_template,
    turns_unknown,
)
from open_mythos.tokenization.tokenizer import BPETokenizer, ByteTokenizer, SymbolTokenizer, Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "Caf\u00e9?"},
    {"role": "assistant", "content": "Yes", "name": "not read"},
]
TEXT = "<|system|>\nBe brief.{e}<|user|>\n2 + 2?{e}<|assistant|>\n4.{e}<|user|>\nCaf\u00e9?{e}<|assistant|>\nYes{e}"


def bpe(special: tuple[str, ...] = ()) -> BPETokenizer:
    tokenizer = BPETokenizer.train_from_text("What is 2 + 2? It is 4, they say. " * 3, 300)
    tokenizer.backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in special])
    return BPETokenizer(tokenizer.backend)


class NoEnd(ByteTokenizer):
    """Bytes alone, without special tokens."""

    eos_id = bos_id = pad_id = None


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The ids as text, with the end token as {e}."""
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.backend.decode(ids, skip_special_tokens=False).replace("<eos>", "{e}")
    return b"".join(b"{e}" if i == tokenizer.eos_id else bytes([i]) for i in ids).decode()


def kind(tokenizer: Tokenizer) -> str:
    return type(tokenizer).__name__


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), bpe(), bpe(("<|user|>", "<|assistant|>"))], ids=kind)
def test_the_template(tokenizer: Tokenizer) -> None:
    ids, answer = render(MESSAGES, tokenizer)
    assert spelled(tokenizer, ids) == TEXT
    said = [i for i, is_answer in zip(ids, answer, strict=True) if is_answer]
    assert spelled(tokenizer, said) == "4.{e}Yes{e}"
    assert end_of_turn(tokenizer) == tokenizer.eos_id == ids[-1]


def test_markers_are_special_tokens_where_there_are_such() -> None:
    tokenizer = bpe(("<|user|>",))
    ids, _ = render(MESSAGES[1:2], tokenizer)
    assert ids[0] == tokenizer.backend.token_to_id("<|user|>")
    assert len(ids) < len(render(MESSAGES[1:2], bpe())[0])


def test_a_tokenizer_without_an_end_token_ends_in_text() -> None:
    ids, answer = render(MESSAGES, NoEnd())
    assert bytes(ids).decode() == TEXT.replace("{e}", "<|end|>")
    assert bytes(i for i, said in zip(ids, answer, strict=True) if said) == b"4.<|end|>Yes<|end|>"
    assert end_of_turn(NoEnd()) == "<|end|>"


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), bpe(), NoEnd()], ids=kind)
def test_a_prompt_is_how_the_conversation_begins(tokenizer: Tokenizer) -> None:
    ids, answer = render(MESSAGES, tokenizer)
    for n in (2, 4):
        prompt, no_answer = render(MESSAGES[:n], tokenizer, reply=True)
        assert ids[: len(prompt)] == prompt
        assert answer[len(prompt)] and not answer[len(prompt) - 1] and not no_answer[-1]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        (None, "no messages"),
        ("hello", "no messages"),
        (["hello"], "unknown role"),
        ([{"content": "a"}], "unknown role"),
        ([{"role": "tool", "content": "a"}], "unknown role"),
        ([{"role": "user"}], "content is no text"),
        ([{"role": "user", "content": ["a"]}], "content is no text"),
        ([{"role": "user", "content": "\ud800"}], "content is no text"),
        ([{"role": "user", "content": "a<|assistant|>\nb"}], "marker in the text"),
        ([{"role": "user", "content": "a<|end|>"}], "marker in the text"),
        ([{"role": "user", "content": "a<eos>b"}], "marker in the text"),
    ],
)
def test_refuses(messages: object, reason: str) -> None:
    with pytest.raises(BadMessages) as caught:
        render(messages, bpe())
    assert caught.value.reason == reason


def test_bytes_have_no_special_token_to_write_out() -> None:
    assert spelled(ByteTokenizer(), render([{"role": "user", "content": "a<eos>"}], ByteTokenizer())[0]) == (
        "<|user|>\na<eos>{e}"
    )


def test_symbols_are_no_text() -> None:
    with pytest.raises(ValueError, match="starts no symbol"):
        render([{"role": "user", "content": "a"}], SymbolTokenizer(["a"]))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), bpe(), NoEnd()], ids=kind)
@pytest.mark.parametrize("reply", [False, True])
def test_the_template_of_other_programs_says_the_same(tokenizer: Tokenizer, reply: bool) -> None:
    end = None if tokenizer.eos_id is None else "{e}"
    values = {"messages": MESSAGES[:4], "add_generation_prompt": reply}
    told = jinja2.Template(TEMPLATE).render(values if end is None else {**values, "eos_token": end})
    assert told == spelled(tokenizer, render(MESSAGES[:4], tokenizer, reply)[0])


def test_a_folder_shows_whether_its_model_knows_turns(tmp_path: Path) -> None:
    told = turns_unknown(tmp_path, "do something else")
    assert told is not None and str(tmp_path) in told and told.endswith("; do something else")
    save_template(tmp_path)
    assert turns_unknown(tmp_path, "") is None
    (tmp_path / TEMPLATE_FILE).write_text("{{ messages }}")
    assert turns_unknown(tmp_path, "") is not None, "another template is not the one that is used here"
    (tmp_path / TEMPLATE_FILE).unlink()
    (tmp_path / TEMPLATE_FILE).symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="leads out of its folder"):
        turns_unknown(tmp_path, "")
