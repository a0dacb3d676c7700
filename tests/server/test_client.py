"""The server as OpenAI's own client sees it."""

import json

import openai
import pytest

from open_mythos import SamplingParams
from open_mythos.engine.engine import TokenEvent
from open_mythos.engine.sequence import Sequence
from open_mythos.server.protocol import CompletionRequest
from open_mythos.server.responses import ResponseBuilder
from open_mythos.tokenization.chat_template import render
from open_mythos.tokenization.token_text import TokenTexts
from open_mythos.tokenization.tokenizer import ByteTokenizer
from tests.server.served import MODEL, Served, tokenizer, until

PROMPT = "\u0416\u0438\u0437\u043d\u044c \u044d\u0442\u043e \U0001f30a"
TURNS = [{"role": "user", "content": "\u65e5\u672c\u8a9e?"}]


def alone(served: Served, ids: list[int], **params: object) -> tuple[str, list[int], list[int]]:
    """Text, ids and loops of an answer by an engine without a server."""
    from tests.server.served import Engine, EngineConfig, model

    engine = Engine(model(), tokenizer(), EngineConfig(max_rows=2))
    request = engine.add(ids, SamplingParams(**params))
    while engine.busy:
        engine.step()
    return request.text, request.token_ids, request.loops


def test_a_completion_is_what_the_engine_says(served: Served, client: openai.OpenAI) -> None:
    ids = tokenizer().encode(PROMPT)
    how = {"max_tokens": 24, "temperature": 0.9, "seed": 5}
    text, _, loops = alone(served, ids, **how, n_loops=3, top_k=40, exit="latent_diff", exit_threshold=0.3)
    extra = {"n_loops": 3, "top_k": 40, "exit": "latent_diff", "exit_threshold": 0.3, "return_loops": True}
    for prompt in (PROMPT, ids):
        done = client.completions.create(model=MODEL, prompt=prompt, **how, extra_body=extra)
        (choice,) = done.choices
        assert (choice.text, choice.finish_reason, choice.index) == (text, "length", 0)
        assert (choice.loops, "".join(choice.pieces)) == (loops, text)
        assert done.object == "text_completion" and done.model == MODEL and done.id.startswith("cmpl-")
        used = done.usage
        assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (len(ids), 24, len(ids) + 24)
        assert used.loops == {"mean": sum(loops) / 24, "total": sum(loops)}
    assert len(set(loops)) > 1
    untold = client.completions.create(model=MODEL, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert untold.usage.completion_tokens == 16


def test_several_prompts_and_several_answers(served: Served, client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt=["a", "b"], n=3, max_tokens=5, seed=11)
    assert [choice.index for choice in done.choices] == list(range(6))
    told = [
        alone(served, tokenizer().encode(p), max_tokens=5, seed=11 + i, n_loops=4)[0] for p in "ab" for i in range(3)
    ]
    assert [choice.text for choice in done.choices] == told
    assert done.usage.prompt_tokens == 2 and done.usage.completion_tokens == 30


def test_a_chat(served: Served, client: openai.OpenAI) -> None:
    ids = render(TURNS, tokenizer(), reply=True)[0]
    text = alone(served, ids, max_tokens=9, temperature=0)[0]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "\u65e5\u672c"}, {"type": "text", "text": "\u8a9e?"}]}
    ]
    for turns, name in ((TURNS, "max_tokens"), (parts, "max_completion_tokens")):
        done = client.chat.completions.create(model=MODEL, messages=turns, temperature=0, **{name: 9})
        assert done.choices[0].message.content == text and done.choices[0].message.role == "assistant"
        assert done.usage.prompt_tokens == len(ids) and done.object == "chat.completion"
    # What an answer holds can be handed back as a turn.
    again = [*TURNS, done.choices[0].message.model_dump(), {"role": "developer", "content": "so?"}]
    assert client.chat.completions.create(model=MODEL, messages=again, max_tokens=2).usage.prompt_tokens > len(ids)
    # A second time the prompt is found computed.
    long = [{"role": "user", "content": "a" * 90}]
    counts = [client.chat.completions.create(model=MODEL, messages=long, max_tokens=1).usage for _ in range(2)]
    assert [used.prompt_tokens_details.cached_tokens > 0 for used in counts] == [False, True]
    # Without a bound of its own an answer ends where the context does, or before.
    assert client.chat.completions.create(model=MODEL, messages=long, seed=0).choices[0].finish_reason in (
        "length",
        "stop",
    )


def test_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=TURNS, max_tokens=20, seed=3, extra_body={"ignore_eos": True}
    )
    stream = client.chat.completions.create(
        model=MODEL, messages=TURNS, max_tokens=20, seed=3, stream=True, stream_options={"include_usage": True},
        extra_body={"return_loops": True, "ignore_eos": True},
    )  # fmt: skip
    chunks = list(stream)
    first, *rest, last = chunks
    assert first.choices[0].delta.role == "assistant" and {chunk.id for chunk in chunks} == {first.id}
    assert "".join(c.choices[0].delta.content or "" for c in rest) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in rest] == [None] * (len(rest) - 1) + ["length"]
    assert sum(len(c.choices[0].loops) for c in rest) == 20
    assert last.choices == [] and last.usage.completion_tokens == 20 and last.usage.loops["total"] > 0
    plain = client.chat.completions.create(model=MODEL, messages=TURNS, max_tokens=3, n=2, stream=True)
    told = list(plain)
    assert {c.choices[0].index for c in told} == {0, 1} and all(c.usage is None for c in told)


