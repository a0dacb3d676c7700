"""Errors of a full disk that say which file did not fit, how much it needs, and what to do."""

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The system's numbers for no room on the disk, none in the user's quota, and none in the file."""


@contextmanager
def writing(path: Path, remedy: str, n_bytes: int | None = None, half: Path | None = None) -> Generator[None]:
    """Run a block that writes a file or a folder; an error of the system then names it, and half a file is removed.

    Args:
        remedy: what the user can do once there is room.
        n_bytes: how much is to be written, where that is known.
        half: the file that is removed; None: PATH.partial.

    Raises:
        OSError: the system has not let the block write.
    """
    try:
        yield
    except Exception as error:
        (path.with_name(path.name + ".partial") if half is None else half).unlink(missing_ok=True)
        number = _number(error)
        if number is None or (number not in FULL and isinstance(error, OSError) and error.filename is not None):
            raise
        if number not in FULL:
            raise OSError(number, os.strerror(number), str(path)) from error
        folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        room = f"{shutil.disk_usage(folder).free:,} bytes are free"
        needed = "" if n_bytes is None else f"{n_bytes:,} bytes are needed, "
        raise OSError(number, f"{os.strerror(number)}: {path} is not written ({needed}{room}); {remedy}") from error


def _number(error: Exception) -> int | None:
    """Return the system's number of an error; the library `tokenizers` says it in the message alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
