"""The coordinator's end of a worker process."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
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
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", side, str(threads)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                # Closing flushes what a dead worker did not read.
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and return its answer.

        Raises:
            WorkerError: with the worker's message, or the end of what it printed if it died.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            raise WorkerError(
                f"the worker {self.side} died with status {self.process.wait()}: {self.errors.read()[-1000:].strip()}"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.side}: {reply['error']}")
        return reply["answer"]

    def prepare(self, id: str, job: Job) -> dict[str, Any]:
        """Build the job's model and inputs, and return what the report says of them."""
        return self.ask("prepare", id=id, job=job.to_dict())
