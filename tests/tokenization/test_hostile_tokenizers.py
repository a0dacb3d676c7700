"""A `tokenizer.json` is a program: those that never end or fill memory are refused, and published kinds still work."""

import base64
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from open_mythos.tokenization.limits import MAX_ADDED, MAX_ENTRIES, MAX_TOKEN_CHARS
from open_mythos.tokenization.tokenizer import BPETokenizer, load_tokenizer, open_tokenizer
from open_mythos.tokenization.tokenizer import Tokenizer as AnyTokenizer

A_TO_40 = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 40}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
# The patterns of published vocabularies.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)


def model(**changes: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], **changes}


def write(folder: Path, **parts: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model(), **parts}))
    return path


def added(content: str, i: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": i, "content": content, **flags}


def sequence(*steps: dict[str, Any], name: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", name: list(steps)}


def charsmap(*strings: str) -> dict[str, Any]:
    texts = b"".join(text.encode() + b"\0" for text in strings)
    return {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(struct.pack("<I", 4) + b"\0" * 4 + texts).decode(),
    }


def nested(depth: int) -> dict[str, Any]:
    step: dict[str, Any] = A_TO_40
    for _ in range(depth):
        step = sequence(step, step)
    return step


TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "five replacements": ({"normalizer": sequence(*[A_TO_40] * 5)}, "normalizer can make a text more than 16 times"),
    "one long replacement": ({"normalizer": {**A_TO_40, "content": "a" * 10**6}}, "normalizer can make a text"),
    "nested sequences": ({"normalizer": nested(4)}, "normalizer can make a text"),
    "sequences without end": ({"normalizer": nested(7)}, "normalizer has more than 64 steps"),
    "a pattern that matches nothing": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y" * 16}},
        "normalizer can make a text",
    ),
    "prefixes": ({"normalizer": sequence(*[{"type": "Prepend", "prepend": "abc"}] * 3)}, "normalizer can make a text"),
    "bytes of bytes": ({"normalizer": sequence(*[{"type": "ByteLevel"}] * 20)}, "normalizer can make a text"),
    "a table of long strings": ({"normalizer": charsmap("a", "b" * 10**6)}, "normalizer can make a text"),
    "tables of tables": ({"normalizer": sequence(*[charsmap("a" * 50)] * 3)}, "normalizer can make a text"),
    "a table that is none": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?a"}}, "tokenizer.json"),
    "bytes of bytes, split": (
        {"pre_tokenizer": sequence(*[{"type": "ByteLevel", "add_prefix_space": True}] * 9, name="pretokenizers")},
        "pre_tokenizer can make a text",
    ),
    "a decoder that grows": ({"decoder": sequence(*[A_TO_40] * 3, name="decoders")}, "decoder can make a text"),
    "a template that repeats": (
        {"post_processor": {**TEMPLATE, "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000}},
        "post_processor repeats the text",
    ),
    "a pattern without end": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a+)+$"}}}, "a pattern fails"),
    "a pattern of cubes": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "a*a*b"}}}, "a pattern takes too long"),
    "a pattern of words": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": r"(\w+\s?)+!"}}}, "a pattern fails"),
    "a pattern to replace": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|a)+$"}, "content": ""}},
        "a pattern fails",
    ),
    "a pattern to decode": (
        {"decoder": {"type": "Replace", "pattern": {"Regex": "(a|a)+$"}, "content": ""}},
        "a pattern fails",
    ),
    "a pattern that is none": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "("}}}, "a pattern fails"),
    "a long pattern": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "a" * 10**5}}}, "a pattern has 100000"),
    "a long token": ({"model": model(vocab={"a" * (MAX_TOKEN_CHARS + 1): 0})}, "has a token of 1025 characters"),
    "a long piece": (
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * (MAX_TOKEN_CHARS + 1), 0.0]]}},
        "has a token of 1025 characters",
    ),
    "a long added token": ({"added_tokens": [added("a" * 10**5, 2)]}, "added_tokens has a token of 100000"),
    "a large id": ({"model": model(vocab={"a": 4 * 10**9})}, "the largest id of a token=4000000000"),
    "a large added id": ({"added_tokens": [added("<x>", 4 * 10**9)]}, "the largest id of a token=4000000000"),
    "a long suffix": ({"model": model(end_of_word_suffix="a" * 10**6)}, "model.end_of_word_suffix="),
    "long words": (
        {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "max_input_chars_per_word": 10**9}},
        "model.max_input_chars_per_word=1000000000",
    ),
    "a number of 4,000 digits": ({"model": model(vocab={"a": 10**4000})}, "finite number"),
    "a list for a model": ({"model": []}, "is no tokenizer.json"),
    "a vocabulary of no kind": ({"model": model(vocab=3)}, "is no tokenizer.json"),
    "a step that is unknown": ({"normalizer": {"type": "Exec", "command": "ls"}}, "is no tokenizer.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    parts, message = REFUSED[name]
    write(tmp_path, **parts)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value) and len(str(error.value)) < 900


MANY: dict[str, dict[str, Any]] = {
    "model.vocab": {"model": model(vocab={str(i): i for i in range(101)})},
    "model.merges": {"model": model(merges=["a b"] * 201)},
    "added_tokens": {"added_tokens": [added(f"<{i}>", i) for i in range(51)]},
}


@pytest.mark.parametrize("name", MANY)
def test_entries_are_counted_before_the_library_sees_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_mythos.tokenization.limits.MAX_ENTRIES", 100)
    monkeypatch.setattr("open_mythos.tokenization.limits.MAX_ADDED", 50)
    monkeypatch.setattr("tokenizers.Tokenizer.from_str", lambda text: pytest.fail("the library read it"))
    write(tmp_path, **MANY[name])
    with pytest.raises(ValueError, match=rf"{name} has \d+ entries, and may have \d+; use"):
        load_tokenizer(tmp_path)
    assert MAX_ENTRIES >= 2 * 262_144 and MAX_ADDED >= 2 * 32_768  # of published vocabularies


