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


def of_folder(folder: Path, name: str) -> Path:
    """The path of a folder's file, which need not be there.

    Raises:
        ValueError: it is a link that leads out of the folder. The cache of the Hugging Face hub, whose folders link to
            the blobs beside them, is no exception to that but one unit.
    """
    path, root = folder / name, folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{path} is a link that leads out of its folder; put the file itself there")
    return path


def sha256(*paths: Path) -> str:
    """Of the files' contents, one after another."""
    hasher = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: hasher)
    return hasher.hexdigest()
