"""What every request passes before its route: the key, the size of the body, and what a fault may say."""

import hmac
import ipaddress
import logging
import re
import traceback
from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from open_mythos.serve.protocol import MAX_BODY_BYTES, error

OPEN = ("/", "/health", "/ready")
"""Paths that need no key."""
BUSY = "as many answers as may be are in work or waiting; try again later"
RETRY_S = "1"
"""Seconds after which a refused client may ask again."""
MAX_HEADERS, MAX_HEADER_BYTES = 64, 16 * 2**10
log = logging.getLogger("open_mythos.serve")


class Gate:
    """An ASGI application in front of another.

    Without a key, which is for this machine alone, the name that a request calls the server by has to be one of this
    machine: otherwise a page in a browser could have a name of its own point here.

    Args:
        key: what requests have to know; None: nothing.
        refused: told the reason of each refusal.
        full: whether there is no place for another answer. Then a request for one is refused before it is read.
    """

    def __init__(self, app: ASGIApp, key: str | None, refused: Callable[[str], None], full: Callable[[], bool]) -> None:
        self._app, self._refused, self._full = app, refused, full
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def notice(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            response = self._refusal(scope)
            body = b"" if response is not None else await _body(scope, receive)
            if body is None:
                response = self._refuse(413, f"the body must be at most {MAX_BODY_BYTES} bytes; send less", "too large")
            if response is not None:
                await response(scope, receive, send)
            else:
                await self._app(scope, _replay(body or b"", receive), notice)
        except _Gone:
            return
        # A route's own; the message could hold what was asked. A tokenizer's panic is no Exception.
        except BaseException as fault:
            frame = traceback.extract_tb(fault.__traceback__)[-1]
            log.error("%s in %s, line %s", type(fault).__name__, frame.filename, frame.lineno)
            if started:
                return
            await JSONResponse(error("the server has failed", kind="server_error"), 500)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = scope["headers"]
        size = (
            len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in headers)
        )
        if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            most = f"{MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together"
            return self._refuse(431, f"there must be at most {most}; send less", "too large")
        names = {name for name, _ in headers}
        if {b"content-length", b"transfer-encoding"} <= names:
            # A proxy in front may see the body end elsewhere, and what follows as a request of its own.
            response = self._refuse(400, "send either content-length or transfer-encoding, not both", "invalid")
            response.headers["connection"] = "close"
            return response
        if self._key is None:
            hosts = [value for name, value in headers if name == b"host"]
            if len(hosts) != 1 or not is_local(hosts[0].decode("latin-1").rpartition("@")[2]):
                return self._refuse(403, "without a key the server answers to localhost only; give it a key", "host")
        elif scope["path"] not in OPEN and not self._knows(scope):
            response = self._refuse(401, "the key is missing or wrong; send 'Authorization: Bearer KEY'", "key")
            response.headers["www-authenticate"] = "Bearer"
            return response
        if scope["method"] == "POST" and self._full():
            response = self._refuse(429, BUSY, "busy")
            response.headers["retry-after"] = RETRY_S
            return response
        return None

    def _refuse(self, status: int, message: str, reason: str) -> JSONResponse:
        self._refused(reason)
        return JSONResponse(error(message), status)

    def _knows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        assert self._key is not None
        return hmac.compare_digest(key, self._key) and scheme.lower() == b"bearer"


class _Gone(Exception):
    """The client has gone before its request was whole."""


async def _body(scope: Scope, receive: Receive) -> bytes | None:
    """All of the body; None: it is too large."""
    told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if not told.isdigit() or int(told[:20]) > MAX_BODY_BYTES:
        return None
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then what else comes."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def is_local(host: str) -> bool:
    """Whether a host name, with or without a port, can only be this machine."""
    name = re.sub(r"(?<=\])(:\d*)$", "", host) if host.startswith("[") else re.sub(r"^([^:]*):\d*$", r"\1", host)
    name = name.removeprefix("[").removesuffix("]")
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
