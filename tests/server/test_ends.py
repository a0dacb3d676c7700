"""How requests and the server end: clients that go, that are slow, an engine that dies or hangs, and orderly ends."""

import asyncio
import json
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prometheus_client import generate_latest

from open_mythos import SamplingParams
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.server import connection as listen
from open_mythos.server.async_engine import EngineDead
from open_mythos.tokenization.tokenizer import BPETokenizer
from tests.models import scaled, tiny
from tests.server.served import Served, events, serving, tokenizer, until

P = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(max_rows=2) as running:
        yield running


def reset(connection: socket.socket) -> None:
    """Close with RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(65536):
        pass
    connection.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset, half_close])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_all_it_had(
    served: Served, leave: Callable[[socket.socket], None], stream: bool
) -> None:
    """In the rows, and in the queue behind them."""
    connections = [served.connect() for _ in range(4)]
    for connection in connections:
        connection.sendall(served.ask(P, {**LONG, "stream": stream}))
    until(lambda: served.engine.scheduler.n_admitted == 2 and served.engine.scheduler.n_waiting == 2)
    for connection in reversed(connections):
        leave(connection)
    until(lambda: not served.service.async_engine.submissions)
    served.settle()
    assert all(request.finish_reason != "length" for request in served.engine.sequences.values())


def test_what_a_client_leaves_is_free_before_the_next_step(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a job is in the step that follows its cancellation."""
    cancelled: set[Any] = set()
    step, worker = served.engine.step, served.service.async_engine
    cancel = worker._cancel

    def cancelling(job: Any, engine: Engine) -> None:
        cancel(job, engine)
        cancelled.update(job.requests)

    def checked() -> Any:
        assert not cancelled & set(served.engine.sequences.values())
        return step()

    monkeypatch.setattr(worker, "_cancel", cancelling)
    monkeypatch.setattr(served.engine, "step", checked)
    for _ in range(5):
        connection = served.connect()
        connection.sendall(served.ask(P, {**LONG, "stream": True, "n": 2}))
        connection.recv(100)
        connection.close()
    served.settle()
    assert cancelled and worker.error is None


def test_an_end_that_meets_a_cancellation(served: Served) -> None:
    """Answers of one token, left at about the time that they end."""
    for i in range(30):
        connection = served.connect()
        connection.sendall(served.ask(P, {"prompt": "a", "max_tokens": 1, "stream": i % 2 == 0}))
        time.sleep(0.001 * (i % 5))
        connection.close()
    served.settle()


def test_slow_clients_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADERS_S", "BODY_S", "STALL_S"):
        monkeypatch.setattr(listen, name, 0.3)
    with serving() as served:
        silent, headers, body, second = (served.connect() for _ in range(4))
        headers.sendall(b"GET /health HTT")
        body.sendall(served.head(P, 100) + b"{")
        second.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea")
        drip = threading.Thread(target=dripping, args=(body,))
        drip.start()
        for connection in (silent, headers):
            assert connection.recv(100) == b""
        assert body.recv(100).startswith(b"HTTP/1.1 408")
        answer = b""
        while more := second.recv(1000):
            answer += more
        assert answer.count(b"HTTP/1.1 200") == 1
        drip.join()
        for connection in (silent, headers, body, second):
            connection.close()
        until(lambda: not served.server.server_state.connections)
        served.settle()


def dripping(connection: socket.socket) -> None:
    """Send a byte now and then, until it is of no use."""
    for _ in range(100):
        try:
            connection.send(b" ")
        except OSError:
            return
        time.sleep(0.05)


def test_a_reader_that_stops_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "STALL_S", 0.3)
    with serving() as served:
        (listener,) = served.server.servers[0].sockets
        # Accepted connections have the listener's: far less than the answer.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(served.ask(P, {**LONG, "n": 8, "stream": True, "logprobs": 5, "return_loops": True}))
        connection.recv(1)
        until(lambda: not served.server.server_state.connections)
        served.settle()
        connection.close()
        assert b'finish_reason="length"' not in generate_latest(served.service.metrics.registry), (
            "it was cut off before its end"
        )


