"""A server that speaks as much of the Hugging Face hub as listing, reading and downloading a dataset takes."""

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class FakeHub:
    """One dataset, the files of a folder; a test may change `commit` and `card`, and fail requests by `broken`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.commit = "a" * 40
        self.card: dict[str, Any] = {}
        self.known: dict[str, Path] = {}
        """Folders of earlier commits."""
        self.broken: list[int] = []
        """Statuses to answer the next reads of contents with."""
        self.requests: list[tuple[str, str, int]] = []
        """Method, path, and bytes sent."""
        self.url = ""

    def at(self, revision: str) -> tuple[str, Path] | None:
        if revision in ("main", self.commit):
            return self.commit, self.folder
        return (revision, self.known[revision]) if revision in self.known else None

    def bytes_sent(self, suffix: str) -> int:
        return sum(n for _, path, n in self.requests if path.endswith(suffix))


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name, oid = path.relative_to(folder).as_posix(), sha1(path.as_posix().encode()).hexdigest()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": oid, "size": 0}
    return {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}


@contextmanager
def serve(hub: FakeHub) -> Generator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            length = headers.get("Content_Length", str(len(body)))
            if "Content_Length" not in headers:
                self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            hub.requests.append((self.command, urlsplit(self.path).path, len(body)))

        def json(self, value: Any) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            match = re.fullmatch(rf"/api/datasets/{hub.name}/paths-info/([^/]+)", unquote(urlsplit(self.path).path))
            found = hub.at(match[1]) if match else None
            if found is None:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            paths = json.loads(asked)["paths"]
            self.json([_entry(found[1], found[1] / path) for path in paths if (found[1] / path).exists()])

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(rf"/api/datasets/{hub.name}(?:/revision/([^/]+))?", path):
                found = hub.at(match[1] or "main")
                if found is not None:
                    return self.json({"id": hub.name, "sha": found[0], "cardData": hub.card, "siblings": []})
            elif match := re.fullmatch(rf"/api/datasets/{hub.name}/tree/([^/]+)(?:/(.*))?", path):
                found = hub.at(match[1])
                if found is not None and (found[1] / (match[2] or "")).is_dir():
                    inside = sorted((found[1] / (match[2] or "")).rglob("*"))
                    if "recursive=true" not in self.path.lower():
                        inside = [p for p in inside if p.parent == found[1] / (match[2] or "")]
                    return self.json([_entry(found[1], p) for p in inside])
            elif match := re.fullmatch(rf"/datasets/{hub.name}/resolve/([^/]+)/(.*)", path):
                found = hub.at(match[1])
                if found is not None and (found[1] / match[2]).is_file():
                    return self.contents(found[0], found[1] / match[2])
            self.answer(404, X_Error_Code="EntryNotFound" if hub.name in path else "RepoNotFound")

        def contents(self, commit: str, path: Path) -> None:
            if self.command == "GET" and hub.broken:
                return self.answer(hub.broken.pop())
            data = path.read_bytes()
            headers = {"ETag": f'"{sha1(data).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
                part = f"bytes {start}-{end}/{len(data)}"
                return self.answer(206, data[start : end + 1], Content_Range=part, **headers)
            if self.command == "HEAD":
                return self.answer(200, Content_Length=str(len(data)), **headers)
            self.answer(200, data, **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, here and in processes begun from here, ask this server and keep what it gets in `cache`."""
    import huggingface_hub
    from huggingface_hub.utils import _cache_assets

    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(cache / "assets"))
    huggingface_hub.HfFileSystem.clear_instance_cache()
