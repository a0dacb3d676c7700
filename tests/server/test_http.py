"""What HTTP itself allows: pages of other sites, odd versions, HEAD, trailing slashes, chunks, and bodies in memory."""

import json
import socket

import pytest

from tests.server.served import Served, serving
from tests.server.test_middleware import exchange

P, C = "/v1/completions", "/v1/chat/completions"
BODY = b'{"prompt": "a", "max_tokens": 1}'
JSON = "application/json"


def posted(served: Served, *headers: str, host: str = "localhost", kind: str | None = JSON, path: str = P) -> int:
    """The status of a good request with these headers besides."""
    lines = [f"POST {path} HTTP/1.1", f"host: {host}", "connection: close", f"content-length: {len(BODY)}", *headers]
    lines += [] if kind is None else [f"content-type: {kind}"]
    status, answered, body = exchange(served, "\r\n".join([*lines, "\r\n"]).encode() + BODY)
    assert not any(name.startswith("access-control") for name in answered)
    if status != 200:
        assert json.loads(body)["error"]["message"]
    return status


OWN_SITE: list[tuple[str, tuple[str, ...]]] = [
    ("localhost", ()),
    ("localhost", ("sec-fetch-site: none",)),
    ("localhost:8000", ("sec-fetch-site: same-origin", "origin: http://localhost:8000")),
    ("localhost", ("origin: http://localhost",)),
    ("localhost", ("origin: http://localhost:80",)),
    ("localhost:443", ("origin: https://localhost",)),
    ("LocalHost:1", ("Origin: http://localhost:1",)),
    ("[::1]:8000", ("origin: http://[::1]:8000",)),
]
OTHER_SITE: list[tuple[str, tuple[str, ...]]] = [
    ("localhost", ("sec-fetch-site: cross-site",)),
    ("localhost", ("sec-fetch-site: same-site",)),
    ("localhost", ("Sec-Fetch-Site: Cross-Site",)),
    ("localhost", ("sec-fetch-site: ",)),
    ("localhost", ("origin: https://evil.example",)),
    ("localhost", ("origin: null",)),
    ("localhost", ("origin: ",)),
    ("localhost", ("origin: localhost",)),
    ("localhost:8000", ("origin: http://localhost",)),
    ("localhost:8000", ("origin: http://localhost:8001",)),
    ("localhost", ("origin: http://localhost.evil.example",)),
    ("localhost", ("origin: http://evil.example/http://localhost",)),
    ("localhost", ("origin: http://evil@localhost",)),
    ("localhost", ("origin: file://localhost",)),
    ("localhost", ("sec-fetch-site: same-origin", "origin: https://evil.example")),
    ("localhost", ("sec-fetch-site: cross-site", "origin: http://localhost")),
    ("localhost", ("origin: http://localhost", "origin: https://evil.example")),
]


@pytest.mark.parametrize(("host", "headers"), OWN_SITE)
def test_programs_and_the_own_page_may_ask(served: Served, host: str, headers: tuple[str, ...]) -> None:
    assert posted(served, *headers, host=host) == 200


@pytest.mark.parametrize(("host", "headers"), OTHER_SITE)
def test_pages_of_other_sites_may_not(served: Served, host: str, headers: tuple[str, ...]) -> None:
    """Whatever they say that they send, and wherever to: the gate itself refuses them."""
    for kind in (JSON, "text/plain", None):
        assert posted(served, *headers, host=host, kind=kind) == 403
    assert posted(served, *headers, host=host, path=C) == posted(served, *headers, host=host, path="/none") == 403


def test_pages_of_other_sites_may_not_even_with_the_key() -> None:
    with serving(key="k", max_queue=0) as served:
        key = "authorization: Bearer k"
        assert posted(served, key) == 200
        assert posted(served, key, "origin: https://evil.example", host="model.example") == 403
        assert posted(served, key, "origin: https://model.example", host="model.example") == 200


@pytest.mark.parametrize("kind", ["text/plain", None, "multipart/form-data", "application/jsonp", "text/json", "x"])
def test_a_body_has_to_be_called_json(served: Served, kind: str | None) -> None:
    assert posted(served, kind=kind) == 400


@pytest.mark.parametrize("kind", ["Application/JSON; charset=utf-8", "application/vnd.api+json"])
def test_other_names_of_json(served: Served, kind: str) -> None:
    assert posted(served, kind=kind) == 200


def test_a_name_that_is_no_text_is_called_so(served: Served) -> None:
    body = b'{"prompt": "a", "\\ud800": 1}'
    with served.http() as http:
        told = http.post(P, content=body, headers={"content-type": JSON})
    assert told.status_code == 400 and "a field's name" in told.json()["error"]["message"]


@pytest.mark.parametrize("version", ["0.9", "1.2", "2.0", "3.0", "9.9"])
def test_other_versions_of_http_are_refused(served: Served, version: str) -> None:
    status, headers, body = exchange(served, f"GET /health HTTP/{version}\r\nhost: localhost\r\n\r\n".encode())
    assert (status, headers["connection"]) == (400, "close")
    assert f"HTTP/{version}" in json.loads(body)["error"]["message"]


