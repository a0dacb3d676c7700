"""Values of a JSON file, one by one, in memory bounded by the longest value."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK = 2**20
"""Bytes read at a time; a value that is longer doubles with each reading."""
NO_SPACE = re.compile(r"[^ \t\r\n]")


class BadJson(ValueError):
    """Raised where a file stops being JSON."""


def json_values(file: BinaryIO, limit: int) -> Iterator[Any]:
    """Yield the values of a UTF-8 file that holds one after another; the items of an array one by one.

    A byte that is not UTF-8 becomes half of a surrogate pair, so that only the value that holds it is spoilt.

    Args:
        limit: characters of one value, about.

    Raises:
        BadJson: the file is no JSON, or a value is too long. The values before have been given.
    """
    scanner = _Scanner(file, limit)
    while first := scanner.peek():
        if first != "[":
            yield scanner.value()
            continue
        scanner.skip()
        if scanner.peek() == "]":
            scanner.skip()
            continue
        while True:
            yield scanner.value()
            follows = scanner.peek()
            scanner.skip()
            if follows == "]":
                break
            if follows != ",":
                raise BadJson(f"{follows!r} stands where , or ] should" if follows else "the array has no end")


class _Scanner:
    """A position in a JSON text of which a window is in memory."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._limit = file, limit
        self._decoder, self._json = codecs.getincrementaldecoder("utf-8")("surrogateescape"), json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """Return the next character that is no white space, which is passed over; empty at the end."""
        while True:
            found = NO_SPACE.search(self._text, self._at)
            self._at = found.start() if found else len(self._text)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_on()

    def skip(self) -> None:
        self._at += 1

    def value(self) -> Any:
        """Return the value that begins here or behind white space."""
        self.peek()
        while True:
            known = len(self._text) - self._at
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                if end + len("e+1") < len(self._text) or self._ended:  # 1 may be the beginning of 1e+12
                    self._at = end
                    return value
            except RecursionError:
                raise BadJson("it is nested too deeply") from None
            except json.JSONDecodeError as error:
                # What is wrong before the end of what is in memory does not get right by reading on.
                is_open = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
                if self._ended or not is_open:
                    raise BadJson(error.msg) from None
            except ValueError as error:  # a number of thousands of digits
                raise BadJson(str(error)) from None
            if known > self._limit:
                raise BadJson(f"a value has more than {self._limit:,} characters")
            self._read_on(known)

    def _read_on(self, n: int = 0) -> None:
        data = self._file.read(max(CHUNK, n))
        self._ended = not data
        self._text, self._at = self._text[self._at :] + self._decoder.decode(data, not data), 0