def test_log_probabilities(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    told = client.completions.create(**asked, prompt=PROMPT, logprobs=3).choices[0]
    assert all(len(best) <= 3 for best in told.logprobs.top_logprobs) and len(told.logprobs.tokens) == 6
    for own, best in zip(told.logprobs.token_logprobs, told.logprobs.top_logprobs, strict=True):
        assert own <= 0 and own == pytest.approx(max(best.values()))
    assert told.logprobs.text_offset[0] == 0 and max(told.logprobs.text_offset) <= len(told.text)
    assert client.completions.create(**asked, prompt=PROMPT, logprobs=0).choices[0].logprobs.top_logprobs == [{}] * 6
    chat = client.chat.completions.create(**asked, messages=TURNS, logprobs=True, top_logprobs=2).choices[0]
    assert len(chat.logprobs.content) == 6 and all(len(each.top_logprobs) == 2 for each in chat.logprobs.content)
    for each in chat.logprobs.content:
        assert bytes(each.bytes).decode(errors="replace") == each.token
    streamed = client.chat.completions.create(**asked, messages=TURNS, logprobs=True, top_logprobs=2, stream=True)
    content = [token for chunk in streamed if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert content == chat.logprobs.content
    assert client.chat.completions.create(**asked, messages=TURNS).choices[0].logprobs is None


def test_candidates_that_are_no_text_of_their_own_are_told_apart() -> None:
    best = {0xE6: -0.5, 97: -1.5, 0xE7: -2.5, 257: -3.5}  # two parts of characters around a letter, and the end token
    request = Sequence(0, [1], SamplingParams(), 1, None, True, 1)
    event = TokenEvent(request, 97, "a", 1, "a", logprob=-1.5, top_logprobs=best)
    asked = CompletionRequest(prompt=["a"], logprobs=3)
    (data,) = ResponseBuilder(asked, [[1]], MODEL, ByteTokenizer(), TokenTexts(ByteTokenizer())).piece(0, event)
    (choice,) = json.loads(data.removeprefix(b"data: "))["choices"]
    told = {"bytes:\\xe6": -0.5, "a": -1.5, "bytes:\\xe7": -2.5, "<eos>": -3.5}
    assert list(choice["logprobs"]["top_logprobs"][0].items()) == list(told.items())


def test_what_ends_an_answer(served: Served, client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "extra_body": {"ignore_eos": True}}
    full = client.completions.create(**asked).choices[0].text
    stop = full[6:8]
    for stops in (stop, [stop, "never"]):
        cut = client.completions.create(**asked, stop=stops).choices[0]
        assert (cut.text, cut.finish_reason, cut.stop_reason) == (full[: full.index(stop)], "stop", stop)
    new = alone(served, tokenizer().encode(PROMPT), max_tokens=30, temperature=0, ignore_eos=True)[1]
    ended = client.completions.create(**{**asked, "extra_body": {"ignore_eos": True, "stop_token_ids": [new[4]]}})
    assert ended.choices[0].stop_reason == new[4] and ended.usage.completion_tokens == new.index(new[4]) + 1


def test_effort_is_depth(client: openai.OpenAI) -> None:
    loops = {}
    for effort in ("none", "minimal", "low", "medium", "high", "xhigh", None):
        given = {} if effort is None else {"reasoning_effort": effort}
        extra = {"exit": "fixed", "return_loops": True}
        done = client.chat.completions.create(model=MODEL, messages=TURNS, max_tokens=3, **given, extra_body=extra)
        loops[effort] = set(done.choices[0].loops)
    expected = {"none": 1, "minimal": 1, "low": 2, "medium": 4, "high": 8, "xhigh": 8, None: 4}
    assert loops == {effort: {n} for effort, n in expected.items()}, "as far as the server's most"
    extra = {"exit": "fixed", "return_loops": True, "n_loops": 7}
    done = client.chat.completions.create(
        model=MODEL, messages=TURNS, max_tokens=3, reasoning_effort="low", extra_body=extra
    )
    assert set(done.choices[0].loops) == {7}


def test_the_list_of_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.max_loops, card.default_loops, card.context_length) == (MODEL, 8, 4, 512)
    assert client.models.retrieve(MODEL) == card
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../other")


def test_faults_are_told_as_the_client_knows_them(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="a", temperature=-1)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="POST /completions is no route here; a base_url ends in /v1"):
        client.with_options(base_url=served.url).completions.create(model=MODEL, prompt="a")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.001).completions.create(model=MODEL, prompt="a", max_tokens=400)
    served.settle()


def test_a_stream_that_is_closed_is_over(served: Served, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="a", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert served.service.async_engine.submissions
    stream.close()
    until(lambda: not served.service.async_engine.submissions)
    served.settle()


def test_the_live_view(served: Served) -> None:
    with served.http() as http, served.client() as client:
        stream = client.completions.create(
            model=MODEL, prompt=["a", "b"], max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        busy = http.get("/v1/engine").json()
        assert busy["model"] == MODEL and busy["max_rows"] == 8 and busy["admitted"] == 2
        assert busy["looping"] == sum(rows for _, rows in busy["rows_by_loop"]) <= 2
        pages = busy["pages"]
        assert pages["used"] + pages["free"] + pages["reusable"] == pages["total"] and pages["used"]
        assert busy["tokens_per_s"] > 0 and busy["mean_loops"] >= 1
        assert (busy["max_loops"], busy["default_loops"], busy["invariant"]) == (8, 4, True)
        assert busy["rules"] == ["fixed", "act", "latent_diff", "second_difference", "kl"]
        stream.close()
        served.settle()
        idle = http.get("/v1/engine").json()
        assert (idle["admitted"], idle["waiting"], idle["looping"], idle["pages"]["used"]) == (0, 0, 0, 0)
        told = http.get("/metrics").text
        assert 'mythos_answers_total{finish_reason="length"}' in told and "mythos_loops_bucket" in told
        assert 'mythos_pages{state="used"} 0.0' in told and len(told.splitlines()) < 200
