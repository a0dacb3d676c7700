"""What every request passes before its route: where it comes from, the key, the size of its body, and what a fault may
say."""

import ctypes
import hmac
import ipaddress
import logging
import re
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from open_mythos.server.protocol import MAX_BODY_BYTES, error

OPEN = ("/", "/health", "/ready")
"""Paths that need no key."""
BUSY = "as many answers as may be are in work or waiting; try again later"
RETRY_S = "1"
"""Seconds after which a refused client may ask again."""
MAX_HEADERS, MAX_HEADER_BYTES = 64, 16 * 2**10
MAX_BODIES_BYTES = 64 * 2**20
"""Bytes of all bodies that are in memory at once."""
TRIM_BYTES = 8 * 2**20
"""Bytes of bodies that once gone are worth a look for memory that the system can have back."""
log = logging.getLogger("open_mythos.serve")


class Bodies:
    """Bytes of the bodies in memory, over all connections, from when they come until their request is answered."""

    def __init__(self, most: int = MAX_BODIES_BYTES) -> None:
        self.most, self.held, self._peak = most, 0, 0

    def fit(self, n_bytes: int) -> bool:
        """Whether there is room for so many bytes more."""
        return self.held + n_bytes <= self.most

    @contextmanager
    def share(self) -> Generator[Callable[[int], bool]]:
        """Count one body: the function counts bytes more, or says that there is no room; at the end all are free."""
        own = 0

        def take(n_bytes: int) -> bool:
            nonlocal own
            if not self.fit(n_bytes):
                return False
            own += n_bytes
            self.held += n_bytes
            self._peak = max(self._peak, self.held)
            return True

        try:
            yield take
        finally:
            self.held -= own
            if self._peak >= TRIM_BYTES and self.held <= self._peak // 8:
                self._peak = self.held
                _trim()


