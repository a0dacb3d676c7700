"""A server for the tests of a file, unless the file has its own."""

from collections.abc import Iterator

import openai
import pytest

from tests.server.served import Served, serving, until


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running
        running.settle()
        until(lambda: running.service.body_memory.used == 0)  # the client has its answer a moment earlier


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    """OpenAI's own client of that server."""
    return served.client()
