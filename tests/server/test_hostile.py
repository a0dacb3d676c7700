"""Requests made to do harm: none is a fault of the server, none stops it, and none changes the answers of others.

Three sources: schemathesis from the server's own schema, hypothesis field by field, and raw bytes. In full they are
10,000 requests (make test-slow), 300 else.
"""

import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from open_mythos.server.app import make_app
from tests.server.served import MODEL, Served, record, serving

P, C, R = "/v1/completions", "/v1/chat/completions", "/v1/responses"
BASES: dict[str, dict[str, Any]] = {
    P: {"prompt": "a", "max_tokens": 2},
    C: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    R: {"input": "a", "max_output_tokens": 2},
}
KNOWN = {"prompt": "Anne", "max_tokens": 8, "seed": 1, "logprobs": 2, "return_loops": True}
STATUSES = {200, 400, 404, 405, 413, 429, 431}


class Probe:
    """Sends requests, and sees to it that each is answered as it should."""

    def __init__(self, served: Served) -> None:
        self.served, self.http = served, served.http()
        self.n, self.slowest_s = 0, 0.0
        self.statuses: dict[int, int] = {}
        self.before = self.known()

    def known(self) -> Any:
        return self.http.post(P, json=KNOWN).json()["choices"]

    def timed(self, send: Callable[[], list[int]]) -> None:
        began = time.monotonic()
        for status in send():
            self.statuses[status] = self.statuses.get(status, 0) + 1
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self.n += 1

    def post(self, path: str, **how: Any) -> None:
        """A request by an HTTP client."""

        def send() -> list[int]:
            answer = self.http.request(how.pop("method", "POST"), path, **how)
            assert answer.status_code in STATUSES, (answer.status_code, how)
            if answer.status_code != 200:
                told = answer.json()["error"]
                assert told["message"] and len(answer.content) <= 1024 and "Traceback" not in answer.text
            return [answer.status_code]

        self.timed(send)

    def raw(self, data: bytes) -> None:
        """Bytes. What is no whole request is over when the client says so."""

        def send() -> list[int]:
            with self.served.connect() as connection:
                got = b""
                try:
                    connection.sendall(data)
                    connection.settimeout(0.05)
                    while more := connection.recv(65536):
                        got += more
                except TimeoutError:
                    connection.settimeout(10)
                    try:
                        connection.shutdown(1)
                        while more := connection.recv(65536):
                            got += more
                    except OSError:
                        pass
                except OSError:
                    pass
            found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d\d\d)", got)]
            assert not [status for status in found if status >= 500], (data, got)
            return found

        self.timed(send)


