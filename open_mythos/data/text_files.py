"""Files of text as UTF-8: the kinds of files by their endings, gzip, byte order marks and other encodings."""

import codecs
import gzip
import io
import shlex
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from open_mythos.data.skipped import Skipped

ENDINGS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
"""The kind of a file by the end of its name, in upper or lower case; all but parquet may be followed by .gz."""
LOOK = 4096
"""Bytes at the start of a file from which its encoding is detected."""
UNPACKED_BYTES, UNPACKED_RATIO = 8 * 2**20, 100
"""A file is unpacked up to the larger of so many bytes and so many times its size. Prose shrinks to about a third, a
file made to fill memory or a disk to a thousandth."""
BOMS = (  # the longer ones first: that of UTF-16 begins that of UTF-32
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ", "zip": b"PK\x03\x04", "PDF": b"%PDF-"}
"""First bytes of files in other formats."""


class Unreadable(Exception):
    """Raised where a file stops being text."""

    def __init__(self, skipped: Skipped) -> None:
        super().__init__(skipped)
        self.skipped = skipped


def kind_of(path: str | Path) -> str | None:
    """Return the kind of a file by its name; None if it is of none that is read."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    kind = ENDINGS.get(suffixes[-2] if is_packed(path) and len(suffixes) > 1 else "".join(suffixes[-1:]))
    return None if kind == "parquet" and is_packed(path) else kind


def is_packed(path: str | Path) -> bool:
    """Return whether a file is compressed with gzip, by its name."""
    return Path(path).suffix.lower() == ".gz"


def has_byte_lines(path: str) -> bool:
    """Return whether the file can be read from any byte on: uncompressed, and apparently UTF-8."""
    head = _head(path, open, LOOK)
    return not is_packed(path) and _encoding(head) == "utf-8" and not _is_binary(head)


def open_utf8(path: str) -> BinaryIO:
    """Open a file whose bytes are UTF-8: unpacked, converted from UTF-16 or UTF-32 if a byte order mark says so, and
    behind that mark. Only a file with `has_byte_lines` can be sought in.

    Raises:
        Unreadable: the file is no text, or unpacks to far more than its size. This may also come as it is read, like
            the errors of `explain`.
    """
    file = io.BufferedReader(_Unpacked(path), 2**20) if is_packed(path) else open(path, "rb")
    try:
        head = file.peek(LOOK)[:LOOK]
        encoding = _encoding(head)
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        elif encoding != "utf-8":
            file.read(4 if encoding.startswith("utf-32") else 2)
            return io.BufferedReader(_Converted(file, encoding), 2**20)
        elif _is_binary(head):
            raise Unreadable(_explain_binary(head, path))
    except BaseException:
        file.close()
        raise
    return file


DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, UnicodeError)
"""Errors that reading a file of `open_utf8` raises, besides `Unreadable`, when its contents are damaged."""


def explain(error: Exception, path: str) -> Skipped:
    """Return what is wrong with a file, from `Unreadable` or an error of the kinds in `DAMAGE`."""
    if isinstance(error, Unreadable):
        return error.skipped
    if isinstance(error, UnicodeError):
        opener = gzip.open if is_packed(path) else open
        why = f"from there on the file is not the {_encoding(_head(path, opener))} that its byte order mark names"
        return Skipped("not UTF-8", why, "get it again")
    if isinstance(error, gzip.BadGzipFile) and not _head(path, open).startswith(MAGIC["gzip"]):
        return Skipped("damaged", "it is not compressed with gzip", "take .gz off its name, or get it again")
    why = "the compressed data ends too early" if isinstance(error, EOFError) else "the compressed data is damaged"
    return Skipped(
        "damaged", f"{why}; what comes before is read", f"get it again; gzip -t {shlex.quote(path)} checks it"
    )


def convert_command(path: str, encoding: str = "latin1") -> str:
    """Return a command that makes a UTF-8 copy of a file."""
    name, plain, convert = shlex.quote(path), Path(path), f"iconv -f {encoding} -t utf-8"
    convert = f"gzip -dc {name} | {convert}" if is_packed(path) else f"{convert} {name}"
    if is_packed(path):
        plain = plain.with_suffix("")
    return f"{convert} > {shlex.quote(str(plain.with_suffix('')) + '-utf8' + plain.suffix)}"


def _head(path: str, opener: Callable[[str, str], Any], n: int = 4) -> bytes:
    with opener(path, "rb") as file:
        return file.read(n)


def _encoding(head: bytes) -> str:
    return next((name for bom, name in BOMS if head.startswith(bom)), "utf-8")


def _is_binary(head: bytes) -> bool:
    """Return whether a file begins with the magic of a binary format, or is a quarter zero bytes."""
    return head.startswith(tuple(MAGIC.values())) or head.count(0) * 4 > len(head)


def _explain_binary(head: bytes, path: str) -> Skipped:
    for name, magic in MAGIC.items():
        if head.startswith(magic):
            remedy = "add .gz to its name" if name == "gzip" else "unpack it, or extract its text into a .txt file"
            return Skipped("not UTF-8", f"it is a {name} file", remedy)
    even, odd = head[::2].count(0), head[1::2].count(0)
    if min(even, odd) * 8 < max(even, odd):
        encoding = "utf-16be" if even > odd else "utf-16le"
        return Skipped("not UTF-8", "it looks like UTF-16 without a byte order mark", convert_command(path, encoding))
    return Skipped("not UTF-8", "it looks like a binary file", "take it out, or extract its text into a .txt file")


class _Reader(io.RawIOBase):
    """What is made of another file as it is read, and closed with it."""

    _file: BinaryIO | gzip.GzipFile

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


class _Unpacked(_Reader):
    """The contents of a gzip file, up to a limit."""

    def __init__(self, path: str) -> None:
        self._path, self._file = path, gzip.open(path)
        self._left = max(UNPACKED_BYTES, UNPACKED_RATIO * Path(path).stat().st_size)

    def readinto(self, buffer) -> int:
        data = self._file.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            why = f"it unpacks to more than {UNPACKED_RATIO} times its size, which text does not"
            raise Unreadable(Skipped("too long", why, f"if it is text, unpack it: gzip -dk {shlex.quote(self._path)}"))
        buffer[: len(data)] = data
        return len(data)


class _Converted(_Reader):
    """The UTF-8 of a file in another encoding. Half of a surrogate pair is let through, and is no UTF-8 then."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file, self._ready = file, b""
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")

    def readinto(self, buffer) -> int:
        more = True
        while more and not self._ready:
            chunk = self._file.read(2**18)
            more = bool(chunk)
            self._ready = self._decoder.decode(chunk, not chunk).encode("utf-8", "surrogatepass")
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n
