"""What every request passes before its route: its origin, the key, the size of its body; and what an error may say."""

import asyncio
import ctypes
import hmac
import ipaddress
import logging
import re
import traceback
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from open_mythos.server.protocol import BUSY, MAX_BODY_BYTES, Refusal, error

if TYPE_CHECKING:
    from open_mythos.server.service import Service

OPEN = ("/", "/health", "/ready")
"""Paths that need no key."""
MAX_HEADERS, MAX_HEADER_BYTES = 64, 16 * 2**10
MAX_BODIES_BYTES = 64 * 2**20
"""Bytes of all bodies that are in memory at once."""
TRIM_BYTES = 8 * 2**20
"""Bytes of bodies after which freed memory is returned to the system."""
JSON_TYPE = re.compile(r"application/([\w.+-]+\+)?json\s*(;|$)", re.IGNORECASE)
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
bearer = HTTPBearer(auto_error=False)
log = logging.getLogger("open_mythos.serve")


def log_fault(fault: BaseException) -> None:
    """Log the type of an error and its line, without its message, which may hold a client's text."""
    frame = traceback.extract_tb(fault.__traceback__)[-1]
    log.error("%s in %s, line %s", type(fault).__name__, frame.filename, frame.lineno)


class BodyMemory:
    """Counts the bytes of all bodies in memory, from when they arrive until their requests are answered."""

    def __init__(self, limit: int = MAX_BODIES_BYTES) -> None:
        self.limit, self.used, self._peak = limit, 0, 0

    def fits(self, n_bytes: int) -> bool:
        """Tell whether there is room for so many more bytes."""
        return self.used + n_bytes <= self.limit

    @contextmanager
    def account(self) -> Generator[Callable[[int], bool]]:
        """Count one body: the function adds bytes, or returns False if there is no room; at the end all are free."""
        own = 0

        def take(n_bytes: int) -> bool:
            nonlocal own
            if not self.fits(n_bytes):
                return False
            own += n_bytes
            self.used += n_bytes
            self._peak = max(self._peak, self.used)
            return True

        try:
            yield take
        finally:
            self.used -= own
            if self._peak >= TRIM_BYTES and self.used <= self._peak // 8:
                self._peak = self.used
                _trim()


