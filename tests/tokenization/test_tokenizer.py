"""Tokenizers: exact round trips, streaming, and what is saved comes back."""

import json
import re
import threading
import time

import huggingface_hub
import pytest
import tokenizers
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from open_mythos.assets import novel
from open_mythos.tokenization.detokenizer import TextStream
from open_mythos.tokenization.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    MythosTokenizer,
    SymbolTokenizer,
    load_tokenizer,
)

BPE = BPETokenizer.train_from_text(novel()[:50_000], vocab_size=400)
ADDITION = SymbolTokenizer([*"0123456789+=", "<pad>", "$"], eos="$", pad="<pad>")
HOPS = SymbolTokenizer([f"n{i}" for i in range(12)] + ["?", "<pad>"], pad="<pad>", separator=" ")


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("caf\u00e9 \U0001f600\n\x00")
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_any_text_comes_back(tokenizer, text: str) -> None:
    assume(not re.search("<(bos|eos|pad)>", text))
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE, ADDITION, HOPS], ids=["bytes", "bpe", "addition", "hops"])
@given(ids=st.lists(st.integers(0, 600), max_size=40))
@example(ids=[0xF0, 0x9F, 0x98, 0xFF, 0x80, 0xC3])
def test_any_ids_decode_and_stream_to_the_same_text(tokenizer, ids: list[int]) -> None:
    """Also ids that no token has: a model's vocabulary may be padded."""
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_stream_shows_whole_characters_at_once() -> None:
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode("a\u00e9\U0001f600b")]
    assert pieces == ["a", "", "\u00e9", "", "", "", "\U0001f600", "b"]


def test_stream_keeps_the_spaces_of_a_vocabulary_that_strips_the_first() -> None:
    words = {"<unk>": 0, "\u2581one": 1, "\u2581two": 2, "\u2581three": 3, "<eos>": 4}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<eos>"])
    stream = TextStream(BPETokenizer(backend))
    assert [stream.push(i) for i in [1, 2, 4, 3]] == ["one", " two", "", " three"]


def test_special_tokens_are_left_out_of_text() -> None:
    assert ByteTokenizer().decode([256, 104, 105, 257, 258]) == "hi"
    assert BPE.decode([BPE.bos_id, *BPE.encode("hi"), BPE.eos_id, BPE.pad_id]) == "hi"
    assert ADDITION.decode([1, 2, 13, 12, 12]) == "12"


def test_symbols_read_what_a_user_types() -> None:
    assert ADDITION.encode("12 + 34=\n") == [1, 2, 10, 3, 4, 11]
    assert ADDITION.encode("46$<pad>") == [4, 6, 13, 12]
    assert HOPS.encode("n1 n11 n1n2?") == [1, 11, 1, 2, 12]  # the longest symbol wins
    assert HOPS.encode(HOPS.decode([1, 1, 11, 0])) == [1, 1, 11, 0]
    with pytest.raises(ValueError, match=re.escape("'x' at position 2 of '1+x=' starts no symbol; use 0 1 2")):
        ADDITION.encode("1+x=")


@pytest.mark.parametrize("symbols", [[], ["a", "a"], ["a", ""], ["a b"]])
def test_symbols_must_be_distinct(symbols: list[str]) -> None:
    with pytest.raises(ValueError, match="must be different and without white space"):
        SymbolTokenizer(symbols)


def test_symbol_roles_must_exist() -> None:
    with pytest.raises(ValueError, match=re.escape("eos='$' must be one of the symbols")):
        SymbolTokenizer(["a"], eos="$")


@pytest.mark.parametrize(
    ("vocab_size", "error", "rule"),
    [
        (258, ValueError, "between 259 and 524288"),
        (0, ValueError, "between 259 and 524288"),
        (True, TypeError, "int, not bool"),
        (300.0, TypeError, "int, not float"),
    ],
)
def test_bpe_refuses_a_vocabulary_without_room_for_bytes(vocab_size, error, rule) -> None:
    with pytest.raises(error, match=f"vocab_size={vocab_size} must be {rule}; use vocab_size=4096"):
        BPETokenizer.train_from_text("text", vocab_size)