def test_no_packet_waits_for_an_acknowledgement(served: Served) -> None:
    with served.connect() as connection:
        state, here = served.server.server_state, connection.getsockname()
        until(lambda: any(there.client == here for there in state.connections))
        (there,) = (there for there in state.connections if there.client == here)
        assert there.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_dead_engine_is_told_and_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as served, served.http() as http:
        step, calls = served.engine.step, []

        def fail() -> Any:
            calls.append(None)
            if len(calls) == 5:
                raise RuntimeError("canary")
            return step()

        # So that there is time to look.
        monkeypatch.setattr(served.service, "on_fatal", lambda: None)
        monkeypatch.setattr(served.engine, "step", fail)
        told: list[Any] = []
        waiting = threading.Thread(target=lambda: told.append(http.post(P, json=LONG)))
        with http.stream("POST", P, json={**LONG, "stream": True}) as answer:
            waiting.start()
            last = list(events(answer.iter_lines()))[-1]
        waiting.join()
        assert last["error"]["type"] == "server_error" and "canary" not in json.dumps(last)
        assert told[0].status_code == 503 and "canary" not in told[0].text
        assert http.get("/ready").status_code == 503 and http.get("/health").status_code == 200
        assert http.post(P, json=LONG).status_code == 503
        # One that was let in before is told too.
        late = asyncio.run_coroutine_threadsafe(submitted(served), served.service.async_engine._loop)
        assert isinstance(late.exception(10), EngineDead)
        served.server.should_exit = True
        until(lambda: not served.server.server_state.connections)
        assert served.service.fatal and not served.service.async_engine.submissions


async def submitted(served: Served) -> None:
    await served.service.async_engine.submit(1, lambda: [([1], SamplingParams())])


def test_a_stuck_engine_is_told_and_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    with serving(stuck_s=0.6) as served, served.http() as http:
        step = served.engine.step

        def hang() -> Any:
            release.wait(20)
            return step()

        monkeypatch.setattr(served.engine, "step", hang)
        with served.connect() as connection:
            connection.sendall(served.ask(P, {**LONG, "stream": True}))
            until(lambda: http.get("/ready").status_code == 503)
            assert not served.service.fatal
            data = b""
            while more := connection.recv(1000):
                data += more
        assert b"server_error" in data and served.service.fatal and served.server.should_exit
        release.set()


def test_a_stuck_tokenizer_is_told_and_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(BPETokenizer, "encode", lambda *_: release.wait(20))
    with serving(stuck_s=0.6) as served, served.connect() as connection:
        connection.sendall(served.ask(P, LONG))
        until(lambda: not served.service.is_ready)
        assert not served.service.async_engine.stop(2)
        assert b"HTTP/1.1 500" in connection.recv(1000) and served.service.fatal and served.server.should_exit
        release.set()


