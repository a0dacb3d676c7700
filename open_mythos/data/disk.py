"""Errors of a full disk that say which file did not fit, how much it needs, and what to do."""

import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: Path, remedy: str, n_bytes: int | None = None, half: Path | None = None) -> Generator[None]:
    """Run a block that writes a file or a folder; an error of the system then names it, and half a file is removed.

    Args:
        remedy: what the user can do once there is room.
        n_bytes: how much is to be written, where that is known.
        half: the file that is removed; None: PATH.partial.

    Raises:
        OSError: the block has failed for want of room, permission or the like.
    """
    try:
        yield
    except Exception as error:
        if (number := _number(error)) is None:
            raise
        (path.with_name(path.name + ".partial") if half is None else half).unlink(missing_ok=True)
        folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        room = f"{shutil.disk_usage(folder).free:,} bytes are free"
        needed = "" if n_bytes is None else f"{n_bytes:,} bytes are needed, "
        raise OSError(number, f"{os.strerror(number)}: {path} is not written ({needed}{room}); {remedy}") from error


def _number(error: Exception) -> int | None:
    """The system's number of an error; the library `tokenizers` says it in the message alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
