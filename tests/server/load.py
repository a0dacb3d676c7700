"""Many clients at once against `mythos serve` as a process of its own; each function gives its figures.

In full with `make test-slow` (OPEN_MYTHOS_FIGURES names a file for the figures), or one after the other:
python -m tests.server.load [FOLDER] NAME SIZE, with crowd 1000, leavers 2000, drips 500, bodies 2000 and
soak 600 (seconds).
"""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.server.served import model, record, tokenizer

ROOT = Path(__file__).resolve().parents[2]
ROWS, QUEUE = 8, 64
P = "/v1/completions"
Figures = dict[str, Any]


@dataclass
class Target:
    """A server, and what the system knows of its process."""

    pid: int
    port: int

    def rss_mib(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def n_files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def send(self, body: Any, path: str = P) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self.open()
        writer.write(request(path, body))
        return reader, writer

    async def ask(self, body: Any = None, path: str = P) -> tuple[int, bytes, float]:
        """Status, body, and seconds until the status was there."""
        began = time.perf_counter()
        reader, writer = await self.send(body, path)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            seconds = time.perf_counter() - began
            return int(head.split()[1]), await reader.read(), seconds
        finally:
            writer.close()

    async def get(self, path: str) -> Any:
        _, data, _ = await self.ask(path=path)
        return json.loads(data)

    async def n_tasks(self) -> int:
        _, data, _ = await self.ask(path="/metrics")
        return round(float(re.search(rb"^mythos_tasks (\S+)", data, re.M)[1]))

    async def idle(self) -> float:
        """Wait until nothing is in work; how many seconds that took."""
        began = time.perf_counter()
        while True:
            now = await self.get("/v1/engine")
            if not (now["admitted"] or now["waiting"] or now["pages"]["used"]):
                return time.perf_counter() - began
            await asyncio.sleep(0.01)


def request(path: str, body: Any) -> bytes:
    if body is None:
        return f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
    data = json.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n{data}".encode()


@contextlib.asynccontextmanager
async def target(folder: Path) -> AsyncIterator[Target]:
    """A server, ready; at the end it is told to end, and has to."""
    if not folder.exists():
        model().save_pretrained(folder)
        tokenizer().save(folder)
    args = ["serve", str(folder), "--port", "0", "--max-rows", str(ROWS), "--max-queue", str(QUEUE), "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "open_mythos", *args], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        port = re.search(r":(\d+),", process.stderr.readline())
        assert port is not None
        found = Target(process.pid, int(port[1]))
        while not (await found.get("/ready"))["ready"]:
            await asyncio.sleep(0.05)
        await found.ask({"prompt": "a"})
        yield found
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def at(values: list[float], share: float) -> float:
    """A quantile, in milliseconds."""
    ordered = sorted(values)
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else 0.0


class Asker(asyncio.Protocol):
    """A client that costs little: it stamps the time of the first bytes, and counts who is in work."""

    in_work = most = 0

    def __init__(self) -> None:
        self.transport: asyncio.WriteTransport | None = None
        self.began = self.answered = 0.0
        self.status, self.tail, self.finished = 0, b"", False
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport

    def ask(self, data: bytes) -> None:
        assert self.transport is not None
        self.began = time.perf_counter()
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        if not self.status:
            self.answered, self.status = time.perf_counter(), int(data[9:12])
            if self.status == 200:
                Asker.in_work += 1
                Asker.most = max(Asker.most, Asker.in_work)
        self.tail = self.tail[-100:] + data
        if not self.finished and b'"finish_reason": "length"' in self.tail:
            self.finished = True
            Asker.in_work -= 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set_result(None)


async def crowd(server: Target, n: int, max_tokens: int = 200) -> Figures:
    """So many requests at once: who is accepted, how soon the others are refused.

    All are connected before the first asks, so that what is timed is the server.
    """
    before, loop = server.rss_mib(), asyncio.get_running_loop()
    Asker.in_work = Asker.most = 0
    askers = [(await loop.create_connection(Asker, "127.0.0.1", server.port))[1] for _ in range(n)]
    body = {"prompt": "a", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    datas = [request(P, {**body, "seed": i}) for i in range(n)]
    health: list[float] = []

    async def look() -> None:
        while True:
            health.append((await server.ask(path="/health"))[2])
            await asyncio.sleep(0.05)

    for asker, data in zip(askers, datas, strict=True):
        asker.ask(data)
    looking = asyncio.create_task(look())
    await asyncio.gather(*(asker.over for asker in askers))
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    await server.idle()
    accepted = [asker for asker in askers if asker.status == 200]
    refused = [asker.answered - asker.began for asker in askers if asker.status == 429]
    assert len(accepted) + len(refused) == n
    return {
        "requests": n,
        "accepted": len(accepted),
        "finished": sum(asker.finished for asker in accepted),
        "most_in_work": Asker.most,
        "places": ROWS + QUEUE,
        "refused": len(refused),
        "refused_p50_ms": at(refused, 0.5),
        "refused_p99_ms": at(refused, 0.99),
        "health_p99_ms": at(health, 0.99),
        "rss_growth_mib": round(server.rss_mib() - before, 1),
    }


async def leavers(server: Target, n: int) -> Figures:
    """So many clients that leave at random points: before, in and behind the headers, the queue, the answer."""
    draw, files = random.Random(0), server.n_files()
    some = asyncio.Semaphore(48)

    async def one() -> None:
        async with some:
            body = {"prompt": "a" * draw.randint(1, 200), "max_tokens": draw.randint(1, 200), "n": draw.randint(1, 3)}
            data = request(P, {**body, "stream": draw.random() < 0.5, "n_loops": draw.randint(1, 4)})
            reader, writer = await server.open()
            writer.write(data[: draw.randint(1, len(data))] if draw.random() < 0.2 else data)
            with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError, ConnectionError):
                await asyncio.wait_for(reader.readexactly(draw.randint(1, 5000)), draw.expovariate(20))
            if draw.random() < 0.5:
                writer.transport.abort()
            writer.close()

    await asyncio.gather(*(one() for _ in range(n)))
    settled = await server.idle()
    while server.n_files() > files + 1:
        await asyncio.sleep(0.05)
    now = await server.get("/v1/engine")
    return {
        "disconnects": n,
        "seconds_until_free": round(settled, 3),
        "rows_left": now["admitted"],
        "waiting_left": now["waiting"],
        "pages_left": now["pages"]["used"],
        "files_left": server.n_files() - files,
    }


async def drips(server: Target, n: int, rounds: int = 40) -> Figures:
    """Normal requests beside so many that send a byte now and then, against the same alone."""
    body = {"prompt": "a", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    files = server.n_files()

    async def normal() -> list[float]:
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            status, _, _ = await server.ask(body)
            assert status == 200
            times.append(time.perf_counter() - began)
        return times

    alone = await normal()
    data = request(P, {**body, "user": "x" * 200})
    closed: list[float] = []

    async def drip() -> None:
        began = time.perf_counter()
        reader, writer = await server.open()
        over = asyncio.ensure_future(reader.read())
        with contextlib.suppress(ConnectionError):
            for byte in data:
                writer.write(bytes([byte]))
                await asyncio.wait([over], timeout=0.5)
                if over.done():
                    break
            await over
        closed.append(time.perf_counter() - began)
        writer.close()

    dripping = [asyncio.ensure_future(drip()) for _ in range(n)]
    await asyncio.sleep(1)
    beside = await normal()
    await asyncio.gather(*dripping)
    while server.n_files() > files + 1:
        await asyncio.sleep(0.05)
    return {
        "drips": n,
        "alone_p50_ms": at(alone, 0.5),
        "alone_p99_ms": at(alone, 0.99),
        "beside_p50_ms": at(beside, 0.5),
        "beside_p99_ms": at(beside, 0.99),
        "ratio_p50": round(at(beside, 0.5) / at(alone, 0.5), 2),
        "closed_after_s": round(max(closed), 1),
        "files_left": server.n_files() - files,
    }


async def soak(server: Target, seconds: float) -> Figures:
    """A mix of all that clients do, for so long; what has grown at the end."""
    draw, end = random.Random(1), time.monotonic() + seconds
    counts: dict[int, int] = {}
    n_left = 0

    async def client() -> None:
        nonlocal n_left
        while time.monotonic() < end:
            body = {"prompt": "a" * draw.randint(1, 100), "max_tokens": draw.randint(1, 40), "n": draw.randint(1, 2)}
            body |= {"n_loops": draw.choice([1, 2, 4, 99]), "stream": draw.random() < 0.5}
            body |= draw.choice([{}, {"exit": "kl", "exit_threshold": draw.random()}, {"logprobs": 2}, {"stop": "e"}])
            if draw.random() < 0.2:
                n_left += 1
                _, writer = await server.send(body)
                await asyncio.sleep(draw.expovariate(50))
                writer.transport.abort()
            else:
                status, _, _ = await server.ask(body)
                counts[status] = counts.get(status, 0) + 1

    async def state() -> tuple[float, int, int]:
        await server.idle()
        return server.rss_mib(), server.n_files(), await server.n_tasks()

    clients = [asyncio.ensure_future(client()) for _ in range(12)]
    # The first part fills pages and pools.
    await asyncio.sleep(seconds / 5)
    first_rss = server.rss_mib()
    await asyncio.gather(*clients)
    rss, files, tasks = await state()
    await asyncio.sleep(1)
    return {
        "seconds": seconds,
        "answers": counts,
        "left": n_left,
        "rss_mib": round(rss, 1),
        "rss_growth_mib": round(rss - first_rss, 1),
        "files": files,
        "tasks": tasks,
    }


async def bodies(server: Target, n: int) -> Figures:
    """So many bodies of 1 MiB at once, each without its last byte; what memory they take, and what is left of it."""
    data = b'{"prompt": "' + b"a" * (2**20 - 15)
    before, files = server.rss_mib(), server.n_files()
    head = f"POST {P} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    statuses: dict[int, int] = {}

    async def one() -> None:
        reader, writer = await server.open()
        try:
            writer.write(f"{head}content-length: {len(data) + 2}\r\n\r\n".encode() + data)
            status = int((await reader.readuntil(b"\r\n"))[9:12])
            statuses[status] = statuses.get(status, 0) + 1
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()

    sending = asyncio.gather(*(one() for _ in range(n)))
    most = before
    for _ in range(100):
        await asyncio.sleep(0.05)
        most = max(most, server.rss_mib())
    health = (await server.ask(path="/health"))[0]
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    while server.n_files() > files + 1:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    return {
        "bodies": n,
        "statuses": statuses,
        "health": health,
        "rss_before_mib": round(before, 1),
        "rss_most_mib": round(most, 1),
        "rss_after_mib": round(server.rss_mib(), 1),
    }


LOADS: dict[str, Callable[[Target, int], Coroutine[Any, Any, Figures]]] = {
    "crowd": crowd,
    "leavers": leavers,
    "drips": drips,
    "soak": soak,
    "bodies": bodies,
}


async def run(folder: Path, name: str, size: int) -> Figures:
    """One of LOADS on a fresh server; its figures, with the process's files and tasks before and after."""
    async with target(folder) as server:
        before = server.n_files(), await server.n_tasks()
        figures = await LOADS[name](server, size)
        await asyncio.sleep(0.3)
        after = server.n_files(), await server.n_tasks()
        figures |= {"files_before_after": [before[0], after[0]], "tasks_before_after": [before[1], after[1]]}
    record(name, **figures)
    return figures


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        where = Path(sys.argv[1]) if len(sys.argv) > 3 else Path(made) / "model"
        print(json.dumps(asyncio.run(run(where, sys.argv[-2], int(sys.argv[-1]))), indent=2))
