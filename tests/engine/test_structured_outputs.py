"""Answers that match a schema, whatever the model would rather say."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from open_mythos import LLM, SamplingParams
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.engine.structured_outputs import MAX_SCHEMA_CHARS, Grammars
from open_mythos.tokenization.tokenizer import ByteTokenizer, SymbolTokenizer, Tokenizer
from tests.engine.mixes import COSTS
from tests.models import scaled, tiny
from tests.server.served import MODEL, Served, model, serving, tokenizer
from tests.server.test_logprobs import like_llama

pytest.importorskip("llguidance")
P, C, R = "/v1/completions", "/v1/chat/completions", "/v1/responses"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "who": {"enum": ["Anne", "\u65e5\u672c"]}},
    "required": ["n", "who"],
    "additionalProperties": False,
}


def holds(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"n", "who"} and 0 <= value["n"] <= 99 and value["who"] in ("Anne", "\u65e5\u672c")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running
        running.settle()


@pytest.mark.parametrize("words", [ByteTokenizer(), tokenizer(), like_llama()], ids=["bytes", "byte-level", "words"])
def test_every_answer_matches_in_any_vocabulary(words: Tokenizer) -> None:
    llm = LLM(scaled(tiny(vocab_size=words.vocab_size + 5, max_seq_len=128)), words)
    params = [SamplingParams(max_tokens=80, seed=seed, json_schema=SCHEMA, n_loops=1) for seed in range(4)]
    params += [SamplingParams(max_tokens=80, temperature=0, json_schema=json.dumps(SCHEMA), ignore_eos=True)]
    free = SamplingParams(max_tokens=80, seed=0, n_loops=1, ignore_eos=True)
    *matched, other = llm.generate(["a"] * 6, [*params, free], progress=False)
    for output in matched:
        (answer,) = output.outputs
        assert holds(answer.text) and answer.finish_reason == "stop" and answer.stop_reason is None, answer.text
    assert other.outputs[0].finish_reason == "length"
    (cut,) = llm.generate("a", SamplingParams(max_tokens=3, json_schema=SCHEMA), progress=False)[0].outputs
    assert cut.finish_reason == "length" and cut.text.startswith("{")


def test_an_answer_is_the_same_beside_others() -> None:
    """And its log-probabilities are those of the model, not of what the schema leaves."""
    params = [
        SamplingParams(max_tokens=60, seed=i, logprobs=1, json_schema=SCHEMA if i % 2 else None) for i in range(4)
    ]

    def run(some: list[SamplingParams]) -> list[Any]:
        engine = Engine(model(), tokenizer(), EngineConfig(max_rows=4, kv_tokens=400), COSTS)
        requests = [engine.add("a", each) for each in some]
        while engine.busy:
            engine.step()
        return [(request.token_ids, request.logprobs, request.text) for request in requests]

    together = run(params)
    assert [run([each])[0] for each in params] == together
    assert holds(together[1][2]) and min(together[1][1]) < -1, "the model would have said something else"


def test_the_server_takes_openais_forms(served: Served) -> None:
    named = {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA, "strict": True}}
    how = {"seed": 2, "n_loops": 1}
    bounded = {**how, "max_tokens": 90, "response_format": named}
    with served.http() as http:
        for path, body in ((P, {"prompt": "a"}), (C, {"messages": [{"role": "user", "content": "a"}]})):
            (choice,) = http.post(path, json={**body, **bounded}).json()["choices"]
            assert holds(choice["text"] if path == P else choice["message"]["content"])
            assert choice["finish_reason"] == "stop"
        flat = {"type": "json_schema", "name": "t", "schema": SCHEMA}
        done = http.post(R, json={"input": "a", **how, "text": {"format": flat}}).json()
        assert holds(done["output"][0]["content"][0]["text"]) and done["text"]["format"] == flat
        body = {"prompt": "a", **how, "max_tokens": 1, "response_format": {"type": "json_object"}}
        assert http.post(P, json=body).json()["choices"][0]["text"] == "{"
        plain = [{**body, "response_format": each} for each in ({"type": "text"}, None)]
        assert len({http.post(P, json=each).json()["choices"][0]["text"] for each in plain}) == 1


HOSTILE: dict[str, Any] = {
    "reference to itself": {"$ref": "#"},
    "another host": {"$ref": "http://127.0.0.1:1/schema"},
    "no type": {"type": "frob"},
    "not satisfiable": {"type": "string", "minLength": 5, "maxLength": 2},
    "expressions that multiply": {"allOf": [{"type": "string", "pattern": f".*{c}.{{30}}"} for c in "ab"]},
    "too long": {"enum": ["x" * 100 + str(i) for i in range(1000)]},
}
ENDLESS: list[dict[str, Any]] = [
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
    {"type": "array", "minItems": 10**9, "items": {"type": "string"}},
    {"type": "string", "minLength": 10**9},
]


@pytest.mark.parametrize("name", HOSTILE)
def test_schemas_that_cannot_be_used_are_refused_by_name(served: Served, name: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": HOSTILE[name]}}
    with served.http() as http:
        told = http.post(P, json={"prompt": "a", "response_format": form})
        assert told.status_code == 400 and told.json()["error"]["param"] == "response_format", told.text
        assert told.json()["error"]["message"].startswith("response_format ") and len(told.content) < 1024


def test_a_schema_is_only_so_deep(served: Served) -> None:
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"items": deep}
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": deep}}
    with served.http() as http:
        told = http.post(P, json={"prompt": "a", "response_format": form}).json()["error"]
    assert told["param"] == "response_format.json_schema.schema" and "64 levels" in told["message"]


@pytest.mark.parametrize("schema", ENDLESS, ids=str)
def test_schemas_without_end_begin_at_once(schema: dict[str, Any]) -> None:
    """Their expansion is never written out, and each token costs no more than another schema's."""
    matcher = Grammars(ByteTokenizer(), 259).matcher(json.dumps(schema))
    for _ in range(30):
        allowed = matcher.allowed().nonzero()[:, 0].tolist()
        assert allowed and matcher.take(allowed[len(allowed) // 2])


def test_what_is_no_schema_is_refused() -> None:
    with pytest.raises(TypeError, match="json_schema=5 must be JSON or a mapping"):
        SamplingParams(json_schema=5)  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match="json_schema cannot be written as JSON"):
        SamplingParams(json_schema={"const": {1, 2}})
    llm = LLM(scaled(tiny(vocab_size=259)), ByteTokenizer())
    for schema, told in (
        ("{", "is no object of JSON"),
        ("[]", "is no object of JSON"),
        (" " * (MAX_SCHEMA_CHARS + 1), "at most"),
    ):
        with pytest.raises(ValueError, match=f"json_schema .*{told}"):
            llm.generate("a", SamplingParams(json_schema=schema), progress=False)
    symbols = LLM(scaled(tiny(vocab_size=3)), SymbolTokenizer(["a", "b", "c"]))
    with pytest.raises(ValueError, match="nothing can match it"):
        symbols.generate("a", SamplingParams(json_schema=SCHEMA), progress=False)
    with pytest.raises(ValueError, match="json_schema is about text, which needs a tokenizer"):
        LLM(llm.model).generate([1], SamplingParams(json_schema="{}"), progress=False)


def test_without_the_library_it_says_what_to_install(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": {"type": "object", "maxProperties": 3}}}
    with served.http() as http:
        told = http.post(P, json={"prompt": "a", "response_format": form})
    assert told.status_code == 400
    assert told.json()["error"]["message"].startswith("response_format: the package llguidance is missing; run: pip")
    assert told.json()["error"]["param"] == "response_format" and served.service.config.name == MODEL
