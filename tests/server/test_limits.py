"""What many clients may take together: memory for bodies, and connections."""

import errno
import resource
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from open_mythos.server import connection as listen
from open_mythos.server import middleware as gate
from open_mythos.server.connection import MAX_CONNECTIONS, RESERVED_FILES, Faults, connection_limit
from open_mythos.server.middleware import BodyMemory
from open_mythos.server.protocol import MAX_BODY_BYTES
from tests.server.served import Served, serving, until

P = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    with serving() as running:
        yield running


@pytest.fixture
def served(running: Served) -> Iterator[Served]:
    """A server that has nothing in work, before and afterwards."""
    yield running
    until(lambda: not running.server.server_state.connections)
    running.settle()
    until(lambda: running.service.body_memory.used == 0)


def begun(served: Served, length: int, sent: int) -> socket.socket:
    """A connection whose body has not come in full."""
    connection = served.connect()
    connection.sendall(served.head(P, length) + b" " * sent)
    return connection


def status(connection: socket.socket) -> bytes:
    return connection.recv(12)


def test_bodies_have_one_bound_together(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = served.service.body_memory
    monkeypatch.setattr(bodies, "limit", 100_000)
    first = begun(served, 60_000, 50_000)
    until(lambda: bodies.used == 50_000)
    with begun(served, 50_001, 0) as second:
        answer = second.recv(1000) + second.recv(1000)
        assert answer.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in answer and b"100000 bytes" in answer
    assert bodies.used == 50_000, "nothing of a body without room is read"
    # Both have room when they begin, and not when they go on.
    third = begun(served, 50_000, 30_000)
    until(lambda: bodies.used == 80_000)
    first.sendall(b" " * 9_999)
    until(lambda: bodies.used == 89_999)
    third.sendall(b" " * 19_999)
    assert status(third) == b"HTTP/1.1 429"
    until(lambda: bodies.used == 59_999)
    third.close()
    first.close()
    until(lambda: bodies.used == 0)
    with served.http() as http:
        assert http.post(P, json={"prompt": "a", "max_tokens": 1}).status_code == 200
        assert 'reason="busy"} 2.0' in http.get("/metrics").text


def test_chunked_bodies_count_too(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.service.body_memory, "limit", 50_000)
    chunked = served.head(P, 0).replace(b"content-length: 0", b"transfer-encoding: chunked")
    with served.connect() as one, served.connect() as two:
        one.sendall(chunked + b"7530\r\n" + b" " * 30_000 + b"\r\n")
        until(lambda: served.service.body_memory.used == 30_000)
        two.sendall(chunked + b"7530\r\n" + b" " * 30_000 + b"\r\n")
        assert status(two) == b"HTTP/1.1 429"
        until(lambda: served.service.body_memory.used == 30_000)


def test_a_body_counts_until_its_request_is_answered(served: Served) -> None:
    """What it has become is in memory as long."""
    request = served.ask(P, {**LONG, "stream": True})
    n_bytes = len(request) - request.index(b"\r\n\r\n") - 4
    with served.connect() as connection:
        connection.sendall(request)
        assert status(connection) == b"HTTP/1.1 200"
        assert served.service.body_memory.used == n_bytes
    until(lambda: served.service.body_memory.used == 0)


def test_memory_is_looked_through_after_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and not for ordinary requests."""
    trims: list[int] = []
    monkeypatch.setattr(gate, "_trim", lambda: trims.append(1))
    bodies = BodyMemory(limit=20 * 2**20)
    for _ in range(1000):
        with bodies.account() as take:
            assert take(2**20)
    assert not trims
    shares = [bodies.account() for _ in range(20)]
    for share in shares:
        assert share.__enter__()(2**20)
    with bodies.account() as take:
        assert not take(1) and bodies.used == bodies.limit
    for share in shares:
        share.__exit__(None, None, None)
    assert len(trims) == 1 and bodies.used == 0


def test_a_request_that_can_never_fit_is_not_asked_to_come_again(served: Served) -> None:
    """24 places: a client that waits for 64 waits for ever."""
    assert served.service.async_engine.n_places == 24
    with served.http() as http:
        for body, n, field in (({"prompt": ["a"] * 8, "n": 8}, 64, "n"), ({"prompt": ["a"] * 5, "n": 5}, 25, "n")):
            for stream in (False, True):
                answer = http.post(P, json={**body, "max_tokens": 1, "stream": stream})
                told = answer.json()["error"]
                assert answer.status_code == 400 and "retry-after" not in answer.headers
                assert told["param"] == field and f"{n} answers" in told["message"] and "24 places" in told["message"]
        assert len(http.post(P, json={"prompt": ["a"] * 8, "n": 3, "max_tokens": 1}).json()["choices"]) == 24


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_many_bodies_take_bounded_memory_and_give_it_back(served: Served) -> None:
    """300 bodies of 1 MiB without their last byte. Without the bound they take 390 MiB, and keep it."""
    before = rss_mib()
    connections = [begun(served, MAX_BODY_BYTES, MAX_BODY_BYTES - 1) for _ in range(300)]
    assert served.service.body_memory.used <= gate.MAX_BODIES_BYTES == 64 * 2**20
    assert rss_mib() - before < 200
    with served.http() as http:
        assert http.get("/health").status_code == 200
    for connection in connections:
        connection.close()
    until(lambda: served.service.body_memory.used == 0)
    until(lambda: rss_mib() - before < 64)


def test_a_connection_too_many_is_turned_away_with_an_answer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    few = 5
    made = partial(listen.Connection, limit=few)
    monkeypatch.setattr(served.server.config, "http_protocol_class", made)
    connections = [served.connect() for _ in range(few)]
    until(lambda: len(served.server.server_state.connections) == few)
    with served.connect() as late:
        answer = late.recv(1000)
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in answer and late.recv(1) == b""
    # Those that are there go on, and one that leaves makes room.
    connections[0].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert status(connections[0]) == b"HTTP/1.1 200"
    connections.pop().close()
    until(lambda: len(served.server.server_state.connections) == few - 1)
    with served.http() as http:
        assert http.get("/health").status_code == 200
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(
    ("soft", "hard", "most", "raised"),
    [
        (64, 64, 64 - 7 - RESERVED_FILES, 64),
        (64, 300, 300 - 7 - RESERVED_FILES, 300),
        (1024, 2**20, MAX_CONNECTIONS, MAX_CONNECTIONS + 7 + RESERVED_FILES),
        (1024, resource.RLIM_INFINITY, MAX_CONNECTIONS, MAX_CONNECTIONS + 7 + RESERVED_FILES),
        (2**20, 2**20, MAX_CONNECTIONS, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, MAX_CONNECTIONS, None),
    ],
)
def test_connections_by_the_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, most: int, raised: int | None
) -> None:
    was_set: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: was_set.append(limits))
    monkeypatch.setattr("os.listdir", lambda _: ["0"] * 7)
    assert connection_limit() == most
    assert was_set == ([] if raised is None else [(raised, hard)])


def test_a_limit_that_leaves_no_connection_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (32, 32))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(OSError, match=r"limit of 32 open files .* use ulimit -n"):
        connection_limit()


def test_faults_of_the_event_loop_are_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    class Clock:
        now = 100.0

        def time(self) -> float:
            return self.now

    clock, faults = Clock(), Faults()
    full = {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "Too many open files")}  # fmt: skip  # noqa: E501
    for _ in range(1000):
        faults(clock, full)  # ty: ignore[invalid-argument-type]
    assert [entry.getMessage() for entry in caplog.records] == [
        "no connection can be accepted, or one has failed: Too many open files"
    ]
    clock.now += listen.FAULT_S
    try:
        raise ValueError("canary")
    except ValueError as fault:
        faults(clock, {"message": "Exception in callback canary", "exception": fault})  # ty: ignore[invalid-argument-type]
    assert len(caplog.records) == 2 and "canary" not in caplog.text and "ValueError in" in caplog.text
