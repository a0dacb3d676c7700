"""Connections with deadlines, and a server that ends when its answers have: what uvicorn lacks."""

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import time
import traceback
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from open_mythos.server.middleware import MAX_HEADER_BYTES
from open_mythos.server.protocol import RETRY_S, error
from open_mythos.server.service import Service

HEADERS_S, BODY_S, STALL_S = 10.0, 30.0, 30.0
"""How long a client may take to send its headers, to send its body, and to read what has been sent to it."""
MAX_CONNECTIONS, BACKLOG = 2048, 2048
"""The most connections that are open, and that wait to be accepted."""
ACCEPTS, RESERVED_FILES = 4, 32
"""Connections that are accepted before one is looked at; file descriptors for those, and for all but connections."""
READ_BYTES = 2**14
FAULT_S = 10.0
"""The least seconds between two lines about faults of the event loop."""
log = logging.getLogger("open_mythos.serve")


class Connection(H11Protocol):
    """A connection that is closed when its client is too slow in sending or in reading.

    Args:
        most: connections that may be open; one more is turned away.
    """

    def __init__(self, *args: Any, most: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._most = most
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._state: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n"
                b"retry-after: %b\r\n\r\n" % RETRY_S.encode()
            )
            transport.close()
            return
        # asyncio sets it on sockets whose protocol number says TCP, and an accepted one has the listener's, which is 0.
        # Without it the second packet of an answer waits for the client's acknowledgement of the first: 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What one look at a socket may read: bodies are counted only when the application has them.
        transport.max_size = READ_BYTES  # ty: ignore[missing-attribute]
        # So that a client that stops reading is noticed as soon as the system's own buffer is full.
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
        """Answer what is not HTTP, unless another answer is under way, and close the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.abort()
                return
            # The rest of the body that the application waits for will not come.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps(
            error("the first line, headers, length or chunks are not those of HTTP/1.1; correct them")
        ).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def eof_received(self) -> None:
        """Answer a request that ends in its middle; the client may still read."""
        if self.conn.their_state is h11.SEND_BODY or (self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]):
            self.send_400_response("")

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._receiving, self._sending):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._sending is not None:
            self._sending.cancel()

    def _watch(self) -> None:
        """Set the deadline of the part of a request that is to come."""
        state = self.conn.their_state
        if state is self._state:
            return
        self._state = state
        if self._receiving is not None:
            self._receiving.cancel()
        limits = {h11.IDLE: HEADERS_S, h11.SEND_BODY: BODY_S}
        if state in limits:
            self._receiving = self.loop.call_later(limits[state], self._too_slow)

    def _too_slow(self) -> None:
        if self.conn.our_state is h11.SEND_RESPONSE:
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()


class Server(uvicorn.Server):
    """Ends in order: told to, it lets answers end that are in work, and refuses new ones meanwhile."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain_until: float | None = None
        service.on_fatal = self._give_up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(Faults())
        await super().startup(sockets)
        # asyncio accepts as many at a time as it lets wait.
        for listener in sockets or []:
            listener.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # it has left the application as it was
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.should_exit = self.force_exit = True
        self._service.draining = True

    def _give_up(self) -> None:
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._service.draining and not self.should_exit:
            self._drain()
        return await super().on_tick(counter)

    def _drain(self) -> None:
        now, engine = time.monotonic(), self._service.async_engine
        if self._drain_until is None:
            self._drain_until = now + self._service.config.drain_s
            log.info("ending: %d answers are in work", engine.n_taken)
        if now > self._drain_until:
            for submission in engine.submissions:
                engine.cancel(submission)
        # An answer that has been made may still be on its way. A step that hangs must not hold up the end.
        self.should_exit = not (engine.n_taken or self.server_state.tasks) or now > self._drain_until + 2


class Faults:
    """What the event loop does with faults outside of requests: a line now and then, without what was sent.

    Its own way is a traceback for each, thousands of them when there is no file descriptor left.
    """

    def __init__(self) -> None:
        self._next_s = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        fault, now = context.get("exception"), loop.time()
        if now < self._next_s:
            return
        self._next_s = now + FAULT_S
        if isinstance(fault, OSError):
            log.error("no connection can be accepted, or one has failed: %s", fault.strerror)
        elif fault is not None:
            frame = traceback.extract_tb(fault.__traceback__)[-1]
            log.error("%s in %s, line %s", type(fault).__name__, frame.filename, frame.lineno)


def configure(app: FastAPI, most: int = MAX_CONNECTIONS) -> uvicorn.Config:
    """How uvicorn runs the application: it logs no request, and believes no header about where one is from.

    Args:
        most: connections that may be open.
    """
    return uvicorn.Config(
        app,
        http=partial(Connection, most=most),  # ty: ignore[invalid-argument-type]
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
    """How many connections there are file descriptors for; the system's limit is raised as far as it lets itself be.

    Raises:
        OSError: there are none.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd")) + RESERVED_FILES
    wanted = used + MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft <= used:
            raise OSError(f"the limit of {soft} open files leaves none for connections; use ulimit -n {wanted}")
        return min(MAX_CONNECTIONS, soft - used)
    return MAX_CONNECTIONS


def run(app: FastAPI, service: Service, listener: socket.socket) -> bool:
    """Serve until told to end; whether all is well and the engine's thread has ended. Signals are ignored from then on:
    the process is about to end, with a status of its own."""
    most = connection_limit()
    if most < MAX_CONNECTIONS:
        log.info("at most %d connections, by the limit of open files; ulimit -n allows more", most)
    server = Server(configure(app, most), service)
    # Before and after the event loop too, where a signal would otherwise be an exception somewhere.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    server.run(sockets=[listener])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return service.async_engine.stop(2.0) and not service.fatal
