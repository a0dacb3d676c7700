"""JSON files value by value, against reading them as a whole."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.data import json_values as module
from open_mythos.data.json_values import BadJson, json_values

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


class Trickle(io.BytesIO):
    """Gives a few bytes at a time, whatever is asked for."""

    def __init__(self, data: bytes, n: int) -> None:
        super().__init__(data)
        self.n = n

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self.n)


def read(text: str | bytes, n: int = 7, limit: int = 2**20) -> list:
    data = text if isinstance(text, bytes) else text.encode()
    return list(json_values(Trickle(data, n), limit))


@given(
    values=st.lists(VALUES, max_size=6), n=st.integers(1, 40), indent=st.none() | st.integers(0, 3), ascii=st.booleans()
)
def test_items_of_an_array(values: list, n: int, indent: int | None, ascii: bool) -> None:
    assert read(json.dumps(values, indent=indent, ensure_ascii=ascii), n) == values


@given(values=st.lists(VALUES.filter(lambda value: not isinstance(value, list)), max_size=6), n=st.integers(1, 40))
def test_values_one_behind_the_other(values: list, n: int) -> None:
    assert read("\n".join(json.dumps(value) for value in values), n) == values


@pytest.mark.parametrize(
    ("text", "before", "message"),
    [
        ("[1, 2", [1, 2], "the array has no end"),
        ("[1, 2}", [1, 2], "'}' stands where , or ] should"),
        ("[1, oops]", [1], "Expecting value"),
        ('[{"a": 1}, {"a": "x', [{"a": 1}], "Unterminated string"),
        ("[" + "[" * 200_000, [], "nested too deeply"),
        ("[1, " + "9" * 5000 + "]", [1], "Exceeds the limit"),
        ("[1,]", [1], "Expecting value"),
    ],
)
def test_what_comes_before_the_fault_is_given(text: str, before: list, message: str) -> None:
    found = []
    with pytest.raises(BadJson, match=message):
        for value in json_values(io.BytesIO(text.encode()), 2**20):
            found.append(value)
    assert found == before


def test_work_ends_at_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault at the beginning of a long file is known without reading on, and a long value without storing it."""
    monkeypatch.setattr(module, "CHUNK", 1000)
    for text, limit, message in (
        ('{"a" 1}' + " " * 10**6, 10**9, "Expecting ':'"),
        ('"' + "x" * 10**6, 5000, "a value has more than 5,000 characters"),
    ):
        file = io.BytesIO(text.encode())
        with pytest.raises(BadJson, match=message):
            list(json_values(file, limit))
        assert file.tell() < 50_000


def test_bytes_that_are_not_utf8_spoil_their_value_alone() -> None:
    good, bad, last = read(b'["good", "\xff", "\xe2\x82\xac"]', 3)
    assert (good, last) == ("good", "\u20ac")
    with pytest.raises(UnicodeEncodeError):
        bad.encode("utf-8")
