"""The command that serves."""

import gc
import logging
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from open_mythos.checks import check_int, check_number
from open_mythos.cli.options import read
from open_mythos.device import Device, Dtype, setup_device
from open_mythos.extras import load

KEY = "MYTHOS_API_KEY"
MAX_NAME = 256
"""Characters of `model` in a request."""


@dataclass
class ServeArgs:
    """Answer requests over HTTP, as OpenAI's clients ask them, with the model of a folder. The page at / talks to
    it."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the model and its tokenizer, such as RUN/final."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs a key."""
    port: int = 8000
    """0 takes a free one, which is printed."""
    api_key_file: Path | None = None
    """File with the key that requests have to send; left out: the variable MYTHOS_API_KEY, if it is set."""
    name: str | None = None
    """What requests call the model; left out: the folder's name."""
    max_rows: int = 32
    """Answers worked on at once."""
    max_queue: int = 128
    """Answers that wait beyond those; further ones are refused."""
    kv_tokens: int | None = None
    """Tokens that keys and values have room for; left out: a quarter of the free memory, at most what the rows need."""
    max_loops: int | None = None
    """The most loops of a request, up to 64; left out: twice the model's max_loop_iters."""
    max_work: int = 2**20
    """The most loop-tokens of a request: (prompt + n x max_tokens) x n_loops."""
    plain: bool = False
    """For a model that was not trained on conversations: it continues the messages' text."""
    drain: float = 30.0
    """Seconds that answers in work get to end in, once the server is told to end."""
    stuck: float = 60.0
    """Seconds that a step, or reading a text, may take before the server gives up and ends with an error."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    threads: int | None = None


def serve(rest: list[str]) -> None:
    """answer over HTTP, as OpenAI's clients ask"""
    args = read(ServeArgs, "mythos serve", rest)
    # Until the server is there, being told to end is the end.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        _serve(args)
    finally:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # the server has ended, and so does the process
            signal.signal(signal.SIGTERM, before)


def _serve(args: ServeArgs) -> None:
    for module in ("fastapi", "prometheus_client", "uvicorn"):
        load(module, "serve", "the server")
    from open_mythos.engine.engine import Engine, EngineConfig
    from open_mythos.engine.llm import LLM
    from open_mythos.server.app import make_app
    from open_mythos.server.connection import run
    from open_mythos.server.fields import HARD_MAX_LOOPS
    from open_mythos.server.middleware import is_local
    from open_mythos.server.service import ServeConfig, Service
    from open_mythos.tokenization.chat_template import turns_unknown

    if not args.folder.is_dir():
        raise FileNotFoundError(f"folder {args.folder} does not exist; give a model's folder, such as RUN/final")
    check_int("port", args.port, 0, 2**16 - 1)
    check_int("max_work", args.max_work, 1)
    check_int("max_queue", args.max_queue, 0)
    if args.max_loops is not None:
        check_int("max_loops", args.max_loops, 1, HARD_MAX_LOOPS)
    check_number("drain", args.drain, 0)
    check_number("stuck", args.stuck, 0, above=True)
    key = read_key(args.api_key_file)
    if key is None and not is_local(args.host):
        raise ValueError(f"--host {args.host} can be reached from elsewhere and needs a key; use --api-key-file FILE")
    warning = turns_unknown(args.folder, "use --plain to have messages continued as text")
    engine_config = EngineConfig(
        max_rows=args.max_rows, max_queue=args.max_rows + args.max_queue, kv_tokens=args.kv_tokens
    )
    config = ServeConfig(
        check_name(args.folder.resolve().name if args.name is None else args.name),
        max_loops=args.max_loops,
        max_queue=args.max_queue,
        max_work=args.max_work,
        plain=args.plain,
        knows_turns=warning is None,
        drain_s=args.drain,
        stuck_s=args.stuck,
    )
    handler = LogHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("mythos serve: %(message)s"))
    logging.basicConfig(handlers=[handler])
    log = logging.getLogger("open_mythos.serve")
    log.setLevel(logging.INFO)

    def make() -> Engine:
        # In this thread: a number of threads counts for the one that sets it.
        setup_device(args.device, args.threads)
        engine = LLM(args.folder, device=args.device, dtype=args.dtype, config=engine_config).engine
        if engine.tokenizer is not None and engine.tokenizer.vocab_size > engine.model.cfg.vocab_size:
            raise ValueError(
                f"the tokenizer has {engine.tokenizer.vocab_size} ids and the model vocab_size="
                f"{engine.model.cfg.vocab_size}; put a model and its own tokenizer into {args.folder}"
            )
        # What is here stays; to look through it again and again for garbage would hold up every request.
        gc.freeze()
        log.info("ready: %s", config.model)
        return engine

    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listener = socket.create_server((args.host, args.port), family=family, backlog=2048)
    host = f"[{args.host}]" if ":" in args.host else args.host
    log.info("http://%s:%d, loading %s", host, listener.getsockname()[1], args.folder)
    if warning and not args.plain:
        log.warning("%s", warning)
    service = Service(make, args.max_rows, config, key)
    well = run(make_app(service), service, listener)
    error = service.async_engine.error
    if isinstance(error, TypeError | ValueError | OSError) and service.async_engine.engine is None:
        raise error
    if not well:
        if service.fatal:
            log.error("the engine has failed: %s", "a step takes too long" if error is None else type(error).__name__)
        # The thread may be in the middle of something that it will not leave.
        logging.shutdown()
        os._exit(1 if service.fatal else 0)


class LogHandler(logging.StreamHandler):
    """Writes a line for each record, whatever a name in it holds, and drops those that would have to wait: a pipe that
    nobody reads must not stop the server."""

    def format(self, record: logging.LogRecord) -> str:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            can_write = bool(select.select([], [self.stream], [], 0)[1])
        except (OSError, ValueError):  # it is not a file of the system's
            can_write = True
        if can_write:
            super().emit(record)


def check_name(name: str) -> str:
    """The name, or ValueError for one that would break a line of the log, or that no request could send."""
    if not name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError(f"name={name!r:.80} must be 1 to {MAX_NAME} printable characters; use --name mythos")
    return name


def read_key(file: Path | None) -> str | None:
    """The key, from the file or else from the environment; None: there is none."""
    key = os.environ.get(KEY) if file is None else file.read_text("utf-8").strip()
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        where = f"the variable {KEY}" if file is None else file
        raise ValueError(
            f"the key in {where} must be printable ASCII without spaces; make one with openssl rand -hex 32"
        )
    return key
