"""`push_to_hub` and loading by a repository's name, against a small stand-in of the hub on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.models import scaled, tiny

SHA = "0" * 40
CLIENT = """
import sys, torch
from transformers import AutoModelForCausalLM
from open_mythos import OpenMythos
import open_mythos.hf
AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("user/model")
ids = torch.arange(6)[None]
theirs, ours = AutoModelForCausalLM.from_pretrained("user/model"), OpenMythos.from_pretrained("user/model")
assert torch.equal(theirs(ids).logits, ours(ids))
assert torch.equal(ours(ids), OpenMythos.from_pretrained(sys.argv[1])(ids))
"""


class Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: object = None, code: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": SHA, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/repos/create"):
            self.answer({"url": "http://127.0.0.1/user/model", "id": "user/model"})
        elif self.path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"http://127.0.0.1/user/model/commit/{SHA}", "commitOid": SHA})
        else:
            self.answer({}, 404)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith("/api/models/user/model/tree"):
            self.answer([{"type": "file", "path": n, "size": len(d), "oid": SHA} for n, d in self.files.items()])
        elif path.startswith("/api/models/user/model"):
            self.answer({"id": "user/model", "sha": SHA, "siblings": [{"rfilename": n} for n in self.files]})
        elif "/resolve/" in path and name in self.files:
            self.answer(self.files[name], ETag=f'"{hashlib.sha1(self.files[name]).hexdigest()}"')
        else:
            self.answer({}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    Hub.files = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", Hub.files
        server.shutdown()


def test_a_pushed_model_loads_by_its_name(hub: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    address, files = hub
    scaled(tiny()).save_pretrained(tmp_path / "model")
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_none"}
    env = {**env, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(tmp_path / "model")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert files.keys() >= {"config.json", "model.safetensors", "modeling_open_mythos.py", "generation_config.json"}
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (tmp_path / "model" / name).read_bytes()
