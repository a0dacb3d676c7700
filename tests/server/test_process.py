"""`mythos serve` as a process: how it starts and ends, what it opens, and what it logs."""

import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from open_mythos.cli import main
from open_mythos.cli.serve import LogHandler
from open_mythos.engine.engine import Engine
from open_mythos.ops.routes import cache_folder
from open_mythos.server.service import Service
from tests.server.served import model, tokenizer, until

ROOT = Path(__file__).resolve().parents[2]
KEY, PROMPT = "canary-key-5ba1c6", "canary-prompt-90f3e7"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "little"
    model().save_pretrained(path)
    tokenizer().save(path)
    return path


@contextmanager
def process(log: Path, *args: str, files: int | None = None) -> Generator[tuple[subprocess.Popen[str], int]]:
    """A process, and the port it says that it listens at.

    Args:
        files: how many it may have open.
    """

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    command = [sys.executable, "-m", "tests.server.audited", str(log), *args, "--port", "0", "--threads", "1"]
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "MYTHOS_API_KEY": KEY},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )
    try:
        assert running.stderr is not None
        line = running.stderr.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert match, line + running.stderr.read()
        yield running, int(match[1])
    finally:
        running.kill()
        running.wait()
        running.stderr.close()


def ended(running: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status, and what was logged after the first line."""
    _, log = running.communicate(timeout=40)
    return running.returncode, log


def raw(port: int, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(data)
    return connection


def test_a_whole_life(folder: Path, tmp_path: Path) -> None:
    """Requests good and bad, then SIGTERM with 20 in work: nothing secret is logged, nothing but the model opened."""
    audit = tmp_path / "audit"
    with process(audit, str(folder)) as (running, port):
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {KEY}"}) as http:
            until(lambda: http.get("/ready").status_code == 200, 40)
            told = []
            for body in ({}, {"n_loops": 99}, {"stream": True}, {PROMPT: 1}, {"stop": PROMPT}, {"temperature": PROMPT}):
                told.append(http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3, **body}))
            told.append(http.post("/v1/completions", content=f'{{"prompt": "{PROMPT}'))
            told.append(http.post(f"/v1/{PROMPT}?key={KEY}", json={}))
            told.append(http.get("/v1/models", headers={"authorization": f"Bearer {PROMPT}"}))
            told.append(http.get("/metrics"))
            assert [answer.status_code for answer in told] == [200, 400, 200, 400, 200, 400, 400, 404, 401, 200]
            assert not any(KEY in answer.text for answer in told) and PROMPT not in told[-1].text
            raw(port, f"GET /{PROMPT} HTTP/9.9\r\n{KEY}: {PROMPT}\r\n\r\n".encode()).close()
            raw(port, b"\x16\x03\x01" + PROMPT.encode() * 100).close()
        body = f'{{"prompt": "{PROMPT}", "max_tokens": 100, "ignore_eos": true, "stream": true}}'
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        request = f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
        connections = [raw(port, request) for _ in range(20)]
        for connection in connections:
            assert connection.recv(12) == b"HTTP/1.1 200"
        running.send_signal(signal.SIGTERM)
        for connection in connections:
            data = b""
            while more := connection.recv(65536):
                data += more
            assert b'"finish_reason": "length"' in data and data.rstrip(b"\r\n0").endswith(b"[DONE]")
            connection.close()
        status, log = ended(running)
    assert status == 0, log
    assert "answers are in work" in log and KEY not in log and PROMPT not in log and "Traceback" not in log
    opened = audit.read_text().splitlines()
    assert not [line for line in opened if not line.startswith("open\t")], "nothing unpickled, nobody called"
    files = {line.split("\t")[1].strip("'") for line in opened}
    system = ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/", "/lib", "<", sys.prefix, sys.base_prefix, str(ROOT))
    # What is faster on this machine was measured before, or is now.
    system = (*system, str(cache_folder()))
    foreign = {name for name in files if name.startswith("/") and not name.startswith(system)}
    own = {name for name in foreign if Path(name).parent == folder}
    assert {Path(name).name for name in own} == {"config.json", "model.safetensors", "tokenizer.json"} | {
        "tokenizer_config.json"
    }
    assert not foreign - own


@pytest.mark.parametrize("delay_s", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_told_to_end_while_the_model_loads(folder: Path, tmp_path: Path, delay_s: float) -> None:
    with process(tmp_path / "audit", str(folder)) as (running, _):
        time.sleep(delay_s)
        running.send_signal(signal.SIGTERM)
        status, log = ended(running)
    assert status == 0 and "Traceback" not in log, log


def test_few_files_and_two_signals(folder: Path, tmp_path: Path) -> None:
    """200 idle connections where 64 files may be open: some are turned away, others are answered, the log is short."""
    with process(tmp_path / "audit", str(folder), files=64) as (running, port):
        idle = [raw(port, b"") for _ in range(200)]
        with raw(port, b"") as late:
            assert late.recv(1000).startswith(b"HTTP/1.1 503")
        for connection in idle:
            connection.close()
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {KEY}"}) as http:
            until(lambda: http.get("/ready").status_code == 200, 40)
            assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        running.send_signal(signal.SIGINT)
        time.sleep(0.05)  # two at once are one
        running.send_signal(signal.SIGINT)
        status, log = ended(running)
    assert status == 0 and "Traceback" not in log and "at most " in log, log
    assert len(log.splitlines()) < 10, log


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.5])
@pytest.mark.slow
def test_two_signals_while_an_answer_is_made(folder: Path, tmp_path: Path, delay_s: float) -> None:
    with process(tmp_path / "audit", str(folder)) as (running, port):
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {KEY}"}) as http:
            until(lambda: http.get("/ready").status_code == 200, 40)
            body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 8}
            with http.stream("POST", "/v1/completions", json=body):
                for _ in range(3):
                    running.send_signal(signal.SIGINT)
                    time.sleep(delay_s)
                status, log = ended(running)
    assert status == 0 and "Traceback" not in log, log


def test_names_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("a\r\nb", "a\nb", "a\x1b[2J", "a\u2028b", "", " ", "x" * 257, "a\udcff", "\x00"):
        assert main(["serve", str(folder), "--name", name]) == 2
        told = capsys.readouterr().err
        assert "must be 1 to 256 printable characters" in told and len(told.splitlines()) == 1, name
    odd = tmp_path / "a\nb"
    odd.mkdir()
    (odd / "config.json").touch()
    assert main(["serve", str(odd)]) == 2
    assert "use --name" in capsys.readouterr().err


def test_the_log_is_lines_and_never_waits() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as out, os.fdopen(writing, "w") as stream:
        handler = LogHandler(stream)
        for _ in range(5000):  # far more than the pipe holds; without a reader each would wait for ever
            handler.emit(logging.makeLogRecord({"msg": "a folder\nof \x1b[2J two\u2028lines %s", "args": ("x" * 80,)}))
        stream.flush()
        got = os.read(out.fileno(), 2**20).decode()
    assert set(got.splitlines()) == {"a folder\\nof \\x1b[2J two\\u2028lines " + "x" * 80}


@pytest.mark.slow
def test_a_folder_that_is_no_model_ends_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer().save(tmp_path)
    with process(tmp_path / "audit", str(tmp_path)) as (running, _):
        status, log = ended(running)
    assert status == 2 and "model_type='llama'" in log and "Traceback" not in log


def test_what_the_command_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip  # noqa: E501
    def told(*args: str) -> str:
        assert main(["serve", *args]) == 2
        return capsys.readouterr().err

    key = tmp_path / "key"
    monkeypatch.delenv("MYTHOS_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert "needs a key" in told(str(folder), "--host", host)
    for content in ("", "two words", "\u00fcml\u00e4ut", "a\x00b"):
        key.write_text(content, "utf-8")
        assert "must be printable ASCII" in told(str(folder), "--api-key-file", str(key))
    assert "No such file" in told(str(folder), "--api-key-file", str(tmp_path / "none"))
    assert "folder nowhere does not exist" in told("nowhere")
    assert "--port 70000" in told(str(folder), "--port", "70000")
    assert "--max-loops 65" in told(str(folder), "--max-loops", "65")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in told(str(folder), "--port", str(taken.getsockname()[1]))
    monkeypatch.setenv("MYTHOS_API_KEY", "")
    assert "the variable MYTHOS_API_KEY" in told(str(folder))


def test_the_model_is_not_looked_through_for_garbage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full collection, which a nested body brings about, takes half a second otherwise."""
    made: list[object] = []
    monkeypatch.delenv("MYTHOS_API_KEY", raising=False)
    monkeypatch.setattr("gc.freeze", lambda: made.append("frozen"))

    def run(_: object, service: Service, listener: socket.socket) -> bool:
        listener.close()
        return made.append(service.async_engine.make()) is None

    monkeypatch.setattr("open_mythos.server.connection.run", run)
    handlers, level = logging.root.handlers[:], logging.getLogger("open_mythos.serve").level
    try:
        assert main(["serve", str(folder), "--port", "0", "--threads", "1", "--kv-tokens", "512"]) == 0
    finally:
        logging.root.handlers[:] = handlers
        logging.getLogger("open_mythos.serve").setLevel(level)
    assert made[0] == "frozen" and isinstance(made[1], Engine)
    assert caplog.text.count("was not trained on conversations") == 1


def test_a_key_on_the_command_line_is_no_option(folder: Path) -> None:
    """Others on the machine could read it."""
    with pytest.raises(SystemExit):
        main(["serve", str(folder), "--api-key", KEY])
