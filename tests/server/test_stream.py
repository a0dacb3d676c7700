"""The pieces of a stream join to the answer that comes at once, every character whole."""

import asyncio
import random
from typing import Any

import openai
import pytest

from tests.server.served import MODEL, TEXT, Served, serving


async def both(client: openai.AsyncOpenAI, seed: int) -> bool:
    """Ask a prompt both ways; whether a stop string ended the answer."""
    draw = random.Random(seed)
    start = draw.randrange(len(TEXT))
    text = (TEXT[start:] + TEXT)[: draw.randint(1, 40)]
    stops = draw.choice([[], [draw.choice(TEXT)], [draw.choice(TEXT), TEXT[start : start + 2]], ["\ufffd"]])
    asked: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": draw.randint(1, 20),
        "temperature": draw.choice([0, 0.8, 1.5]),
        "seed": seed,
        "extra_body": {"n_loops": draw.randint(1, 4), "return_loops": True},
        **({"stop": stops} if stops else {}),
    }
    if draw.random() < 0.5:
        asked["messages"] = [{"role": "user", "content": text}]
        whole = (await client.chat.completions.create(**asked)).choices[0]
        expected = whole.message.content
        parts = [c.choices[0] async for c in await client.chat.completions.create(**asked, stream=True)]
        pieces = [part.delta.content or "" for part in parts]
        parts = parts[1:]
    else:
        asked["prompt"] = text
        whole = (await client.completions.create(**asked)).choices[0]
        expected = whole.text
        parts = [c.choices[0] async for c in await client.completions.create(**asked, stream=True)]
        pieces = [part.text for part in parts]
    assert "".join(pieces).encode() == expected.encode()
    assert "".join(whole.pieces) == expected == "".join("".join(part.pieces) for part in parts)
    assert whole.loops == [n for part in parts for n in part.loops]
    assert (parts[-1].finish_reason, parts[-1].stop_reason) == (whole.finish_reason, whole.stop_reason)
    stopped = isinstance(whole.stop_reason, str) and whole.stop_reason in stops
    assert not any(stop in expected for stop in stops)
    return stopped


async def ask_all(served: Served, n: int) -> int:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        some = asyncio.Semaphore(8)

        async def one(seed: int) -> bool:
            async with some:
                return await both(client, seed)

        return sum(await asyncio.gather(*(one(seed) for seed in range(n))))


@pytest.mark.parametrize("n", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_stream_joins_to_the_answer(n: int) -> None:
    with serving() as served:
        n_stopped = asyncio.run(ask_all(served, n))
        served.settle()
    assert n / 10 < n_stopped < n, "the mix should hold both"