@pytest.fixture(scope="module")
def probe() -> Iterator[Probe]:
    logged: list[str] = []

    class Listener(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            logged.append(entry.getMessage())

    handler = Listener(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        with serving(max_work=100) as served:
            probing = Probe(served)
            yield probing
            served.settle()
            assert probing.known() == probing.before, "the same request has the same answer as before"
            with httpx2.Client(base_url=served.url) as fresh:
                assert fresh.get("/ready").status_code == 200
            probing.http.close()
            record("hostile", requests=probing.n, slowest_s=round(probing.slowest_s, 3), statuses=probing.statuses)
    finally:
        logging.getLogger().removeHandler(handler)
    assert not logged, "a fault of the server is logged"


FIELDS = ["prompt", "messages", "model", "max_tokens", "max_completion_tokens", "n", "seed", "stop", "stop_token_ids"]
FIELDS += ["ignore_eos", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"]
FIELDS += ["n_loops", "min_loops", "exit", "exit_threshold", "reasoning_effort", "return_loops", "logprobs", "tools"]
FIELDS += [
    "best_of",
    "frequency_penalty",
    "presence_penalty",
    "input",
    "instructions",
    "reasoning",
    "text",
    "max_output_tokens",
]
FIELDS += ["top_logprobs", "user", "metadata", "response_format", "logit_bias", "echo", "__class__", "", "n_loops "]
NUMBERS = [-(2**63), -(2**31), -1, 0, 1, 2, 4, 5, 8, 9, 64, 65, 319, 320, 2**31, 2**63, 2**64, 10**30, 1e-300, 1e308]
VALUES = [*NUMBERS, 1e309, float("nan"), -0.0, 0.5, True, False, None, "7", "", "\x00", "\ud800", "a" * 10**4, [], {}]
VALUES += [[[]], [0], ["a"], [True], [1e9], [[1], [2]], ["\ud800"], [None], {"a": {"b": []}}, [{"role": "user"}]]
VALUES += [[{"role": "user", "content": x}] for x in ("<|end|>", "", [], None, 1, [{"type": "text", "text": "\udfff"}])]
bodies = st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(VALUES), min_size=1, max_size=4)


def by_field(probe: Probe, path: str, body: dict[str, Any]) -> None:
    content = json.dumps({**BASES[path], **body})
    probe.post(path, content=content, headers={"content-type": "application/json"})


PARTS = [b"\r\n", b"\r\n\r\n", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf", b"{", b"[" * 10**5, b'"', b"\n"]
PARTS += [
    b"\\u",
    b"\xef\xbb\xbf",
    b"9" * 5000,
    b"content-length: 5\r\n",
    b"content-length: -1\r\n",
    b"0\r\n\r\n",
    b"\t",
]
PARTS += [b"transfer-encoding: chunked\r\n", b"transfer-encoding: gzip\r\n", b"expect: 100-continue\r\n"]
PARTS += [b"FFFFFFFFFFFFFFFFF\r\n", b"upgrade: websocket\r\nconnection: upgrade\r\n", b"host: x\r\n", b" HTTP/2.0\r\n"]
PARTS += [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n", b"%2e%2e%2f", b"../"]
PARTS += [b"x: " + b"y" * 20_000 + b"\r\n", b"x:y\r\n" * 70, b'"prompt":"b",', b'"n_loops":NaN,', b'"\\ud800":1,']
edits = st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0, 0, 1, 9]), st.sampled_from(PARTS)), max_size=3)


def by_byte(probe: Probe, path: str, changes: list[tuple[float, int, bytes]], cut: float | None) -> None:
    """Put parts in, each in place of some bytes, and cut the rest off."""
    body = json.dumps(BASES[path]).encode()
    data = probe.served.head(path, len(body)).replace(b"host", b"connection: close\r\nhost") + body
    for place, n, part in changes:
        at = int(place * len(data))
        data = data[:at] + part + data[at + n :]
    probe.raw(data if cut is None else data[: int(cut * len(data))])


def by_schema(probe: Probe) -> Callable[[schemathesis.Case], None]:
    def send(case: schemathesis.Case) -> None:
        how = case.as_transport_kwargs(base_url=probe.served.url)
        body = how.get("json", how.get("data"))
        if isinstance(body, bytes | str):
            content = body
        elif body is None and "json" not in how:
            content = b""
        else:
            content = json.dumps(body)
        try:
            probe.post(case.path, method=case.method, content=content, headers=how["headers"], params=how["params"])
        except (UnicodeEncodeError, httpx2.InvalidURL, httpx2.LocalProtocolError):
            pass  # the client does not send it

    return send


def schema_cases(probe: Probe) -> st.SearchStrategy[schemathesis.Case]:
    """Requests that break the schema, and some that keep it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schema = schemathesis.openapi.from_dict(make_app(probe.served.service).openapi())
        modes = [schemathesis.GenerationMode.NEGATIVE] * 3 + [schemathesis.GenerationMode.POSITIVE]
        return st.one_of(*(schema[path]["POST"].as_strategy(generation_mode=mode) for path in BASES for mode in modes))


QUIET = {"suppress_health_check": list(HealthCheck)}
SLOW = pytest.mark.slow
paths = st.sampled_from(list(BASES))


@pytest.mark.parametrize("n", [40, pytest.param(4000, marks=SLOW)])
@pytest.mark.filterwarnings("ignore")
def test_requests_against_the_schema(probe: Probe, n: int) -> None:
    send = by_schema(probe)
    settings(max_examples=n, **QUIET)(given(schema_cases(probe))(send))()


@pytest.mark.parametrize("n", [130, pytest.param(3000, marks=SLOW)])
def test_requests_with_odd_fields(probe: Probe, n: int) -> None:
    settings(max_examples=n, **QUIET)(given(paths, bodies)(lambda path, body: by_field(probe, path, body)))()


@pytest.mark.parametrize("n", [130, pytest.param(3000, marks=SLOW)])
def test_requests_of_odd_bytes(probe: Probe, n: int) -> None:
    @settings(max_examples=n, **QUIET)
    @given(paths, edits, st.one_of(st.none(), st.none(), st.floats(0, 1)))
    def send(path: str, changes: list[tuple[float, int, bytes]], cut: float | None) -> None:
        by_byte(probe, path, changes, cut)

    send()


def test_the_known_request_is_one(probe: Probe) -> None:
    assert len(probe.before[0]["text"]) and probe.http.get("/v1/models").json()["data"][0]["id"] == MODEL
