"""A server in this process, on a free port, with a small model: what `mythos serve` runs."""

import asyncio
import contextlib
import gc
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import openai

from open_mythos import OpenMythos
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.server.app import make_app
from open_mythos.server.config import ServeConfig
from open_mythos.server.connection import Server, configure
from open_mythos.server.service import Service
from open_mythos.tokenization.tokenizer import BPETokenizer
from tests.models import scaled, tiny

MODEL = "little"
TEXT = (
    "\u0416\u0438\u0437\u043d\u044c \u2014 \u044d\u0442\u043e \U0001f30a. \u00dcber den Fl\u00fcssen; "
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u306f\u96e3\u3057\u3044\u3002 She said: na\u00efve caf\u00e9! "
)
"""Source of a vocabulary whose tokens are parts of characters and whole ones, of one to four bytes."""


@cache
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train_from_text(TEXT, 320)


@cache
def model() -> OpenMythos:
    return scaled(tiny(vocab_size=tokenizer().vocab_size, max_seq_len=512))


@dataclass
class Served:
    """A running server."""

    service: Service
    server: Server
    port: int
    key: str | None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Engine:
        return self.service.engine

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own."""
        values = {"api_key": self.key or "none", "max_retries": 0, "timeout": 30, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **values)

    def http(self) -> httpx2.Client:
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=30)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def head(self, path: str, length: int, method: str = "POST") -> bytes:
        """The headers of a raw request."""
        key = "" if self.key is None else f"authorization: Bearer {self.key}\r\n"
        return (
            f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{key}content-type: application/json\r\n"
            f"content-length: {length}\r\n\r\n"
        ).encode()

    def ask(self, path: str, body: Any) -> bytes:
        """A raw request."""
        data = json.dumps(body).encode()
        return self.head(path, len(data)) + data

    def settle(self) -> None:
        """Wait until nothing is in work, and see that nothing was left behind."""
        worker = self.service.async_engine
        until(lambda: not (worker.submissions or worker.n_taken or self.engine.busy))
        scheduler, runner = self.engine.scheduler, self.engine.runner
        until(lambda: not (worker._of or self.engine.sequences))
        assert (scheduler.n_waiting, scheduler.n_admitted, scheduler.block_manager.n_used) == (0, 0, 0)
        assert len(runner.free_rows) == self.service.config.max_rows and not runner.batches and not runner.exited


def until(done: Callable[[], Any], seconds: float = 20) -> None:
    """Wait for something that takes a moment; it has to come true."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(
    key: str | None = None,
    make: Callable[[], Engine] | None = None,
    max_rows: int = 8,
    wait: bool = True,
    knows_turns: bool = True,
    **config: Any,
) -> Generator[Served]:
    """Run a server meanwhile."""
    config = {"max_queue": 16, **config}

    def made() -> Engine:
        return Engine(model(), tokenizer(), EngineConfig(max_rows=max_rows, max_queue=max_rows + config["max_queue"]))

    service = Service(make or made, ServeConfig(name=MODEL, max_rows=max_rows, **config), key, knows_turns)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    served = Served(service, Server(configure(make_app(service)), service), listener.getsockname()[1], key)
    thread = threading.Thread(target=served.server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        if wait:
            until(lambda: service.is_ready)
        yield served
    finally:
        served.server.should_exit = True
        thread.join(20)
        service.async_engine.stop(20)
        assert not thread.is_alive()
        # What was cut off is dropped here, and not in a test that counts what is there.
        gc.collect()


def events(lines: Iterator[str]) -> Iterator[Any]:
    """The values of server-sent events, without the end's."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def n_tasks(served: Served) -> int:
    """Tasks of the server's event loop."""
    loop = served.service.async_engine._loop
    assert loop is not None
    return len(asyncio.all_tasks(loop))


def record(name: str, **figures: object) -> None:
    """Add figures to the JSON file that $OPEN_MYTHOS_FIGURES names, if it does: they go into docs/results/server.md."""
    where = os.environ.get("OPEN_MYTHOS_FIGURES")
    if where:
        path = Path(where)
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**known, name: figures}, indent=2) + "\n")
