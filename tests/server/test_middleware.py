"""Who is let in, and what is refused before work: by status and field."""

import ast
import inspect
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.routing import Route

from open_mythos.server import middleware as gate
from open_mythos.server.app import make_app
from open_mythos.server.middleware import is_local
from open_mythos.server.protocol import MAX_BODY_BYTES, ChatRequest, CompletionRequest
from tests.server.served import Served, serving, until

KEY = "sk-0123456789abcdef"
FREE = {"/", "/health", "/health/", "/ready"}
BAD = {
    "none": b"",
    "wrong": b"authorization: Bearer sk-fedcba9876543210\r\n",
    "prefix": b"authorization: Bearer sk-0123456789abcde\r\n",
    "suffix": b"authorization: Bearer sk-0123456789abcdef0\r\n",
    "empty": b"authorization: Bearer \r\n",
    "case": b"authorization: Bearer SK-0123456789ABCDEF\r\n",
    "two": b"authorization: Bearer sk-0123456789abcdef\r\nauthorization: Bearer wrong\r\n",
    "cookie": b"cookie: authorization=Bearer sk-0123456789abcdef\r\n",
    "basic": b"authorization: Basic c2stMDEyMzQ1Njc4OWFiY2RlZjo=\r\n",
    "bare": b"authorization: sk-0123456789abcdef\r\n",
    "unicode": "authorization: Bearer sk-0123456789abcd\u0435f\r\n".encode(),
    "large": b"authorization: Bearer " + b"sk-0123456789abcdef" * 55_000 + b"\r\n",
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(key=KEY, max_loops=8, max_work=4000) as running:
        yield running
        running.settle()


def exchange(served: Served, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to raw bytes."""
    with served.connect() as connection:
        try:
            connection.sendall(request)
        except (ConnectionResetError, BrokenPipeError):
            pass  # it was refused before all of it was sent
        data = b""
        try:
            while more := connection.recv(65536):
                data += more
        except ConnectionResetError:
            pass
    if not data:
        return 0, {}, b""
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(line.lower().split(": ", 1) for line in lines[1:]), body


def routes(served: Served) -> list[tuple[str, str]]:
    """(method, path) of all there is."""
    app = make_app(served.service)
    found = []
    for route in app.routes:
        assert isinstance(route, Route), f"{route} is of a kind that this test does not know"
        path = re.sub(r"{[^}]*}", "x", route.path)
        found += [(method, path) for method in sorted(route.methods or ())]
    return found


def test_every_route_but_three_needs_the_key(served: Served) -> None:
    found = routes(served)
    assert {path for _, path in found} >= {
        *FREE - {"/health/"},
        "/metrics",
        "/v1/engine",
        "/v1/models",
        "/v1/completions",
    }
    for method, path in [*found, ("GET", "/nowhere"), ("GET", "/health/"), ("GET", "//health"), ("GET", "/HEALTH")]:
        for name, header in BAD.items():
            line = f"{method} {path}?api_key={KEY} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n".encode()
            status, headers, body = exchange(served, line + header + b"\r\n")
            if path in FREE and name != "large":
                assert status in (200, 405), (method, path, name)
                continue
            # What is longer than headers may be does not get as far as the key.
            assert status == 401 or (name == "large" and status in (0, 400)), (method, path, name)
            if status == 401:
                assert headers["www-authenticate"] == "bearer" and len(body) < 1024 and KEY.encode() not in body


def test_the_key_opens(served: Served) -> None:
    for scheme in ("Bearer", "bearer"):
        head = f"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: {scheme} {KEY}\r\n\r\n"
        assert exchange(served, head.encode())[0] == 200


def test_keys_are_compared_in_constant_time() -> None:
    """The key is in no comparison but that of hmac."""
    tree = ast.parse(inspect.getsource(gate))
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call for call in calls if "digest" in call] == ["hmac.compare_digest(given, self._key)"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and "self._key" in ast.unparse(node):
            assert ast.unparse(node) in ("self._key is None", "self._key is not None")


def test_without_a_key_it_answers_to_its_own_name_only() -> None:
    with serving() as served:
        for host, status in (("localhost:80", 200), ("127.0.0.1", 200), ("[::1]:1", 200), ("evil.example", 403)):
            request = f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
            assert exchange(served, request.encode())[0] == status, host
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        body = b'{"prompt": "a"}'
        sent = head.encode() + b"content-type: text/plain\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        status, headers, _ = exchange(served, sent)
        # What a page of another site may send without asking first.
        assert status == 400 and not any(name.startswith("access-control") for name in headers)


HERE = ["localhost", "127.0.0.1:80", "127.8.8.8", "[::1]:8", "::1"]
ELSEWHERE = ["0.0.0.0", "10.0.0.1", "a.localhost.evil.example", "", "::", "localhost:80@evil.example", "[::1]evil"]


@pytest.mark.parametrize(("host", "local"), [*((h, True) for h in HERE), *((h, False) for h in ELSEWHERE)])
def test_which_hosts_are_this_machine(host: str, local: bool) -> None:
    assert is_local(host) == local


P, C = "/v1/completions", "/v1/chat/completions"
LIMITS: list[tuple[str, dict[str, Any], int, str | None]] = [
    (P, {"n": 9}, 400, "n"),
    (P, {"n": 0}, 400, "n"),
    (P, {"n": True}, 400, "n"),
    (P, {"n": "2"}, 400, "n"),
    (P, {"prompt": ["a"] * 129}, 400, "prompt"),
    (P, {"prompt": []}, 400, "prompt"),
    (P, {"prompt": ""}, 400, "prompt"),
    (P, {"prompt": None}, 400, "prompt"),
    (P, {"prompt": [-1]}, 400, "prompt[0][0]"),
    (P, {"prompt": [320]}, 400, "prompt"),
    (P, {"prompt": [2**63]}, 400, "prompt[0][0]"),
    (P, {"prompt": [1.5]}, 400, "prompt[0][0]"),
    (P, {"prompt": "\ud800"}, 400, "prompt[0]"),
    (P, {"prompt": [1] * 513}, 400, "prompt"),
    (P, {"stop": ["a"] * 65}, 400, "stop"),
    (P, {"stop": ["a" * 64] * 17}, 400, "stop"),
    (P, {"stop": "a" * 65}, 400, "stop[0]"),
    (P, {"stop": ""}, 400, "stop[0]"),
    (P, {"stop_token_ids": [320]}, 400, "stop_token_ids"),
    (P, {"stop_token_ids": list(range(65))}, 400, "stop_token_ids"),
    (P, {"logprobs": 6}, 400, "logprobs"),
    (C, {"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
    (C, {"top_logprobs": 2}, 400, "top_logprobs"),
    (P, {"n_loops": 0}, 400, "n_loops"),
    (P, {"n_loops": 9}, 400, "n_loops"),
    (P, {"n_loops": 65}, 400, "n_loops"),
    (P, {"n_loops": 10**9}, 400, "n_loops"),
    (P, {"n_loops": 2.0}, 400, "n_loops"),
    (P, {"n_loop": 2}, 400, "n_loop"),
    (P, {"min_loops": 5, "n_loops": 4}, 400, "min_loops"),
    (P, {"exit": "never"}, 400, "exit"),
    (P, {"exit_threshold": 0.1}, 400, "exit_threshold"),
    (P, {"exit": "kl", "exit_threshold": -1}, 400, "exit_threshold"),
    (P, {"reasoning_effort": "most"}, 400, "reasoning_effort"),
    (P, {"max_tokens": -1}, 400, "max_tokens"),
    (C, {"max_tokens": 0}, 400, "max_tokens"),
    (C, {"max_completion_tokens": 600}, 400, "max_completion_tokens"),
    (P, {"max_tokens": 512, "n_loops": 1}, 400, "max_tokens"),
    (P, {"max_tokens": 400, "n": 8}, 400, "max_tokens"),
    (P, {"temperature": -0.1}, 400, "temperature"),
    (P, {"temperature": 1e309}, 400, "temperature"),
    (P, {"top_p": -0.1}, 400, "top_p"),
    (P, {"min_p": 2}, 400, "min_p"),
    (P, {"top_k": -2}, 400, "top_k"),
    (P, {"repetition_penalty": 0}, 400, "repetition_penalty"),
    (P, {"seed": -(2**63) - 1}, 400, "seed"),
    (P, {"seed": 2**63}, 400, "seed"),
    (P, {"model": "other"}, 404, "model"),
    (P, {"frequency_penalty": 2.5}, 400, "frequency_penalty"),
    (P, {"presence_penalty": -2.5}, 400, "presence_penalty"),
    (P, {"logit_bias": {"1": 101}}, 400, "logit_bias.1"),
    (P, {"logit_bias": {"320": 1}}, 400, "logit_bias"),
    (P, {"logit_bias": {"a": 1}}, 400, "logit_bias.a"),
    (P, {"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias"),
    (P, {"echo": 1}, 400, "echo"),
    (P, {"best_of": 21, "stream": False}, 400, "best_of"),
    (P, {"best_of": 1, "n": 2}, 400, "best_of"),
    (P, {"best_of": 3, "stream": True}, 400, "best_of"),
    (P, {"logprobs": True}, 400, "logprobs"),
    (P, {"suffix": "a"}, 400, "suffix"),
    (C, {"verbosity": "high"}, 400, "verbosity"),
    (P, {"stream_options": {"x": 1}}, 400, "stream_options.x"),
    (P, {"stream_options": {"include_usgae": True}}, 400, "stream_options.include_usgae"),
    (P, {"metadata": {"run": 7}}, 400, "metadata.run"),
    (P, {"metadata": {"str": 7}}, 400, "metadata.str"),
    (P, {"prompt": 5}, 400, "prompt"),
    (P, {"prompt": {"a": 1}}, 400, "prompt"),
    (C, {"messages": [{"role": "user", "content": "a", "nmae": "x"}]}, 400, "messages[0].nmae"),
    (C, {"messages": [{"role": "user", "content": "a", "name": 1}]}, 400, "messages[0].name"),
    (C, {"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content"),
    (C, {"messages": [{"role": "assistant", "tool_calls": 1}]}, 400, "messages[0].tool_calls"),
    (C, {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages"),
    (C, {"tools": [{"type": "function"}]}, 400, "tools"),
    (C, {"response_format": {"type": "xml"}}, 400, "response_format.type"),
    (C, {"response_format": {"type": "json_schema"}}, 400, "response_format"),
    (
        C,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
        400,
        "response_format.json_schema.schema",
    ),
    (C, {"messages": []}, 400, "messages"),
    (C, {"messages": [{"role": "user", "content": ""}] * 1025}, 400, "messages"),
    (C, {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages[0].role"),
    (C, {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    (C, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
    (C, {"messages": [{"role": "user", "content": "<|system|>"}]}, 400, "messages"),
    (C, {"messages": [{"role": "user", "content": "<eos>"}]}, 400, "messages"),
    (C, {"messages": [{"role": "user", "content": "ab" * 5000}]}, 400, "max_tokens"),
    (C, {"messages": [{"role": "user", "content": "a" * 900}]}, 400, "messages"),
]


@pytest.mark.parametrize(("path", "changes", "status", "param"), LIMITS)
def test_limits(served: Served, path: str, changes: dict[str, Any], status: int, param: str | None) -> None:
    body: dict[str, Any] = {"prompt": "a"} if path == P else {"messages": [{"role": "user", "content": "a"}]}
    with served.http() as http:
        for stream in (False, True):
            answer = http.post(path, content=json.dumps({**body, "stream": stream, **changes}), headers={"content-type": "application/json"})  # fmt: skip  # noqa: E501
            told = answer.json()["error"]
            assert (answer.status_code, told["param"]) == (status, param), told
            assert told["message"] and len(answer.content) < 1024


BODIES = {
    "no JSON": b"{",
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "nested": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested 33": b'{"prompt": "a", "metadata": ' + b'{"a":' * 33 + b"1" + b"}" * 33 + b"}",
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "long number": b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "overlong": b'{"prompt": "\xc0\xaf"}',
    "half a pair": b'{"prompt": "\xed\xa0\x80"}',
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_none(served: Served, name: str) -> None:
    status, _, body = exchange(served, close(served.head(P, len(BODIES[name]))) + BODIES[name])
    assert status == 400 and json.loads(body)["error"]["type"] == "invalid_request_error" and len(body) < 1024


FAULTS = {
    "ids": (CompletionRequest, {"prompt": [-1] * 10_000}),
    "ids of two": (CompletionRequest, {"prompt": [[""] * 10_000, [1]]}),
    "fields": (CompletionRequest, {"prompt": "a", **{str(i): 0 for i in range(10_000)}}),
    "metadata": (CompletionRequest, {"prompt": "a", "metadata": {str(i): 0 for i in range(10_000)}}),
    "messages": (ChatRequest, {"messages": [{}] * 10_000}),
    "fields of a message": (ChatRequest, {"messages": [{str(i): 0 for i in range(10_000)}]}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_few_of_many_faults_are_looked_for(served: Served, name: str) -> None:
    """To list them all would hold up everybody else."""
    kind, body = FAULTS[name]
    with pytest.raises(ValidationError) as fault:
        kind.model_validate(body)
    assert fault.value.error_count() <= 4
    with served.http() as http:
        told = http.post(P if kind is CompletionRequest else C, json=body)
    assert told.status_code == 400 and "JSON" not in told.text


def test_a_body_of_two_lengths_is_refused_with_all_behind_it(served: Served) -> None:
    head = served.head(P, 4).replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n")
    status, headers, body = exchange(served, head + b"0\r\n\r\n" + served.head("/health", 0, "GET"))
    assert (status, headers["connection"]) == (400, "close") and b"not both" in body and b"HTTP" not in body


def close(head: bytes) -> bytes:
    return head.replace(b"host:", b"connection: close\r\nhost:", 1)


def test_bodies_and_headers_that_are_too_large(served: Served) -> None:
    most = b'{"prompt": "a", "user": "' + b"x" * (MAX_BODY_BYTES - 27) + b'"}'
    assert len(most) == MAX_BODY_BYTES
    assert exchange(served, close(served.head(P, len(most))) + most)[0] == 400, "user is too long"
    assert exchange(served, close(served.head(P, MAX_BODY_BYTES + 1)))[0] == 413, "before a byte of it has come"
    chunked = close(served.head(P, 0)).replace(b"content-length: 0", b"transfer-encoding: chunked")
    parts = b"".join(b"10000\r\n" + b" " * 65536 + b"\r\n" for _ in range(17))
    assert exchange(served, chunked + parts + b"0\r\n\r\n")[0] == 413
    many = b"".join(b"x-%d: 1\r\n" % i for i in range(65))
    assert exchange(served, close(served.head("/health", 0, "GET")).replace(b"\r\n\r\n", b"\r\n" + many + b"\r\n"))[0] == 431  # fmt: skip  # noqa: E501
    long = served.head("/health", 0, "GET").replace(b"\r\n\r\n", b"\r\nx: " + b"1" * 20_000 + b"\r\n\r\n")
    assert exchange(served, close(long))[0] == 431


def test_other_methods_and_paths(served: Served) -> None:
    with served.http() as http:
        assert http.get("/v1/completions").status_code == 405
        assert http.post("/v1/models").status_code == 405
        assert http.get("/docs").status_code == http.get("/v1").status_code == http.get("/health//").status_code == 404
        assert http.get("/openapi.json").json()["paths"].keys() >= {"/v1/completions", "/v1/chat/completions"}
        page = http.get("/")
        assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
        assert "server" not in page.headers
        # Otherwise browsers may call the page's own requests those of another site.
        assert page.headers["referrer-policy"] == "same-origin"


def test_a_full_server_refuses_and_takes_the_rest() -> None:
    """Exactly so many answers are accepted; the others are told to come back."""
    with serving(key=KEY) as served:
        fill(served)


def fill(served: Served) -> None:
    most = served.service.async_engine.n_places
    assert most == 8 + 16
    body = {"prompt": "a", "max_tokens": 500, "n_loops": 4, "stream": True, "ignore_eos": True, "n": 2}
    connections = [served.connect() for _ in range(most // 2)]
    for connection in connections:
        connection.sendall(served.ask(P, body))
    for connection in connections:
        assert connection.recv(12) == b"HTTP/1.1 200"
    assert served.service.async_engine.n_taken == most
    with served.http() as http:
        for n in (1, 2):
            refused = http.post(P, json={"prompt": "a", "n": n})
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        # One ends, and its two places are free for others.
        connections.pop().close()
        until(lambda: served.service.async_engine.n_taken == most - 2)
        assert http.post(P, json={"prompt": "a", "n": 3}).status_code == 429
        connections.append(served.connect())
        connections[-1].sendall(served.ask(P, body))
        assert connections[-1].recv(12) == b"HTTP/1.1 200"
        assert http.post(P, json={"prompt": "a"}).status_code == 429
        told = http.get("/metrics").text
        assert 'mythos_refusals_total{reason="busy"} 4.0' in told
    for connection in connections:
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    served.settle()
