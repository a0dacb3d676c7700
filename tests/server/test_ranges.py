"""What OpenAI's clients may send, and what becomes of it: ranges, histories, and what is left out with a warning."""

from typing import Any, get_args

import openai
import pytest

from open_mythos import SamplingParams
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.engine.sequence import Sequence
from open_mythos.server.fields import EFFORTS, Effort
from open_mythos.tokenization.chat_template import render
from tests.server.served import MODEL, Served, model, tokenizer

P, C = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


def alone(prompt: str, *params: SamplingParams) -> list[Sequence]:
    """Answers of an engine without a server."""
    engine = Engine(model(), tokenizer(), EngineConfig(max_rows=8))
    requests = [engine.add(prompt, each) for each in params]
    while engine.busy:
        engine.step()
    return requests


def test_the_best_of_more_answers_are_returned(client: openai.OpenAI) -> None:
    params = [SamplingParams(max_tokens=6, seed=3 + i, n_loops=4, logprobs=0, ignore_eos=True) for i in range(5)]
    made = sorted(alone("Hi", *params), key=lambda request: -sum(request.logprobs) / 6)
    extra = {"best_of": 5, "ignore_eos": True}
    done = client.completions.create(model=MODEL, prompt="Hi", max_tokens=6, seed=3, n=2, extra_body=extra)
    assert [choice.text for choice in done.choices] == [request.text for request in made[:2]]
    assert [choice.index for choice in done.choices] == [0, 1] and done.choices[0].logprobs is None
    assert done.usage.completion_tokens == 30, "those that were not chosen cost as much"
    same = client.completions.create(model=MODEL, prompt="Hi", max_tokens=2, seed=3, n=2, best_of=2, stream=True)
    assert {chunk.choices[0].index for chunk in same} == {0, 1}


def test_penalties_and_biases_reach_the_sampler(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"frequency_penalty": 1.5, "presence_penalty": -0.5, "logit_bias": {"90": 4, "91": 4.5}}
    params = SamplingParams(max_tokens=12, temperature=0, n_loops=4, logit_bias={90: 4, 91: 4.5}, **{
        name: how[name] for name in ("frequency_penalty", "presence_penalty")
    })  # fmt: skip
    (expected,) = alone("Hi", params)
    got = client.completions.create(model=MODEL, prompt="Hi", max_tokens=12, temperature=0, **how)
    plain = client.completions.create(model=MODEL, prompt="Hi", max_tokens=12, temperature=0)
    assert got.choices[0].text == expected.text != plain.choices[0].text
    banned = client.completions.create(
        model=MODEL, prompt="Hi", max_tokens=20, logit_bias={str(i): -100 for i in range(300)}, extra_body={"top_k": 5}
    )
    assert banned.usage.completion_tokens


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_a_seed_is_any_int64(client: openai.OpenAI, seed: int) -> None:
    asked = {"model": MODEL, "prompt": "Hi", "max_tokens": 8, "seed": seed, "n": 2}
    texts = [[choice.text for choice in client.completions.create(**asked).choices] for _ in range(2)]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


def test_many_stops_many_prompts_and_no_nucleus(client: openai.OpenAI) -> None:
    greedy = client.completions.create(model=MODEL, prompt="Hi", max_tokens=8, temperature=0)
    nucleus = client.completions.create(model=MODEL, prompt="Hi", max_tokens=8, top_p=0)
    assert nucleus.choices[0].text == greedy.choices[0].text
    text = greedy.choices[0].text
    stops = [*(f"{i} never" for i in range(40)), text[3:5]]
    cut = client.completions.create(model=MODEL, prompt="Hi", max_tokens=8, temperature=0, stop=stops)
    assert cut.choices[0].text == text[: text.index(text[3:5])] and cut.choices[0].finish_reason == "stop"
    many = client.completions.create(model=MODEL, prompt=[str(i) for i in range(20)], max_tokens=2, temperature=0)
    assert [choice.index for choice in many.choices] == list(range(20))
    assert many.choices[7].text == client.completions.create(
        model=MODEL, prompt="7", max_tokens=2, temperature=0
    ).choices[0].text  # fmt: skip
    assert (
        client.completions.create(model=MODEL, prompt="Hi", extra_body={"logprobs": False}).choices[0].logprobs is None
    )


