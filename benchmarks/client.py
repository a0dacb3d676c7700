"""The coordinator's end of a worker process."""

import os
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from benchmarks.job import Job
from benchmarks.peers import OPEN_MYTHOS, TRANSFORMERS, install

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {"open_mythos_0_5": OPEN_MYTHOS, "hf": TRANSFORMERS}
"""The peer that a side runs; it is installed first."""


class WorkerError(RuntimeError):
    """A request failed in the worker, or the worker died."""


class Client:
    """A worker process, which lives until the `with` block ends.

    Args:
        side: a module of `benchmarks.sides`; "SIDE@FOLDER" imports open_mythos from that checkout instead of this one.
    """

    def __init__(self, side: str, threads: int) -> None:
        if side in NEEDS:
            install(NEEDS[side])
        self.side = side
        # A file, not a pipe: nobody empties it while the worker runs, and a full pipe would stop the worker.
        self.printed = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "benchmarks.worker", side, str(threads), str(theirs.fileno())]
        place: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": str(threads)}}
        files: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": self.printed, "stderr": self.printed}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], **place, **files)
        theirs.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.printed.close()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Call a method of the worker and return its answer.

        Raises:
            WorkerError: with the worker's message, or the end of what it printed if it died.
        """
        try:
            self.connection.send((do, arguments))
            failed, answer = self.connection.recv()
        except (EOFError, ConnectionError):
            status = self.process.wait()
            self.printed.seek(0)
            printed = self.printed.read()[-1000:].strip()
            raise WorkerError(f"the worker {self.side} died with status {status}: {printed}") from None
        if failed:
            raise WorkerError(f"{self.side}: {answer}")
        return answer

    def prepare(self, id: str, job: Job) -> dict[str, Any]:
        """Build the job's model and inputs, and return what the report says of them."""
        return self.ask("prepare", id=id, job=job)