@pytest.mark.parametrize("entry", ['"a":1,', '["a",1],'])
def test_millions_of_entries_are_not_even_parsed(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_mythos.tokenization.limits.parse_json", lambda text, name: pytest.fail("it was parsed"))
    (tmp_path / "tokenizer.json").write_text('{"model":{"vocab":' + entry * 2_000_000)
    with pytest.raises(ValueError, match=r"tokenizer\.json has more than 524288 tokens"):
        load_tokenizer(tmp_path)


def test_the_file_itself_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="nested too deeply"):
        load_tokenizer(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"tokenizer\.json has more than 67108864 bytes"):
        open_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "normalizer": null, "normalizer": null}')
    with pytest.raises(ValueError, match="the key 'normalizer' twice"):
        load_tokenizer(tmp_path)


ROLES = {
    "a list": ("[]", "holds no JSON object"),
    "a number": ('{"bos_token": 3}', "bos_token=3, which must be a string"),
    "brackets": ("[" * 10**5, "nested too deeply"),
    "half a pair": (r'{"bos_token": "\ud800"}', "half of a surrogate pair"),
    "nothing": ("", "cannot be read as JSON"),
}


@pytest.mark.parametrize("name", ROLES)
def test_special_tokens_that_are_none(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    text, message = ROLES[name]
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "tokenizer_config.json" in str(error.value)


def test_what_the_library_raises_is_named(tmp_path: Path) -> None:
    """Its errors are plain Exceptions, and its panics not even that."""
    write(tmp_path, model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"})
    with pytest.raises(ValueError, match="cannot encode this text"):
        load_tokenizer(tmp_path).encode("b")
    panicking = Tokenizer(models.BPE({"a": 0}, []))
    panicking.pre_tokenizer = pre_tokenizers.Split(__import__("tokenizers").Regex("(a+)+$"), "isolated")
    with pytest.raises(ValueError, match="cannot encode this text"):
        BPETokenizer(panicking).encode("a" * 50 + "!")


def test_a_text_that_unicode_makes_long_is_refused(tmp_path: Path) -> None:
    """The longest character of NFKC becomes 18; its text is refused where it would fill memory, not before."""
    write(tmp_path, normalizer={"type": "NFKC"}, model=model(vocab={"a": 0, "?": 1}, unk_token="?"))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("\ufdfa" * 1000)) == 18_000
    assert tokenizer.encode("a" * 100_000) == [0] * 100_000
    with pytest.raises(ValueError, match="a text of 1000000 characters becomes longer than 8065536"):
        tokenizer.encode("\ufdfa" * 1_000_000)


def byte_level(**parts: Any) -> Tokenizer:
    backend = BPETokenizer.train_from_text("the cat sat on the mat, don't it? 1234 \u4e2d\u6587\n" * 9, 300).backend
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def split_by(pattern: str) -> Any:
    from tokenizers import Regex

    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)  # ty: ignore[invalid-argument-type]


def sentencepiece(kind: str) -> Tokenizer:
    pieces = ["<unk>", "\u2581", "\u2581the", *"acehmnostdi1234,'?\u4e2d\u6587"]
    if kind == "unigram":
        backend = Tokenizer(models.Unigram([(piece, -1.0 - i) for i, piece in enumerate(pieces)], unk_id=0))
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Replace(" ", " ")]
        )
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        return backend
    vocab = {piece: i for i, piece in enumerate(pieces)} | {f"<0x{i:02X}>": 100 + i for i in range(256)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def word_piece() -> Tokenizer:
    words = ["[UNK]", "the", "cat", *"abcdefghijklmnopqrstuvwxyz1234,'?", *(f"##{c}" for c in "abcdehimnost234")]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


PUBLISHED = {
    "GPT-2": lambda: byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "GPT-2, its pattern written out": lambda: byte_level(pre_tokenizer=split_by(GPT2)),
    "Llama 3": lambda: byte_level(pre_tokenizer=split_by(LLAMA3)),
    "Qwen": lambda: byte_level(normalizer=normalizers.NFC(), pre_tokenizer=split_by(LLAMA3)),
    "GPT-4": lambda: byte_level(pre_tokenizer=split_by(CL100K)),
    "gpt-oss": lambda: byte_level(pre_tokenizer=split_by(O200K)),
    "Llama 2": lambda: sentencepiece("bpe"),
    "T5": lambda: sentencepiece("unigram"),
    "BERT": word_piece,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_kinds_of_tokenizers_work(name: str, tmp_path: Path) -> None:
    """They give the library's own ids, for short texts and long ones."""
    backend = PUBLISHED[name]()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer: AnyTokenizer = load_tokenizer(tmp_path)
    for text in (
        "",
        "the cat",
        "The cat sat; don't it? 1234 \u4e2d\u6587\n\n  the",
        "the cat \n" * 3000,
        " " * 5000,
        "a" * 5000,
    ):
        ids = backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == backend.decode(ids)


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    """The five replacements of 40 in a process that has little memory."""
    write(tmp_path, normalizer=sequence(*[A_TO_40] * 5))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
        "from open_mythos.tokenization.tokenizer import load_tokenizer\n"
        f"try: load_tokenizer({str(tmp_path)!r}).encode('a')\n"
        "except ValueError as error: sys.exit(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and "normalizer can make a text" in done.stderr
