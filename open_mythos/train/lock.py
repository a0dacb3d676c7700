"""The lock of a run's folder: one trainer at a time, on this machine or on any that shares the folder.

`run.lock` names its holder. A holder of this machine is gone when its process is; a holder that cannot be looked up,
such as one on another machine of a network file system, is gone when it has not touched its file for `STALE_S`. Ages
are measured by the file system's own clock, so the clocks of the machines need not agree.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from open_mythos.files import make_folder, writing

LOCK_FILE = "run.lock"
BEAT_S = 5.0
"""Seconds between two touches of the file."""
STALE_S = 60.0
"""Seconds without a touch after which a holder that cannot be looked up counts as gone."""


@dataclass(frozen=True)
class Holder:
    """The process that has the lock."""

    token: str
    """16 random hexadecimal digits, which no other lock has."""
    host: str
    pid: int
    started: str
    """Start of the process, which tells it from a later one of the same pid."""
    place: str
    """Boot of the machine, process namespace and path of the folder: a pid means something only where all are equal."""
    since: str


class RunLock:
    """The lock of one folder, for one process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._token = secrets.token_hex(8)
        self._released = threading.Event()
        self._lost = self._made_folder = False

    def refuse_if_held(self) -> None:
        """Raise ValueError, with the holder and the remedy, where another process has the lock; take nothing."""
        if self.path.exists():
            _refuse_live(self.path, _read(self.path))

    def acquire(self) -> None:
        """Take the lock, also one whose holder is gone. Of several processes that try, exactly one succeeds.

        Raises:
            ValueError: another process has it.
        """
        self._made_folder = not self.path.parent.exists()
        make_folder(self.path.parent)
        self._take(self.path)
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Raise ValueError where the lock is no longer this process's, so that it may write nothing more."""
        with contextlib.suppress(OSError):  # a file system that does not answer says nothing about the lock
            self._lost = self._lost or not self._is_mine()
        if self._lost:
            raise ValueError(
                f"{self.path} was removed or taken over while this process did not answer, so it stops here; look for "
                "another mythos train in this folder before going on with --resume"
            )

    def release(self) -> None:
        """Give the lock back, if it is still this process's, and remove the folder if it was made for nothing else."""
        self._released.set()
        with contextlib.suppress(OSError):  # then it is stale, and the next start takes it over
            if self._is_mine():
                self.path.unlink()
                if self._made_folder and not any(self.path.parent.iterdir()):
                    self.path.parent.rmdir()

    def _take(self, path: Path) -> None:
        while not self._create(path):
            if not path.exists():  # given back just now
                continue
            holder = _read(path)
            _refuse_live(path, holder)
            # Only the process with the claim to this very holder may replace its lock: no live one is ever replaced.
            claim = path.with_name(f"{path.name}.{holder.token if holder else 'unreadable'}")
            self._take(claim)
            if path.exists() and _read(path) == holder and _is_gone(path, holder):
                os.replace(claim, path)
                return
            claim.unlink()

    def _create(self, path: Path) -> bool:
        """Create the file, and return False if it exists."""
        pid, now = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S%z")
        holder = Holder(self._token, socket.gethostname(), pid, _start_of(pid) or "", _place(path.parent), now)
        try:
            # An exclusive create is atomic on local file systems, and on NFS from version 3 on.
            file = path.open("x")
        except FileExistsError:
            return False
        with writing(path, half=path), file:
            file.write(json.dumps(asdict(holder)))
        return True

    def _is_mine(self) -> bool:
        holder = _read(self.path)
        return holder is not None and holder.token == self._token

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a file system that does not answer now may do so at the next beat
                if not self._is_mine():
                    self._lost = not self._released.is_set()
                    return
                os.utime(self.path)


def _read(path: Path) -> Holder | None:
    """Return the holder in a lock; None if there is none, or it is not readable, as one that is being written."""
    try:
        with path.open("rb") as file:
            holder = Holder(**json.loads(file.read(8192)))
    except (FileNotFoundError, TypeError, ValueError, RecursionError):
        return None
    texts = (holder.token, holder.host, holder.started, holder.place, holder.since)
    is_sound = all(isinstance(text, str) for text in texts) and re.fullmatch("[0-9a-f]{16}", holder.token)
    return holder if is_sound and type(holder.pid) is int and 0 < holder.pid < 2**31 else None


def _refuse_live(path: Path, holder: Holder | None) -> None:
    """Raise ValueError unless the holder of a lock is gone."""
    if _is_gone(path, holder):
        return
    who, is_here = "a process that has just begun", False
    if holder is not None:
        who = f"process {holder.pid} on {holder.host:.80}, since {holder.since:.40}"
        is_here = holder.place == _place(path.parent)
    check = "end it first" if is_here else f"its lock is taken over when it has given no sign of life for {STALE_S:g} s"
    raise ValueError(
        f"{path.parent} is in use by another mythos train ({who}); wait until it ends, or use another folder with "
        f"--out. If it should not run, {check}: {path}"
    )


def _is_gone(path: Path, holder: Holder | None) -> bool:
    if holder is not None and holder.place == _place(path.parent):
        started = _start_of(holder.pid)
        if started is None or (started and holder.started):
            return started != holder.started
    try:
        # A new file gets its time from the same clock as the lock.
        with tempfile.TemporaryFile(dir=path.parent) as file:
            now = os.fstat(file.fileno()).st_mtime
        # A live holder is never far ahead of the clock either, unless that was set back.
        return abs(now - path.stat().st_mtime) > STALE_S
    except FileNotFoundError:
        return True


def _start_of(pid: int) -> str | None:
    """Return when a process of this machine started; None if it is gone, "" if that cannot be found out."""
    try:
        with contextlib.suppress(PermissionError):  # it is another user's
            os.kill(pid, 0)
    except ProcessLookupError:
        return None
    try:
        # Behind the name in brackets: the state, and as the 20th field the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:  # no Linux
        with contextlib.suppress(OSError):
            command = ["ps", "-o", "lstart=", "-p", str(pid)]
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return ""


def _place(folder: Path) -> str:
    parts = [socket.gethostname(), "", "", str(folder.resolve())]
    with contextlib.suppress(OSError):  # no Linux
        parts[1] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        parts[2] = os.readlink("/proc/self/ns/pid")
    return " ".join(parts)