def test_a_panic_is_told_and_its_message_is_not_logged(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokenizers library's is no Exception, and what it says holds the text."""

    class Panic(BaseException):
        pass

    def panic(_: object, text: str) -> None:
        raise Panic(text)

    monkeypatch.setattr(BPETokenizer, "encode", panic)
    with served.http() as http:
        answer = http.post(P, json={"prompt": "canary"})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "Panic in " in caplog.text and "canary" not in caplog.text
    served.settle()


def test_nan_is_an_error_of_its_request() -> None:
    broken = scaled(tiny(vocab_size=tokenizer().vocab_size))
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with serving(make=lambda: Engine(broken, tokenizer(), EngineConfig(max_rows=8))) as served, served.http() as http:
        answer = http.post(P, json={"prompt": "a"})
        assert answer.status_code == 500 and "NaN" in answer.json()["error"]["message"]
        with http.stream("POST", P, json={"prompt": "a", "stream": True}) as stream:
            (told,) = events(stream.iter_lines())
        assert "NaN" in told["error"]["message"]
        served.settle()


def test_a_model_that_does_not_load_ends_the_server() -> None:
    def fail() -> Engine:
        raise ValueError("no such model")

    with serving(make=fail, wait=False) as served:
        until(lambda: served.server.should_exit)
        assert isinstance(served.service.async_engine.error, ValueError) and served.service.fatal


def test_nothing_is_answered_before_the_model_is_there() -> None:
    loaded = threading.Event()

    def make() -> Engine:
        loaded.wait(20)
        raise ValueError("enough")

    with serving(make=make, wait=False, key="k") as served, served.http() as http:
        until(lambda: served.server.started)
        assert http.get("/health").status_code == 200 and http.get("/ready").status_code == 503
        for path in ("/v1/models", "/v1/engine"):
            assert http.get(path).status_code == 503
        assert http.post(P, json=LONG).headers["retry-after"] == "1"
        assert http.get("/metrics").status_code == 200
        loaded.set()


def drained(served: Served, n: int, body: dict[str, Any]) -> list[bytes]:
    """What n clients get whose requests are in work when the server is told to end."""
    connections = [served.connect() for _ in range(n)]
    for i, connection in enumerate(connections):
        connection.sendall(served.ask(P, {**body, "stream": i % 2 == 0}))
    until(lambda: len(served.service.async_engine.submissions) == n)
    with served.http() as http:
        served.server.handle_exit(signal.SIGTERM, None)
        assert http.get("/ready").status_code == 503
        late = http.post(P, json=LONG)
        assert late.status_code == 503 and late.headers["retry-after"]
    answers = []
    for connection in connections:
        data = b""
        while more := connection.recv(65536):
            data += more
        answers.append(data)
        connection.close()
    return answers


def test_told_to_end_it_lets_answers_end() -> None:
    with serving(max_queue=20) as served:
        answers = drained(served, 20, {**LONG, "max_tokens": 30})
        assert all(b'"finish_reason": "length"' in a or b'"finish_reason":"length"' in a for a in answers)
        assert all(b"[DONE]" in answer for answer in answers[::2])
        until(lambda: served.server.should_exit)
        served.settle()


def test_told_to_end_it_lets_slow_readers_have_the_rest() -> None:
    """All that is made may be far ahead of what has been read."""
    with serving() as served, socket.socket() as connection:
        (listener,) = served.server.servers[0].sockets
        for one, buffer in ((listener, socket.SO_SNDBUF), (connection, socket.SO_RCVBUF)):
            one.setsockopt(socket.SOL_SOCKET, buffer, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(served.ask(P, {**LONG, "max_tokens": 100, "stream": True, "logprobs": 5}))
        until(lambda: served.service.async_engine.submissions)
        served.server.handle_exit(signal.SIGTERM, None)
        until(lambda: not served.service.async_engine.submissions)
        time.sleep(0.3)
        assert not served.server.should_exit
        data = b""
        while more := connection.recv(65536):
            data += more
        assert b"[DONE]" in data
        until(lambda: served.server.should_exit)


def test_told_to_end_it_cuts_off_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(max_queue=20, drain_s=0.2) as served:
        step = served.engine.step

        def slow() -> Any:
            time.sleep(0.02)
            return step()

        monkeypatch.setattr(served.engine, "step", slow)
        answers = drained(served, 20, LONG)
        assert all(b'"finish_reason": "abort"' in a or b'"finish_reason":"abort"' in a for a in answers)
        assert all(b"[DONE]" in answer for answer in answers[::2])
        served.settle()


def test_told_to_end_it_does_not_wait_for_a_text_that_is_being_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    encode = BPETokenizer.encode
    monkeypatch.setattr(BPETokenizer, "encode", lambda *args: (release.wait(20), encode(*args))[1])
    with serving(drain_s=0.2) as served:
        connections = [served.connect() for _ in range(3)]
        for connection in connections:
            connection.sendall(served.ask(P, LONG))
        until(lambda: len(served.service.async_engine.submissions) == 3)
        served.server.handle_exit(signal.SIGTERM, None)
        until(lambda: not served.service.async_engine.submissions)
        release.set()
        for connection in connections:
            assert b"HTTP/1.1 503" in connection.recv(1000)
            connection.close()
        served.settle()
        assert served.engine.scheduler.counts["admitted"] == 0