class AccessControl:
    """An ASGI middleware that refuses requests, limits their bodies, and cancels those whose clients have gone.

    Pages of other sites are refused by the headers that their browser adds, whatever they send. Without a key the
    server is for this machine alone, so the host name that a request gives also has to be one of this machine:
    otherwise a page could let a name of its own point here.

    A POST for which there is no place is refused before its body is read.
    """

    def __init__(self, app: ASGIApp, service: "Service") -> None:
        self._app, self._service, self._memory = app, service, service.body_memory
        self._key = None if service.key is None else service.key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        # The application knows each route under one name and GET; the connection leaves the body of a HEAD out.
        path = scope["path"].removesuffix("/") or "/"
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        try:
            # A route adds what has to be done at the end of its request, also where the client has gone.
            with ExitStack() as stack:
                scope = {**scope, "path": path, "method": method, "stack": stack}
                take = stack.enter_context(self._memory.account())
                await self._check(scope)
                body = await self._read(scope, receive, take)
                if body is not None:
                    await _until_gone(receive, self._app, scope, body, watched_send)
        except Refusal as refusal:
            self._service.metrics.count_refusal(refusal.reason)
            await refusal.response(scope, receive, send)
        # An error of a route; a tokenizer's panic is no Exception.
        except BaseException as fault:
            log_fault(fault)
            if not started:
                await JSONResponse(error("the server has failed", kind="server_error"), 500)(scope, receive, send)

    async def _check(self, scope: Scope) -> None:
        """Raise Refusal for a request that can be refused before its body is read."""
        raw, headers = scope["headers"], Headers(scope=scope)
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in raw)
        if len(raw) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            most = f"{MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together"
            raise Refusal(431, f"there must be at most {most}; send less")
        if (version := scope["http_version"]) not in ("1.0", "1.1"):
            raise Refusal(400, f"HTTP/{version} is not spoken here; use HTTP/1.1", connection="close")
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy in front may see the body end elsewhere, and what follows as a request of its own.
            raise Refusal(400, "send either content-length or transfer-encoding, not both", connection="close")
        hosts = headers.getlist("host")
        if scope["method"] not in ("GET", "OPTIONS") and (site := _other_site(headers, hosts)):
            remedy = "use a program, or the page at its own address. A proxy in front has to pass the header Host on"
            raise Refusal(403, f"{site}: pages of other sites may not ask this server; {remedy}", code="site")
        if self._key is None:
            if len(hosts) != 1 or not is_local(hosts[0].rpartition("@")[2]):
                raise Refusal(403, "without a key the server answers to localhost only; give it a key", code="host")
        elif scope["path"] not in OPEN and not await self._has_key(scope, headers):
            message = "the key is missing or wrong; send 'Authorization: Bearer KEY'"
            raise Refusal(401, message, www_authenticate="Bearer")
        if scope["method"] == "POST":
            if self._service.is_full():
                raise Refusal(429, BUSY)
            has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
            kinds = headers.getlist("content-type")
            if has_body and (len(kinds) != 1 or not JSON_TYPE.match(kinds[0])):
                # A page of another site may send text and forms without asking first.
                raise Refusal(400, "the body must be a JSON object, with content-type: application/json")

    async def _read(self, scope: Scope, receive: Receive, take: Callable[[int], bool]) -> bytearray | None:
        """Read the body; None: the client has gone.

        Raises:
            Refusal: there is no room for the body.
        """
        length = Headers(scope=scope).get("content-length", "0")
        n_bytes = int(length[:20]) if length.isascii() and length.isdigit() else MAX_BODY_BYTES + 1
        self._check_size(n_bytes, self._memory.fits(n_bytes))
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            # Bodies that arrive at the same time each had room when they began.
            self._check_size(len(body) + len(part), take(len(part)))
            body += part
        return body

    def _check_size(self, n_bytes: int, fits: bool) -> None:
        if n_bytes > MAX_BODY_BYTES:
            raise Refusal(413, f"the body must be at most {MAX_BODY_BYTES} bytes; send less")
        if not fits:
            message = f"the bodies of all requests in work have {self._memory.limit} bytes, the most there may be"
            raise Refusal(429, f"{message}; try again later")

    async def _has_key(self, scope: Scope, headers: Headers) -> bool:
        sent = await bearer(HTTPConnection(scope))
        if sent is None or self._key is None or len(headers.getlist("authorization")) != 1:
            return False
        given = sent.credentials.encode("latin-1")
        return hmac.compare_digest(given, self._key)


async def _until_gone(receive: Receive, app: ASGIApp, scope: Scope, body: bytearray, send: Send) -> None:
    """Run the application on a body that has been read; cancel it when the client goes."""
    messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
    body.clear()  # the application gets the only copy

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def replay() -> Message:
        if not messages:
            await asyncio.wait([leaving])
        return messages.pop() if messages else {"type": "http.disconnect"}

    leaving = asyncio.ensure_future(gone())
    working = asyncio.ensure_future(app(scope, replay, send))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def is_local(host: str) -> bool:
    """Tell whether a host name, with or without a port, can only be this machine."""
    name = re.sub(r"(?<=\])(:\d*)$", "", host) if host.startswith("[") else re.sub(r"^([^:]*):\d*$", r"\1", host)
    name = name.removeprefix("[").removesuffix("]")
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _other_site(headers: Headers, hosts: list[str]) -> str | None:
    """Return the header by which a browser says that a page of another site asks; None: there is none.

    Browsers send both headers for themselves, and no page can change them. Programs send neither.
    """
    for site in headers.getlist("sec-fetch-site"):
        if site.lower() not in ("same-origin", "none"):
            return f"Sec-Fetch-Site: {site:.40}"
    for origin in headers.getlist("origin"):
        scheme, _, place = origin.lower().partition("://")
        # Browsers leave the scheme's own port out, of either header.
        port = DEFAULT_PORTS.get(scheme)
        if port is None or place.removesuffix(port) not in {host.lower().removesuffix(port) for host in hosts} - {""}:
            return f"Origin: {origin:.80}"
    return None


def _trim() -> None:
    """Return freed memory to the system, which glibc by itself does not for pieces of this size."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
