"""/v1/responses as OpenAI's own client sees it."""

from typing import Any

import openai
import pytest
import torch

from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.tokenization.chat_template import render
from tests.models import scaled, tiny
from tests.server.served import MODEL, Served, model, serving, tokenizer

R = "/v1/responses"
TEXT = "\u65e5\u672c\u8a9e?"


def test_an_answer_is_that_of_a_chat(client: openai.OpenAI) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
    how: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
    extra = {"seed": 3, "ignore_eos": True, "n_loops": 3}
    chat = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=12, **how, extra_body=extra)
    parts = [{"type": "input_text", "text": TEXT[:2]}, {"type": "input_text", "text": TEXT[2:]}]
    inputs: list[Any] = [
        TEXT,
        [{"role": "user", "content": TEXT}],
        [{"type": "message", "role": "user", "content": parts}],
    ]
    for given in inputs:
        done = client.responses.create(
            model=MODEL, input=given, instructions="Be brief.", max_output_tokens=12, **how, extra_body=extra
        )
        assert done.output_text == chat.choices[0].message.content and done.output[0].role == "assistant"
        assert (done.status, done.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        used, expected = done.usage, chat.usage
        assert (used.input_tokens, used.output_tokens) == (expected.prompt_tokens, expected.completion_tokens)
        assert used.loops == expected.loops and used.total_tokens == expected.total_tokens
    stop = chat.choices[0].message.content[3:5]
    ended = client.responses.create(
        model=MODEL, input=TEXT, instructions="Be brief.", **how, extra_body={**extra, "stop": stop}
    )
    assert ended.status == "completed" and ended.incomplete_details is None and stop not in ended.output_text


def test_a_stream_has_the_events_of_the_official_client(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": MODEL, "input": TEXT, "max_output_tokens": 10, "temperature": 0}
    whole = client.responses.create(**how)
    events = list(client.responses.create(**how, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]  # fmt: skip
    ends = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert kinds[-4:] == [*ends, "response.incomplete"] and set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == events[-4].text == whole.output_text
    assert (
        events[-1].response.usage.output_tokens == whole.usage.output_tokens
        and events[0].response.id == events[-1].response.id
    )
    assert {event.item_id for event in events[3:-2]} == {events[-2].item.id} == {events[-1].response.output[0].id}
    stops = {"extra_body": {"stop": [whole.output_text[4]]}}
    with client.responses.stream(model=MODEL, input=TEXT, temperature=0, **stops) as stream:
        seen = [event.type for event in stream]
        final = stream.get_final_response()
    assert seen[-1] == "response.completed" and final.status == "completed"
    assert final.output_text == whole.output_text[: whole.output_text.index(whole.output_text[4])]


def test_an_answer_can_be_handed_back(served: Served, client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input=TEXT, max_output_tokens=4, temperature=0, top_p=0)
    again: list[Any] = [
        {"role": "user", "content": TEXT},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "3"},
        {"role": "developer", "content": "so?"},
    ]
    answer = client.responses.with_raw_response.create(model=MODEL, input=again, max_output_tokens=2)
    assert answer.headers["x-mythos-warning"] == "not shown to the model: input[2], input[3], input[4]"
    turns = [again[0], {"role": "assistant", "content": first.output_text}, {"role": "system", "content": "so?"}]
    assert answer.parse().usage.input_tokens == len(render(turns, tokenizer(), reply=True)[0])


def test_effort_is_depth(client: openai.OpenAI) -> None:
    for effort, loops in (("none", 1), ("low", 2), ("medium", 4), ("xhigh", 8)):
        done = client.responses.create(
            model=MODEL, input="a", max_output_tokens=3, reasoning={"effort": effort},  # ty: ignore[invalid-argument-type]
            extra_body={"exit": "fixed", "ignore_eos": True},
        )  # fmt: skip
        assert done.usage.loops["mean"] == loops and done.reasoning.effort == effort


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": "a", "nmae": "x"}]}, "input[0].nmae"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"type": "reasoning"}, {"role": "user", "content": "<|user|>"}]}, "input"),
    ({"input": "a" * 900}, "input"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 512, "n_loops": 1}, "max_output_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"n": 1}, "n"),
    ({"reasoning": {"effort": "most"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ({"reasoning": {"efort": "low"}}, "reasoning.efort"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"background": True}, "background"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"truncation": "auto"}, "truncation"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"model": "other"}, "model"),
]


@pytest.mark.parametrize(("changes", "param"), REFUSED, ids=str)
def test_what_is_not_built_is_refused_by_name(served: Served, changes: dict[str, Any], param: str) -> None:
    with served.http() as http:
        for stream in (False, True):
            answer = http.post(R, json={"input": "a", "stream": stream, **changes})
            told = answer.json()["error"]
            assert answer.status_code in (400, 404) and told["param"] == param, told
            assert told["message"] and len(answer.content) < 1024


def test_a_marker_is_named_where_it_was_written(served: Served) -> None:
    bad = {"role": "user", "content": "<|user|>"}
    tool = {"role": "tool", "content": "3"}
    with served.http() as http:
        for instructions in ("", "Be brief."):
            body = {"input": [{"type": "reasoning"}, bad], "instructions": instructions}
            assert http.post(R, json=body).json()["error"]["message"].startswith("input[1] has ")
        message = http.post("/v1/chat/completions", json={"messages": [tool, bad]}).json()["error"]["message"]
        assert message.startswith("messages[1] has ")
        message = http.post(R, json={"input": "a", "instructions": "<|user|>"}).json()["error"]["message"]
        assert message.startswith("instructions has ")


def test_an_answer_that_breaks_off_is_told_so() -> None:
    broken = scaled(tiny(vocab_size=model().cfg.vocab_size))
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with serving(make=lambda: Engine(broken, tokenizer(), EngineConfig(max_rows=8))) as served:
        with served.http() as http:
            assert http.post(R, json={"input": "a"}).status_code == 500
            told = http.post(R, json={"input": "a", "stream": True}).text
        assert "event: response.failed" in told and '"status": "failed"' in told and "server_error" in told
        served.settle()
