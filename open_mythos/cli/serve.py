"""The command that serves."""

import gc
import logging
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from open_mythos.checks import Range, printable
from open_mythos.cli.options import ModelOptions
from open_mythos.device import setup_device
from open_mythos.extras import load
from open_mythos.server.config import ServeConfig

if TYPE_CHECKING:
    from open_mythos.engine.engine import Engine, EngineConfig

KEY = "MYTHOS_API_KEY"
MAX_NAME = 256
"""Characters of `model` in a request, at most."""
log = logging.getLogger("open_mythos.serve")


@dataclass(kw_only=True)
class Serve(ServeConfig, ModelOptions):
    """Answer requests over HTTP, as OpenAI's clients ask them, with the model of a folder. The page at / talks to
    it."""

    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs a key."""
    port: Annotated[int, Range(0, 2**16 - 1)] = 8000
    """0 takes a free one, which is printed."""
    api_key_file: Path | None = None
    """File with the key that requests have to send; left out: the variable MYTHOS_API_KEY, if it is set."""
    kv_tokens: int | None = None
    """Tokens that keys and values have room for; left out: a quarter of the free memory, at most what the rows need."""

    def run(self, rest: list[str]) -> None:
        """answer over HTTP, as OpenAI's clients ask"""
        # Until the server listens to signals itself, SIGTERM ends the process.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            _serve(self)
        finally:
            if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # the server has ended, and so does the process
                signal.signal(signal.SIGTERM, before)


def _serve(args: Serve) -> None:
    for module in ("fastapi", "prometheus_client", "uvicorn"):
        load(module, "serve", "the server")
    from open_mythos.engine.engine import EngineConfig
    from open_mythos.server.app import make_app
    from open_mythos.server.connection import run
    from open_mythos.server.middleware import is_local
    from open_mythos.server.service import Service
    from open_mythos.tokenization.chat_template import turns_unknown

    key = read_key(args.api_key_file)
    if key is None and not is_local(args.host):
        raise ValueError(f"--host {args.host} can be reached from elsewhere and needs a key; use --api-key-file FILE")
    args.name = check_name(args.folder.resolve().name if args.name is None else args.name)
    warning = turns_unknown(args.folder, "use --plain to have messages continued as text")
    max_queue = args.max_rows + args.max_queue
    engine_config = EngineConfig(max_rows=args.max_rows, max_queue=max_queue, kv_tokens=args.kv_tokens)
    handler = LogHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("mythos serve: %(message)s"))
    logging.basicConfig(handlers=[handler])
    log.setLevel(logging.INFO)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listener = socket.create_server((args.host, args.port), family=family, backlog=2048)
    host = f"[{args.host}]" if ":" in args.host else args.host
    log.info("http://%s:%d, loading %s", host, listener.getsockname()[1], args.folder)
    if warning and not args.plain:
        log.warning("%s", warning)
    service = Service(partial(_make_engine, args, engine_config), args, key, knows_turns=warning is None)
    ended_well = run(make_app(service), service, listener)
    error = service.async_engine.error
    if isinstance(error, TypeError | ValueError | OSError) and service.async_engine.engine is None:
        raise error
    if not ended_well:
        if service.fatal:
            log.error("the engine has failed: %s", "a step takes too long" if error is None else type(error).__name__)
        # The engine's thread may be in the middle of something that it will not leave.
        logging.shutdown()
        os._exit(1 if service.fatal else 0)


def _make_engine(args: Serve, config: "EngineConfig") -> "Engine":
    """Build the engine, in its thread: a number of threads counts for the thread that sets it."""
    from open_mythos.engine.llm import LLM

    setup_device(args.device, args.threads)
    engine = LLM(args.folder, device=args.device, dtype=args.dtype, config=config).engine
    if engine.tokenizer is not None and engine.tokenizer.vocab_size > engine.model.cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {engine.tokenizer.vocab_size} ids and the model vocab_size="
            f"{engine.model.cfg.vocab_size}; put a model and its own tokenizer into {args.folder}"
        )
    # The objects made so far stay; to search them again and again for garbage would hold up every request.
    gc.freeze()
    log.info("ready: %s, in %s", args.name, str(engine.model.dtype).removeprefix("torch."))
    return engine


class LogHandler(logging.StreamHandler):
    """Writes one line for each record, and drops records that would have to wait.

    A name with a line break stays on one line, and a pipe that nobody reads does not stop the server.
    """

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            can_write = bool(select.select([], [self.stream], [], 0)[1])
        except (OSError, ValueError):  # it is not a file of the system's
            can_write = True
        if can_write:
            super().emit(record)


def check_name(name: str) -> str:
    """Refuse a name that would break a line of the log, or that no request could send."""
    if not name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError(f"name={name!r:.80} must be 1 to {MAX_NAME} printable characters; use --name mythos")
    return name


def read_key(file: Path | None) -> str | None:
    """Read the key from the file or else from the environment; None: there is none."""
    key = os.environ.get(KEY) if file is None else file.read_text("utf-8").strip()
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        where = f"the variable {KEY}" if file is None else file
        raise ValueError(
            f"the key in {where} must be printable ASCII without spaces; make one with openssl rand -hex 32"
        )
    return key
