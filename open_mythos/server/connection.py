"""Connections with deadlines, and a server that drains before it ends, which uvicorn does not have."""

import asyncio
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from open_mythos.server.middleware import MAX_HEADER_BYTES, log, log_fault
from open_mythos.server.protocol import RETRY_S, error
from open_mythos.server.service import Service

HEADERS_S, BODY_S, STALL_S = 10.0, 30.0, 30.0
"""Seconds that a client may take to send its headers, to send its body, and to read what has been sent to it."""
MAX_CONNECTIONS, BACKLOG = 2048, 2048
"""Connections that may be open, and that may wait to be accepted, at most."""
ACCEPTS, RESERVED_FILES = 4, 32
"""Connections accepted at a time; file descriptors reserved for them, and for all that is no connection."""
READ_BYTES = 2**14
"""Bytes that one event of a socket may read, since bodies are counted only when the application has them."""
FAULT_S = 10.0
"""Seconds between two lines about faults of the event loop, at least."""


class Connection(H11Protocol):
    """A connection that is closed when its client is too slow in sending or in reading, or is one above the limit."""

    def __init__(self, *args: Any, limit: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limit = limit
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self._state: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._limit:
            transport.write(_head("503 Service Unavailable", f"retry-after: {RETRY_S}"))
            transport.close()
            return
        # asyncio sets it on sockets whose protocol number says TCP, and an accepted one has the listener's, which is 0.
        # Without it the second packet of an answer waits for the client's acknowledgement of the first: 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.max_size = READ_BYTES  # ty: ignore[missing-attribute]
        # A client that stops reading is noticed as soon as the system's own buffer is full.
        transport.set_write_buffer_limits(high=0)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._state = None  # the next request has its own time
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP, unless another answer is under way, and close the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.abort()
                return
            # The rest of the body that the application waits for will not come.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        message = "the first line, headers, length or chunks are not those of HTTP/1.1; correct them"
        body = json.dumps(error(message)).encode()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head = _head("400 Bad Request", "content-type: application/json", length=len(body))
            self.transport.write(head + body)
        self.transport.close()

    def eof_received(self) -> None:
        """Answer a request that ends before its end; the client may still read."""
        if self.conn.their_state is h11.SEND_BODY or (self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]):
            self.send_400_response("")

    def connection_lost(self, exc: Exception | None) -> None:
        for name in ("receive", "send"):
            self._set_deadline(name)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_deadline("send", STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_deadline("send")

    def _watch(self) -> None:
        """Start or cancel the timer when the client moves to the next part of its request.

        The headers, with any idle time before them, may take `HEADERS_S` seconds and the body `BODY_S`. Data that
        arrive within a part do not extend its time, so a slow trickle is cut off. On expiry the connection is closed,
        with a 408 if no response has started.
        """
        state = self.conn.their_state
        if state is not self._state:
            self._state = state
            self._set_deadline("receive", {h11.IDLE: HEADERS_S, h11.SEND_BODY: BODY_S}.get(state), self._too_slow)

    def _set_deadline(self, name: str, seconds: float | None = None, late: Callable[[], None] | None = None) -> None:
        """Cancel a deadline, and set it again if `seconds` are given."""
        if name in self._deadlines:
            self._deadlines.pop(name).cancel()
        if seconds is not None and late is not None:
            self._deadlines[name] = self.loop.call_later(seconds, late)

    def _too_slow(self) -> None:
        if self.conn.our_state is h11.SEND_RESPONSE:
            self.transport.write(_head("408 Request Timeout"))
        self.transport.close()


def _head(status: str, *headers: str, length: int = 0) -> bytes:
    """Write the head of an answer after which the connection is closed."""
    lines = [f"HTTP/1.1 {status}", "connection: close", f"content-length: {length}", *headers, "", ""]
    return "\r\n".join(lines).encode()


class Server(uvicorn.Server):
    """Drains at the first signal: answers in work may end, and new requests are refused meanwhile."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain_until: float | None = None
        service.on_fatal = partial(setattr, self, "should_exit", True)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(Faults())
        await super().startup(sockets)
        # asyncio accepts as many connections at a time as its own backlog, which is smaller.
        for listener in sockets or []:
            listener.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn has left the application running
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.should_exit = self.force_exit = True
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        now, engine = time.monotonic(), self._service.async_engine
        if self._service.draining and not self.should_exit:
            if self._drain_until is None:
                self._drain_until = now + self._service.config.drain_s
                log.info("ending: %d answers are in work", engine.n_taken)
            if now > self._drain_until:
                for submission in list(engine.submissions):
                    engine.cancel(submission)
            # A complete answer may still be on its way to the client. A step that hangs must not hold up the end.
            self.should_exit = not (engine.n_taken or self.server_state.tasks) or now > self._drain_until + 2
        return await super().on_tick(counter)


@dataclass
class Faults:
    """Handles faults of the event loop outside of requests: a line now and then, without the client's text.

    By default each fault prints a traceback, thousands of them when there is no file descriptor left.
    """

    next_s: float = 0.0
    """Time from which on the next fault is logged."""

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        fault, now = context.get("exception"), loop.time()
        if now < self.next_s:
            return
        self.next_s = now + FAULT_S
        if isinstance(fault, OSError):
            log.error("no connection can be accepted, or one has failed: %s", fault.strerror)
        elif fault is not None:
            log_fault(fault)


def configure(app: FastAPI, limit: int = MAX_CONNECTIONS) -> uvicorn.Config:
    """Configure uvicorn: it logs no request, believes no header about its origin, and opens `limit` connections."""
    return uvicorn.Config(
        app,
        http=partial(Connection, limit=limit),  # ty: ignore[invalid-argument-type]
        ws="none",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=ACCEPTS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=2,
    )


def connection_limit() -> int:
    """Return the number of connections that there are file descriptors for, after raising the system's limit.

    Raises:
        OSError: there are none.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd")) + RESERVED_FILES
    wanted = used + MAX_CONNECTIONS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_CONNECTIONS
    soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft <= used:
        raise OSError(f"the limit of {soft} open files leaves none for connections; use ulimit -n {wanted}")
    return soft - used


def run(app: FastAPI, service: Service, listener: socket.socket) -> bool:
    """Serve until a signal; True if all is well and the engine's thread has ended.

    From then on signals are ignored: the process is about to end, with a status of its own.
    """
    limit = connection_limit()
    if limit < MAX_CONNECTIONS:
        log.info("at most %d connections, by the limit of open files; ulimit -n allows more", limit)
    server = Server(configure(app, limit), service)
    # Before and after the event loop too, where a signal would otherwise raise an exception somewhere.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    server.run(sockets=[listener])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return service.async_engine.stop(2.0) and not service.fatal
