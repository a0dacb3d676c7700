"""Files written whole or not at all, so that they survive a power failure, and files read within stated limits.

Every file of a folder that may come from elsewhere (a model, a checkpoint, shards, a tokenizer, a run) is read by these
functions: its path stays inside the folder, its size and depth are bounded, and every error names it.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

MAX_JSON_BYTES = 16 * 2**20
MAX_YAML_BYTES = 64 * 2**10
"""YAML is parsed at about a tenth of a megabyte per second."""
MAX_NAME_CHARS = 512
MAX_DEPTH = 32
MAX_DIGITS = 308
"""The digits of the largest float."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The system's numbers for no room on the disk, none in the user's quota, and none in the file."""


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, complete or not at all; an older one of the name stays until then."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        to_disk(partial)
        os.replace(partial, path)
        to_disk(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, so that they would survive a power failure."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            to_disk(folder.parent)


@contextlib.contextmanager
def writing(path: Path, remedy: str = "", n_bytes: int | None = None, half: Path | None = None) -> Generator[None]:
    """Let a failure to write name the path, the room on the disk and the remedy, and leave no half-written file.

    Args:
        remedy: what the user can do about a full disk; by default, make room and run the command again.
        n_bytes: bytes that are to be written, where they are known.
        half: the file that a failure leaves; None: PATH.partial.
    """
    try:
        yield
    except Exception as error:
        half = path.with_name(path.name + ".partial") if half is None else half
        if not half.is_dir():
            half.unlink(missing_ok=True)
        # Libraries in Rust give the system's error as text.
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = error.errno if isinstance(error, OSError) else number and int(number[1])
        # An error that is named already is named again only by a caller who knows more.
        if code is None or (isinstance(error, OSError) and error.strerror is None and not remedy):
            raise
        if code in FULL:
            folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
            needed = "" if n_bytes is None else f"{n_bytes:,} bytes are needed, "
            room = f" ({needed}{shutil.disk_usage(folder).free:,} bytes are free)"
            remedy = remedy or "make room, and run the command again"
        else:
            room, remedy = "", "check the disk and the path, and run the command again"
        named = type(error) if isinstance(error, OSError) else OSError
        failure = named(f"{path} is not written: {os.strerror(code)}{room}; {remedy}")
        failure.errno = code
        raise failure from error


def to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk, so that they survive a power failure.

    The files of a folder are not flushed: flush each of them first.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FileError(ValueError):
    """A fault in what a file holds. The message names fields as the file has them, not as a command's options."""


def is_text(value: str) -> bool:
    """Return whether a string can be written as UTF-8: escapes in JSON and YAML also make halves of surrogate pairs."""
    return re.search(r"[\ud800-\udfff]", value) is None


def inside(folder: Path, name: str) -> Path:
    """Return the path of a folder's file, which need not exist.

    Raises:
        ValueError: the name is no relative path inside the folder, or it is a link that leads out of the folder or to
            itself. In the cache of the Hugging Face hub, links may lead to the blobs of the same repository.
    """
    is_name = isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS and is_text(name) and "\0" not in name
    if not is_name or os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"{name!r:.200} is no path inside {folder}; name a file of that folder")
    path = folder / name
    try:
        target, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # Python 3.11 and 3.12 report a loop of links as a RuntimeError
        raise ValueError(
            f"{path!s:.400} cannot be found (a loop of links, perhaps); put the file itself there"
        ) from error
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not target.is_relative_to(root):
        raise ValueError(f"{path} is a link that leads out of its folder; put the file itself there")
    return path


@contextlib.contextmanager
def open_ordinary(path: Path) -> Generator[BinaryIO]:
    """Open an ordinary file for reading. A pipe or a device is refused, not waited for.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        ValueError: it is not an ordinary file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{path} is a pipe or a device; put an ordinary file there")
            yield file
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; check the path") from None
    except OSError as error:
        reason = f"{path!s:.400} cannot be read ({error.strerror})"
        raise type(error)(f"{reason}; check the path, and that the file may be read") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the contents of an ordinary file of at most `limit` bytes. Raises as `open_ordinary`, and ValueError."""
    with open_ordinary(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} has more than {limit} bytes, the most that is read of such a file; check what it is")
    return data