def test_http_1_0_is_answered(served: Served) -> None:
    assert exchange(served, b"GET /health HTTP/1.0\r\nhost: localhost\r\n\r\n")[0] == 200


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/v1/models", "/v1/engine", "/openapi.json"])
def test_head_is_get_without_the_body(served: Served, path: str) -> None:
    with served.http() as http:
        told, got = http.head(path), http.get(path)
        assert told.status_code == got.status_code == 200 and not told.content and got.content
        assert told.headers["content-type"] == got.headers["content-type"]
        if path in ("/", "/health", "/ready", "/v1/models", "/openapi.json"):  # the others change all the time
            assert told.headers["content-length"] == got.headers["content-length"]
        # The connection goes on where the answer has ended.
        assert http.head(path).status_code == http.get(path).status_code == 200
        assert http.head(P).status_code == 405 and http.head("/nowhere").status_code == 404


def test_a_trailing_slash_changes_nothing(served: Served) -> None:
    with served.http() as http:
        for path in ("/health", "/ready", "/metrics", "/v1/models", "/v1/engine", "/openapi.json"):
            assert http.get(f"{path}/").status_code == 200, path
        assert http.get("/v1/models/little/").json()["id"] == http.get("/v1/models/little").json()["id"]
        for path, body in ((P, {"prompt": "a"}), (C, {"messages": [{"role": "user", "content": "a"}]})):
            assert http.post(f"{path}/", json={**body, "max_tokens": 1}).status_code == 200
        assert http.get("/health//").status_code == http.get("/v1/").status_code == 404


def test_health_is_open_and_the_rest_is_not() -> None:
    with serving(key="k") as served:
        for method in ("GET", "HEAD"):
            for path, expected in (("/health", 200), ("/health/", 200), ("/ready", 200), ("/", 200), ("/metrics", 401)):
                line = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
                status, _, body = exchange(served, line.encode())
                assert status == expected and (body == b"") == (method == "HEAD"), (method, path)


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"  # noqa: E501
BAD_CHUNKS = {
    "no number": b"zz\r\n{}\r\n",
    "negative": b"-1\r\n{}\r\n",
    "a sign": b"+2\r\n{}\r\n0\r\n\r\n",
    "prefix": b"0x2\r\n{}\r\n0\r\n\r\n",
    "empty size": b"\r\n{}\r\n",
    "too long a number": b"F" * 30 + b"\r\n",
    "no end of the chunk": b"2\r\n{}XX0\r\n\r\n",
    "bad after good": b"2\r\n{}\r\nzz\r\n",
    "bad after much": b"10000\r\n" + b" " * 65536 + b"\r\nzz\r\n",
    "a null": b"2\x00\r\n{}\r\n",
    "bad trailer": b"0\r\nno colon\r\n\r\n",
    "a space first": b" 2\r\n{}\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_bad_chunks_are_answered_and_the_connection_is_closed(served: Served, name: str) -> None:
    status, headers, body = exchange(served, CHUNKED + BAD_CHUNKS[name])
    assert (status, headers["connection"]) == (400, "close"), body
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("part", [CHUNKED + b"5\r\n{}", CHUNKED, b"GET / HTTP/1.1\r\nhost: local"])
def test_what_ends_in_the_middle_is_answered(served: Served, part: bytes) -> None:
    with served.connect() as connection:
        connection.sendall(part)
        connection.shutdown(socket.SHUT_WR)
        data = b""
        while more := connection.recv(1000):
            data += more
    assert data.startswith(b"HTTP/1.1 400 Bad Request") and b"invalid_request_error" in data


def test_nothing_is_not_answered(served: Served) -> None:
    with served.connect() as connection:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1000) == b""


@pytest.mark.parametrize("head", [b"GET\r\n\r\n", b"\x16\x03\x01\x00\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"])
def test_what_is_no_request_is_answered(served: Served, head: bytes) -> None:
    status, headers, body = exchange(served, head)
    assert (status, headers["connection"]) == (400, "close") and json.loads(body)["error"]["message"]


def test_a_bad_request_behind_a_good_one_is_answered(served: Served) -> None:
    good = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    status, _, rest = exchange(served, good + b"GET\r\n\r\n")
    assert status == 200 and rest.count(b"HTTP/1.1 400") == 1


CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}


@pytest.mark.parametrize(
    ("config", "warned"),
    [({}, False), ({"knows_turns": False}, True), ({"knows_turns": False, "plain": True}, False)],
    ids=["trained", "untrained", "plain"],
)
def test_chats_with_a_model_that_knows_no_turns_come_with_a_warning(config: dict[str, bool], warned: bool) -> None:
    with serving(**config) as served, served.http() as http:
        for stream in (False, True):
            chat = http.post(C, json={**CHAT, "stream": stream})
            assert chat.status_code == 200
            assert ("not trained on conversations" in chat.headers.get("x-mythos-warning", "")) == warned
        assert "x-mythos-warning" not in http.post(P, json={"prompt": "a", "max_tokens": 1}).headers
        served.settle()


@pytest.mark.parametrize("plain", [False, True])
def test_special_tokens_in_messages_are_refused_and_in_prompts_taken(plain: bool) -> None:
    with serving(plain=plain) as served, served.http() as http:
        for text in ("a<eos>b", "<bos>", "<|assistant|>"):
            refused = http.post(C, json={**CHAT, "messages": [*CHAT["messages"], {"role": "user", "content": text}]})
            told = refused.json()["error"]
            assert refused.status_code == 400 and told["param"] == "messages" and "messages[1] has" in told["message"]
            assert http.post(P, json={"prompt": text, "max_tokens": 1}).status_code == 200
        served.settle()