def test_bpe_has_the_size_asked_for_and_compresses() -> None:
    text = novel()[50_000:60_000]
    assert BPE.vocab_size == 400
    assert len(BPE.encode(text)) < 0.75 * len(text)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE, ADDITION, HOPS], ids=["bytes", "bpe", "addition", "hops"])
def test_save_and_load(tokenizer, tmp_path) -> None:
    folder = tmp_path / "a" / "model"
    tokenizer.save(folder)
    loaded = load_tokenizer(str(folder))
    ids = list(range(tokenizer.vocab_size))
    assert type(loaded) is type(tokenizer)
    assert loaded.decode(ids) == tokenizer.decode(ids)
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name)


def test_load_names_the_remedy(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither tokenizer.json nor mythos_tokenizer.json; save one"):
        load_tokenizer(tmp_path)
    (tmp_path / "mythos_tokenizer.json").write_text('{"type": "words"}')
    with pytest.raises(ValueError, match="has no type 'bytes' or 'symbols'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer.json of the tokenizers library"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("how", ["truncation", "padding"])
def test_a_file_neither_cuts_nor_fills_up(tmp_path, how) -> None:
    bpe = BPETokenizer.train_from_text("abcdefgh", 260)
    bpe.backend.enable_truncation(3) if how == "truncation" else bpe.backend.enable_padding(length=1000)
    bpe.save(tmp_path)
    ids = load_tokenizer(tmp_path).encode("abcdefgh")
    assert len(ids) < 1000 and load_tokenizer(tmp_path).decode(ids) == "abcdefgh"


def test_others_run_while_a_long_text_is_read() -> None:
    """A server goes on answering."""
    bpe, ticks, done = BPETokenizer.train_from_text("abc", 260), 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    ticking = threading.Thread(target=tick)
    ticking.start()
    before = ticks
    bpe.encode("ab " * 2**17)
    after = ticks
    done.set()
    ticking.join()
    assert after - before > 5


def test_mythos_tokenizer_reads_a_folder_and_a_file(tmp_path) -> None:
    BPE.save(tmp_path)
    from_folder, from_file = MythosTokenizer(str(tmp_path)), MythosTokenizer(str(tmp_path / "tokenizer.json"))
    for tokenizer in (from_folder, from_file):
        assert tokenizer.encode("Anne Elliot") == BPE.encode("Anne Elliot")
        assert (tokenizer.vocab_size, tokenizer.eos_id) == (400, 1)


def test_published_vocabulary_with_gaps_and_named_roles(tmp_path) -> None:
    """gpt-oss: special tokens lie above a gap, and tokenizer_config.json names them, as text or as an object."""
    content = json.loads(BPE.backend.to_str())
    content["model"]["vocab"]["<pad>"] = content["added_tokens"][2]["id"] = 900
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    roles = {"eos_token": {"content": "<eos>", "lstrip": False}, "pad_token": "<pad>", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    tokenizer = MythosTokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    assert tokenizer.encode("<pad>") == [900]
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (900, 901)


def test_hub_download(tmp_path, monkeypatch) -> None:
    BPE.save(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda model_id, name: str(tmp_path / name))
    assert MythosTokenizer("some/model").eos_id == 1


def test_a_tokenizer_that_was_downloaded_before_needs_no_hub(tmp_path, monkeypatch) -> None:
    BPE.save(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: 1 / 0)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda model_id, name: str(tmp_path / name))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda model_id, name: str(tmp_path / name))
    assert MythosTokenizer("some/model").eos_id == 1


def test_hub_out_of_reach_names_the_remedy_at_once(monkeypatch) -> None:
    """The hub is asked once: what downloads would try again and again, and print each try."""

    def offline(url: str) -> None:
        raise ConnectionError("no connection")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: 1 / 0)
    with pytest.raises(OSError, match=r"tokenizer 'some/model' is no local path .* pass a folder that holds"):
        MythosTokenizer("some/model")
