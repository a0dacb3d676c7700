"""Files that are whole or not there, and that survive a power failure."""

import hashlib
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, complete or not at all; an older one of the name stays until then."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    to_disk(partial)
    os.replace(partial, path)


def to_disk(path: Path) -> None:
    """Return when a file's contents, or a folder's list of names, would survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(*paths: Path) -> str:
    """Of the files' contents, one after another."""
    hasher = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: hasher)
    return hasher.hexdigest()
