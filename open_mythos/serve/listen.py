"""Connections with deadlines, and a server that ends when its answers have: what uvicorn lacks."""

import asyncio
import contextlib
import logging
import resource
import socket
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from open_mythos.serve.gate import MAX_HEADER_BYTES
from open_mythos.serve.service import Service

HEADERS_S, BODY_S, STALL_S = 10.0, 30.0, 30.0
"""How long a client may take to send its headers, to send its body, and to read what has been sent to it."""
MAX_CONNECTIONS = 2048
log = logging.getLogger("open_mythos.serve")


class Connection(H11Protocol):
    """A connection that is closed when its client is too slow in sending or in reading."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._state: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        # asyncio sets it on sockets whose protocol number says TCP, and an accepted one has the listener's, which is 0.
        # Without it the second packet of an answer waits for the client's acknowledgement of the first: 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
        if self.cycle is not None and not self.cycle.response_complete:
            # Its answer is under way, or was about to be: there is no room for another.
            self.transport.abort()
            return
        with contextlib.suppress(h11.LocalProtocolError):
            super().send_400_response(msg)

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
        now, worker = time.monotonic(), self._service.worker
        if self._drain_until is None:
            self._drain_until = now + self._service.config.drain_s
            log.info("ending: %d answers are in work", worker.n_reserved)
        if now > self._drain_until:
            for job in worker.jobs:
                worker.cancel(job)
        # An answer that has been made may still be on its way. A step that hangs must not hold up the end.
        self.should_exit = not (worker.n_reserved or self.server_state.tasks) or now > self._drain_until + 2


def configure(app: FastAPI) -> uvicorn.Config:
    """How uvicorn runs the application: it logs no request, and believes no header about where one is from."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=2,
    )


def run(app: FastAPI, service: Service, listener: socket.socket) -> bool:
    """Serve until told to end; whether all is well and the engine's thread has ended."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if most == resource.RLIM_INFINITY else min(most, wanted), most))
    Server(configure(app), service).run(sockets=[listener])
    return service.worker.stop(2.0) and not service.fatal