class Gate:
    """An ASGI application in front of another.

    Pages of other sites are refused by what their browser says of them, whatever they send. Without a key, which is for
    this machine alone, the name that a request calls the server by also has to be one of this machine: otherwise a
    page could have a name of its own point here.

    Args:
        key: what requests have to know; None: nothing.
        refused: called with the reason of each refusal.
        full: whether there is no place for another answer. Then a request for one is refused before it is read.
        bodies: what counts the bytes of bodies.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str | None,
        refused: Callable[[str], None],
        full: Callable[[], bool],
        bodies: Bodies,
    ) -> None:
        self._app, self._refused, self._full, self._bodies = app, refused, full, bodies
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

        # The application knows each route under one name and GET; the connection leaves the body of a HEAD out.
        path = scope["path"].removesuffix("/") or "/"
        asked = {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
        try:
            with self._bodies.share() as take:
                body = self._refusal(asked) or await self._read(asked, receive, take)
                if isinstance(body, JSONResponse):
                    await body(scope, receive, send)
                else:
                    await self._app(asked, _replay(body, receive), notice)
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
        """Why a request is refused before its body is read; None: it is not."""
        headers = scope["headers"]
        size = (
            len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in headers)
        )
        if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            most = f"{MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together"
            return self._refuse(431, f"there must be at most {most}; send less", "too large")
        if scope["http_version"] not in ("1.0", "1.1"):
            version = scope["http_version"]
            return self._refuse(400, f"HTTP/{version} is not spoken here; use HTTP/1.1", "invalid", connection="close")
        names = {name for name, _ in headers}
        if {b"content-length", b"transfer-encoding"} <= names:
            # A proxy in front may see the body end elsewhere, and what follows as a request of its own.
            told = "send either content-length or transfer-encoding, not both"
            return self._refuse(400, told, "invalid", connection="close")
        if scope["method"] not in ("GET", "OPTIONS") and (site := _other_site(headers)):
            told = (
                f"{site}: pages of other sites may not ask this server; use a program, or the page at its own address. "
                "A proxy in front has to pass the header Host on"
            )
            return self._refuse(403, told, "site")
        if self._key is None:
            hosts = [value for name, value in headers if name == b"host"]
            if len(hosts) != 1 or not is_local(hosts[0].decode("latin-1").rpartition("@")[2]):
                return self._refuse(403, "without a key the server answers to localhost only; give it a key", "host")
        elif scope["path"] not in OPEN and not self._knows(scope):
            told = "the key is missing or wrong; send 'Authorization: Bearer KEY'"
            return self._refuse(401, told, "key", www_authenticate="Bearer")
        return self._refusal_of_body(scope) if scope["method"] == "POST" else None

    def _refusal_of_body(self, scope: Scope) -> JSONResponse | None:
        """Why a body is refused before it is read; None: it is not."""
        if self._full():
            return self._refuse(429, BUSY, "busy", retry_after=RETRY_S)
        kinds = [value for name, value in scope["headers"] if name == b"content-type"]
        sizes = [value for name, value in scope["headers"] if name in (b"content-length", b"transfer-encoding")]
        has_body = sizes not in ([], [b"0"])
        if has_body and (
            len(kinds) != 1 or not re.match(rb"application/([\w.+-]+\+)?json\s*(;|$)", kinds[0], re.IGNORECASE)
        ):
            # A page of another site may send text and forms without asking first.
            told = "the body must be a JSON object, with content-type: application/json"
            return self._refuse(400, told, "invalid")
        return None

    async def _read(self, scope: Scope, receive: Receive, take: Callable[[int], bool]) -> bytearray | JSONResponse:
        """The body, or why there is no room for it.

        Raises:
            _Gone: the client has gone.
        """
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not told.isdigit() or int(told[:20]) > MAX_BODY_BYTES:
            return self._too_large()
        if not self._bodies.fit(int(told)):
            return self._no_room()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            part = message.get("body", b"")
            if len(body) + len(part) > MAX_BODY_BYTES:
                return self._too_large()
            # Of bodies that come at the same time each had room when it began.
            if not take(len(part)):
                return self._no_room()
            body += part
            if not message.get("more_body", False):
                return body

    def _too_large(self) -> JSONResponse:
        return self._refuse(413, f"the body must be at most {MAX_BODY_BYTES} bytes; send less", "too large")

    def _no_room(self) -> JSONResponse:
        told = f"the bodies of all requests in work have {self._bodies.most} bytes, the most there may be"
        return self._refuse(429, f"{told}; try again later", "busy", retry_after=RETRY_S)

    def _refuse(self, status: int, message: str, reason: str, **headers: str) -> JSONResponse:
        self._refused(reason)
        kind = "overloaded" if status == 429 else "invalid_request_error"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return JSONResponse(error(message, kind=kind), status, named)

    def _knows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        assert self._key is not None
        return hmac.compare_digest(key, self._key) and scheme.lower() == b"bearer"


class _Gone(Exception):
    """The client has gone before its request was whole."""


def _replay(body: bytearray, receive: Receive) -> Receive:
    """The body in one message, then what else comes."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        whole = bytes(body)
        body.clear()  # who asks for it has it now
        return {"type": "http.request", "body": whole, "more_body": False}

    return replay


def is_local(host: str) -> bool:
    """Whether a host name, with or without a port, can only be this machine."""
    name = re.sub(r"(?<=\])(:\d*)$", "", host) if host.startswith("[") else re.sub(r"^([^:]*):\d*$", r"\1", host)
    name = name.removeprefix("[").removesuffix("]")
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _other_site(headers: list[tuple[bytes, bytes]]) -> str | None:
    """The header by which a browser says that a page of another site asks; None: there is none.

    Browsers send both for themselves, and no page can change them. Programs send neither.
    """
    hosts = [value.lower() for name, value in headers if name == b"host"]
    for name, value in headers:
        if name == b"sec-fetch-site" and value.lower() not in (b"same-origin", b"none"):
            return f"Sec-Fetch-Site: {value.decode('latin-1'):.40}"
        if name == b"origin" and not any(_is_origin(value.lower(), host) for host in hosts):
            return f"Origin: {value.decode('latin-1'):.80}"
    return None


def _is_origin(origin: bytes, host: bytes) -> bool:
    """Whether an origin is a host as the header Host names it, which may leave the scheme's own port out."""
    scheme, _, place = origin.partition(b"://")
    port = {b"http": b":80", b"https": b":443"}.get(scheme)
    return port is not None and place.removesuffix(port) == host.removesuffix(port) != b""


def _trim() -> None:
    """Return freed memory to the system, which glibc by itself does not for pieces of this size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