def test_the_default_number_of_tokens_is_cut_to_what_fits(client: openai.OpenAI) -> None:
    """And one that was given is refused where it does not."""
    prompts = [[40] * 505, [40]]
    extra = {"ignore_eos": True, "n_loops": 1}
    done = client.completions.create(model=MODEL, prompt=prompts, extra_body={**extra, "logprobs": 0})
    assert [len(choice.logprobs.tokens) for choice in done.choices] == [7, 16]
    with pytest.raises(openai.BadRequestError, match="use max_tokens=7 or less"):
        client.completions.create(model=MODEL, prompt=prompts, max_tokens=8, extra_body=extra)
    with pytest.raises(openai.BadRequestError, match="use max_completion_tokens=487 or less"):
        client.chat.completions.create(model=MODEL, messages=[USER], max_completion_tokens=512)
    with pytest.raises(openai.BadRequestError, match=r"n_loops=100 must be at most 8; use n_loops=8"):
        client.completions.create(model=MODEL, prompt="a", extra_body={"n_loops": 100})


def test_every_effort_has_its_loops() -> None:
    assert get_args(Effort) == tuple(EFFORTS) and list(EFFORTS.values()) == sorted(EFFORTS.values())


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
HISTORIES: list[tuple[list[dict[str, Any]], list[dict[str, Any]], str | None]] = [
    ([{"role": "assistant", "content": "", "annotations": [], "tool_calls": [], "refusal": None}],
     [{"role": "assistant", "content": ""}], None),
    ([{"role": "assistant", "content": "ok", "reasoning_content": "", "audio": None, "function_call": None}],
     [{"role": "assistant", "content": "ok"}], None),
    ([{"role": "assistant", "content": None}], [{"role": "assistant", "content": ""}], None),
    ([{"role": "assistant", "content": "ok", "reasoning_content": "hm", "annotations": [{"type": "url_citation"}]}],
     [{"role": "assistant", "content": "ok"}], "messages[1].annotations, messages[1].reasoning_content"),
    ([{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}],
     [], "messages[1], messages[2]"),
    ([{"role": "assistant", "content": "I add.", "tool_calls": [CALL]}],
     [{"role": "assistant", "content": "I add."}], "messages[1].tool_calls"),
    ([{"role": "tool", "tool_call_id": str(i), "content": "3"} for i in range(40)],
     [], ", ".join(f"messages[{i}]" for i in range(1, 9)) + " and 32 more"),
]  # fmt: skip


@pytest.mark.parametrize(("history", "seen", "warned"), HISTORIES)
def test_a_history_says_what_of_it_the_model_does_not_see(
    served: Served, history: list[dict[str, Any]], seen: list[dict[str, Any]], warned: str | None
) -> None:
    with served.http() as http:
        for stream in (False, True):
            body = {"messages": [USER, *history, USER], "max_tokens": 2, "stream": stream}
            answer = http.post(C, json={**body, "stream_options": {"include_usage": True}})
            assert answer.status_code == 200, answer.text
            told = None if warned is None else f"not shown to the model: {warned}"
            assert answer.headers.get("x-mythos-warning") == told
            n = len(render([USER, *seen, USER], tokenizer(), reply=True)[0])
            assert f'"prompt_tokens": {n},' in answer.text.replace('":', '": ').replace("  ", " ")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (P, {"prompt": 5}, "prompt=5: must be a string, a list of strings, a list of ids, or a list of such lists"),
    (P, {"prompt": ""}, "the prompt is empty"),
    (P, {"prompt": "a", "logit_bias": {"320": 1}}, "logit_bias=320 must be between 0 and 319; use ids of the vocab"),
    (P, {"prompt": "a", "best_of": 1, "n": 2}, "best_of=1 must be at least n=2"),
    (P, {"prompt": "a", "metadata": {"run": 7}}, "metadata.run=7: "),
    (C, {"messages": [{**USER, "nmae": "x"}]}, "messages[0].nmae is no field of this request"),
    (C, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
     'messages[0].content: part 1 is no text; send parts like {"type": "text", "text": "..."}'),
    (C, {"messages": [USER], "stream_options": {"include_usgae": True}}, "stream_options.include_usgae is no field"),
    (C, {"messages": [USER], "tools": [{"type": "function"}]}, "tools is not supported here; leave it out"),
    (C, {"messages": [USER], "verbosity": "low"}, "verbosity is not supported here; leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "told"), REFUSED)
def test_a_refusal_names_the_field_as_it_was_written(
    served: Served, path: str, body: dict[str, Any], told: str
) -> None:
    with served.http() as http:
        answer = http.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(told), answer.text


def test_values_that_ask_for_nothing_are_taken(served: Served) -> None:
    neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "verbosity": "medium"}
    neutral |= {"metadata": {"run": "7"}, "store": True, "user": "u", "service_tier": "auto", "audio": None}
    neutral |= {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "function_call": "none"}
    with served.http() as http:
        answer = http.post(C, json={"messages": [USER], "max_tokens": 1, **neutral})
        assert answer.status_code == 200, answer.text