def read_text(path: Path, limit: int) -> str:
    """Return a UTF-8 file as text, without its byte order mark. Raises as `read_bytes`, and ValueError for others."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_json(path: Path, limit: int = MAX_JSON_BYTES, finite: bool = True) -> Any:
    """Return the value of a JSON file. Raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path, limit), str(path), finite)


def parse_json(text: str, source: str, finite: bool = True) -> Any:
    """Return the value of a JSON text whose every number is finite and whose every string can be written.

    Args:
        source: what errors call the text, such as its file or its file and line.
        finite: False allows NaN and infinity, as in measured numbers.

    Raises:
        ValueError: it is no JSON, has a key twice, is nested deeper than `MAX_DEPTH`, or holds NaN, a number beyond the
            largest float or half of a surrogate pair; the message names the source and the field.
    """
    try:
        value = json.loads(text, parse_int=_int, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else f"{error!s:.200}"
        raise FileError(f"{source} cannot be read as JSON ({what}); correct it, or copy or save it again") from error
    _check_values(value, source, finite)
    return value


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file. Raises as `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, MAX_YAML_BYTES), str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Return the plain value of a YAML text, with the same limits as `parse_json` and without aliases.

    An alias (`*name`) can stand for any number of copies of a value, so a few lines could hold more than memory does.
    """
    if len(text) > MAX_YAML_BYTES:
        raise FileError(f"{source} has more than {MAX_YAML_BYTES} characters; shorten it")
    try:
        value = yaml.load(text, _Loader)
    except FileError as error:
        raise FileError(f"{source}: {error}") from error
    except Exception as error:  # the library's constructors raise whatever a bad value causes
        raise FileError(f"{source}: the text is no YAML; correct this: {error!s:.400}") from error
    _check_values(value, source, finite=True)
    return value


class _Loader(yaml.SafeLoader):
    """Safe YAML whose work is in proportion to the length of the text."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise FileError(f"line {line} has the alias *{event.anchor:.40}; write the value out instead")
        if self.depth == MAX_DEPTH:
            raise FileError(f"line {line} is nested deeper than {MAX_DEPTH} levels; flatten it")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            raise FileError(f"a section has the field {Counter(names).most_common(1)[0][0]!r:.60} twice; leave one out")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int | float:
        # In YAML 1.1, 1:30:00 is a number to base 60: without an end its value takes time in the square of its length.
        return super().construct_yaml_int(node) if len(node.value) <= MAX_DIGITS else math.inf


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _int(digits: str) -> int | float:
    """Return the integer, or infinity for one that is larger than every float and that nobody means."""
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {name!r:.60} twice")
    return values


def _check_values(value: Any, source: str, finite: bool) -> None:
    """Refuse what would fail far from its file: deep nesting, numbers that are not finite, strings that are no text."""
    if (fault := _fault(value, finite, MAX_DEPTH)) is not None:
        place = fault[0].removeprefix(".").encode("utf-8", "backslashreplace").decode()
        raise FileError(f"{source}: {place or 'it':.100} {fault[1]}; correct it")


def _fault(value: Any, finite: bool, depth: int) -> tuple[str, str] | None:
    """Return the place and the kind of a value's first fault; `depth` counts the levels that it may still have."""
    if isinstance(value, str):
        return None if value.isascii() or is_text(value) else ("", "has half of a surrogate pair")
    if isinstance(value, float):
        return ("", "must be a finite number below 1e308") if finite and not math.isfinite(value) else None
    if not isinstance(value, dict | list | tuple | set):
        return None
    if depth == 0:
        return "", f"is nested deeper than {MAX_DEPTH} levels"
    has_names = isinstance(value, dict)
    for name, each in value.items() if has_names else enumerate(value):
        fault = _fault(each, finite, depth - 1) or (_fault(name, finite, depth - 1) if has_names else None)
        if fault is not None:
            return (f".{name!s:.60}" if has_names else f"[{name}]") + fault[0], fault[1]
    return None


@contextlib.contextmanager
def blamed_on(path: Path) -> Generator[None]:
    """Turn every TypeError and ValueError inside, caused by the values of a file, into a ValueError that names it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise FileError(f"{path}: {error}") from error


def sha256(*paths: Path) -> str:
    """Return the digest of the contents of ordinary files, one after another."""
    hasher = hashlib.sha256()
    for path in paths:
        with open_ordinary(path) as file:
            while part := file.read(2**20):
                hasher.update(part)
    return hasher.hexdigest()
