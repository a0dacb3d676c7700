"""The text of an answer as it comes, against the text of all its ids at once."""

import random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from open_mythos.assets import novel
from open_mythos.tokenization.detokenizer import AnswerText, TextStream
from open_mythos.tokenization.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer


def byte_fallback() -> BPETokenizer:
    """A vocabulary as sentencepiece makes it: words with their space, and one token for each byte of the rest."""
    ids = {f"<0x{i:02X}>": i for i in range(256)} | {"\u2581a": 256, "\u2581bc": 257, "b": 258, "<unk>": 259}
    backend = tokenizers.Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return BPETokenizer(backend)


BPE = BPETokenizer.train_from_text(novel()[:50_000] + "\u00e9\u20ac\U0001f600\u4e2d\u6587" * 50, vocab_size=500)
FALLBACK = byte_fallback()
WHOLE = {"bytes": ByteTokenizer(), "bpe": BPE}
ALPHABET = "ab \n\u00e9\u20ac\U0001f600\U0001f601\u4e2d\ufffd"


def pieces(tokenizer: Tokenizer, ids: list[int], stops: list[str], prompt: list[int]) -> tuple[list[str], str | None]:
    answer = AnswerText(tokenizer, stops, prompt)
    return [*[answer.push(i) for i in ids], answer.flush()], answer.stopped


def reference(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], prompt: list[int]
) -> tuple[str, str | None, int | None]:
    """Text and stop string from decoding everything again for each id, and the place of the id that stopped it."""
    start = len(tokenizer.decode(prompt))
    for n in range(len(ids) + 1):
        text = tokenizer.decode(prompt + ids[:n])[start:]
        # What is half a character now is no text yet.
        sure = text.removesuffix("\ufffd") if n < len(ids) else text
        found = [(sure.index(stop), i) for i, stop in enumerate(stops) if stop in sure]
        if found:
            return sure[: min(found)[0]], stops[min(found)[1]], n
    return text, None, None


texts = st.text(ALPHABET, max_size=30)


@pytest.mark.parametrize("kind", WHOLE)
@given(prompt=texts, text=texts, stops=st.lists(st.text(ALPHABET[:-1], min_size=1, max_size=3), max_size=3))
def test_pieces_join_to_the_text_before_the_first_stop(kind: str, prompt: str, text: str, stops: list[str]) -> None:
    tokenizer = WHOLE[kind]
    ids, before = tokenizer.encode(text), tokenizer.encode(prompt)
    shown, stopped = pieces(tokenizer, ids, stops, before)
    assert ("".join(shown), stopped) == reference(tokenizer, ids, stops, before)[:2]


@pytest.mark.parametrize("kind", WHOLE)
@given(ids=st.lists(st.integers(0, 520), max_size=60), prompt=st.lists(st.integers(0, 520), max_size=40))
def test_any_ids_behind_any_prompt(kind: str, ids: list[int], prompt: list[int]) -> None:
    """Half characters, special tokens and ids that no token has, on either side."""
    shown, _ = pieces(WHOLE[kind], ids, [], prompt)
    assert "".join(shown) == WHOLE[kind].decode(prompt + ids)[len(WHOLE[kind].decode(prompt)) :]


@given(prompt=st.text("ab\u00e9\u4e2d", max_size=30), text=st.text("ab\u00e9\u20ac\U0001f600\u4e2d", max_size=20))
def test_bytes_that_are_tokens_make_whole_characters(prompt: str, text: str) -> None:
    """Each open byte decodes to U+FFFD there, and so do the characters before it."""
    shown, _ = pieces(FALLBACK, list(text.encode()), [], list(prompt.encode()))
    assert "".join(shown) == text
    assert [piece for piece in shown if piece] == list(text)


def test_the_space_behind_the_prompt_is_kept_and_may_stop() -> None:
    assert pieces(FALLBACK, [257, 256], [], [256])[0] == [" bc", " a", ""]
    assert pieces(FALLBACK, [257, 256], [], [])[0] == ["bc", " a", ""]
    assert pieces(FALLBACK, [257, 256], [" bc"], [256]) == (["", "", ""], " bc")


@pytest.mark.parametrize(
    ("text", "stops", "shown", "stopped"),
    [
        ("one END two", ["END"], ["o", "n", "e", " ", "", "", "", ""], "END"),
        ("an ENTER", ["END"], ["a", "n", " ", "", "", "ENT", "", "ER"], None),
        ("aab", ["aac", "ab"], ["", "", "a"], "ab"),
        ("abcd", ["bcd", "c"], ["a", "", "b", ""], "c"),
        ("EN", ["END"], ["", "", "EN"], None),
        ("\u00e9\u20acx", ["\u20ac"], ["", "\u00e9", "", "", ""], "\u20ac"),
        ("\u00e9", ["\u00e8"], ["", "\u00e9"], None),
    ],
)
def test_what_may_become_a_stop_string_is_held_back(
    text: str, stops: list[str], shown: list[str], stopped: str | None
) -> None:
    got, found = pieces(ByteTokenizer(), ByteTokenizer().encode(text), stops, [])
    assert found == stopped
    assert got[: len(shown)] == shown and not any(got[len(shown) :])


def test_nothing_is_shown_that_a_stop_string_takes_back() -> None:
    """At every place what has been shown is a prefix of the end result, and lags it by less than the longest stop."""
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("ab\u00e9", k=40))
        stops = ["".join(draw.choices("ab\u00e9", k=draw.randint(2, 6))) for _ in range(2)]
        end, _, at = reference(ByteTokenizer(), list(text.encode()), stops, [])
        answer, shown = AnswerText(ByteTokenizer(), stops), ""
        for n, byte in enumerate(text.encode()[:at], 1):
            shown += answer.push(byte)
            assert end.startswith(shown)
            so_far = text.encode()[:n].decode(errors="ignore")
            assert len(shown) > len(so_far) - max(map(len, stops)) or answer.stopped is not None


@pytest.mark.parametrize("ids", [[97], [0xFF], [256], [300], [0xC3, 0xA9], [0xF0, 0x9F]], ids=str)
@pytest.mark.parametrize("kind", WHOLE)
def test_work_for_an_id_does_not_grow(kind: str, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for text that never is whole, and for ids without text."""
    tokenizer, longest = WHOLE[kind], 0

    class Counting:
        def decode(self, ids: list[int]) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids)

    stream = TextStream(Counting(), tokenizer.encode("a\u00e9" * 500))  # ty: ignore[invalid-argument-type]
    answer = ids * 200
    assert "".join([*map(stream.push, answer), stream.flush()]) == tokenizer.decode(answer)
    assert longest <= 48
