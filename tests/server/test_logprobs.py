"""Log-probabilities over HTTP: of answers and of prompts, with the texts, bytes and places of their tokens."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers

from open_mythos import OpenMythos
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.tokenization.tokenizer import BPETokenizer, Tokenizer
from tests.models import scaled, tiny
from tests.server.served import MODEL, TEXT, Served, model, serving, tokenizer

P, C = "/v1/completions", "/v1/chat/completions"
TURNS = [{"role": "user", "content": "a cat"}]


def like_llama() -> BPETokenizer:
    """Words with their space, without it, and one token for each byte of the rest."""
    words = ["\u2581", "\u2581the", "\u2581cat", "\u2581a", "the", "cat", "a", "s", "\u2581s"]
    scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((word, -len(words) + i) for i, word in enumerate(words))]
    scores += [(f"<0x{byte:02X}>", -50.0) for byte in range(256)]
    backend = tokenizers.Tokenizer(models.Unigram(scores, 0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<s>", "</s>"])
    return BPETokenizer(backend, bos="<s>", eos="</s>", pad=None)


@pytest.fixture(scope="module")
def llama() -> Iterator[Served]:
    words = like_llama()
    network = scaled(tiny(vocab_size=words.vocab_size, max_seq_len=256))
    with serving(make=lambda: Engine(network, words, EngineConfig(max_rows=8, max_queue=24))) as running:
        yield running
        running.settle()


def ask(served: Served, path: str = P, **body: Any) -> list[dict[str, Any]]:
    with served.http() as http:
        answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def streamed(served: Served, **body: Any) -> list[dict[str, Any]]:
    """The choices of a stream, each joined from its pieces."""
    choices: dict[int, dict[str, Any]] = {}
    with served.http() as http, http.stream("POST", P, json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            for part in json.loads(line[6:])["choices"]:
                whole = choices.setdefault(part["index"], {"text": "", "logprobs": {}})
                whole["text"] += part["text"]
                for name, values in (part["logprobs"] or {}).items():
                    whole["logprobs"].setdefault(name, []).extend(values)
    return [choices[place] for place in sorted(choices)]


@torch.no_grad()
def scores(network: OpenMythos, ids: list[int], **depth: Any) -> torch.Tensor:
    """Log-probabilities behind each of the ids, (T, V), from one call on all of them."""
    return network(torch.tensor([ids]), **depth)[0].double().log_softmax(-1)


DEPTHS: list[dict[str, Any]] = [{}, {"n_loops": 2, "exit": "fixed"}, {"exit": "latent_diff", "exit_threshold": 0.3}]


@pytest.mark.parametrize("depth", DEPTHS, ids=str)
def test_an_echoed_prompt_is_scored_as_by_the_model(served: Served, depth: dict[str, Any]) -> None:
    texts = ["a", TEXT[:40], (TEXT * 3)[:300]]
    for max_tokens, n_best in ((0, 5), (1, 1), (4, 0)):
        how = {"max_tokens": max_tokens, "logprobs": n_best, "echo": True, "temperature": 0, **depth}
        for prompts in (texts, [tokenizer().encode(text) for text in texts]):
            choices = ask(served, prompt=prompts, **how)
            for text, choice in zip(texts, choices, strict=True):
                ids, told = tokenizer().encode(text), choice["logprobs"]
                expected = scores(model(), ids, **depth)
                assert choice["text"].startswith(text) and (max_tokens or choice["text"] == text)
                assert (choice["finish_reason"], len(told["tokens"])) == ("length", len(ids) + max_tokens)
                assert "".join(told["tokens"]) == choice["text"]
                assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
                for i in range(1, len(ids)):
                    assert told["token_logprobs"][i] == pytest.approx(expected[i - 1, ids[i]].item(), abs=1e-4)
                    best = expected[i - 1].topk(n_best).values.tolist()
                    assert list(told["top_logprobs"][i].values()) == pytest.approx(best, abs=1e-4), "none is merged"
                lengths = [len(token) for token in told["tokens"]]
                assert told["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]


def test_an_echo_without_scores_with_several_answers_and_in_a_stream(served: Served) -> None:
    how = {"prompt": [TEXT[:30], "b"], "max_tokens": 3, "seed": 4, "n": 2, "echo": True}
    plain = ask(served, **{**how, "echo": False})
    whole = ask(served, **how)
    starts = [TEXT[:30], TEXT[:30], "b", "b"]
    assert [c["text"] for c in whole] == [a + c["text"] for a, c in zip(starts, plain, strict=True)]
    assert whole[0]["logprobs"] is None and plain[0]["text"] != plain[1]["text"]
    for n_best in (None, 2):
        how = {**how, "logprobs": n_best}
        parts = streamed(served, **how)
        for one, other in zip(parts, ask(served, **how), strict=True):
            assert (one["text"], one["logprobs"]) == (other["text"], other["logprobs"] or {})
    (nothing,) = ask(served, prompt=TEXT[:30], max_tokens=0)
    assert (nothing["text"], nothing["finish_reason"]) == ("", "length")
    (only,) = streamed(served, prompt=TEXT[:30], max_tokens=0, echo=True, logprobs=1)
    assert only["text"] == TEXT[:30] and len(only["logprobs"]["tokens"]) == len(tokenizer().encode(TEXT[:30]))


def test_a_prompt_that_was_reused_is_scored_in_full(served: Served) -> None:
    how = {"prompt": (TEXT * 2)[:200], "max_tokens": 1, "temperature": 0}
    ask(served, **how)
    with served.http() as http:
        used = http.post(P, json=how).json()["usage"]
        assert used["prompt_tokens_details"]["cached_tokens"] > 0
        scored = http.post(P, json={**how, "echo": True, "logprobs": 1}).json()
    assert scored["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert None not in scored["choices"][0]["logprobs"]["token_logprobs"][1:]


def test_words_keep_the_space_before_them(llama: Served) -> None:
    ids = llama.engine.tokenizer.encode("the cat")  # ty: ignore[unresolved-attribute]
    for seed in range(4):
        (choice,) = ask(llama, prompt=ids, max_tokens=12, seed=seed, logprobs=5, ignore_eos=True)
        told = choice["logprobs"]
        assert "".join(told["tokens"]) == choice["text"] and all(len(best) == 5 for best in told["top_logprobs"])
        lengths = [len(token) for token in told["tokens"]]
        assert told["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]
        assert [choice["logprobs"]] == [part["logprobs"] for part in streamed(llama, prompt=ids, max_tokens=12, seed=seed, logprobs=5, ignore_eos=True)]  # fmt: skip  # noqa: E501
    (echo,) = ask(llama, prompt=" cats the cat", max_tokens=0, logprobs=5, echo=True)
    assert echo["logprobs"]["tokens"] == ["", " cat", "s", " the", " cat"] and echo["text"] == " cats the cat"
    words = {"\u2581cat": " cat", "cat": "cat", "\u2581the": " the", "\u2581": " "}
    for name, text in words.items():
        bias = {str(like_llama().backend.token_to_id(name)): 100}
        (choice,) = ask(llama, prompt=ids, max_tokens=3, temperature=0, logit_bias=bias, logprobs=0)
        assert choice["logprobs"]["tokens"] == [text] * 3 and choice["text"] == text * 3


def test_each_token_of_a_chat_has_its_own_text_and_bytes(llama: Served, served: Served) -> None:
    for running in (llama, served):
        how = {"messages": TURNS, "max_tokens": 16, "seed": 5, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
        (choice,) = ask(running, C, **how)
        content = choice["logprobs"]["content"]
        raw = b"".join(bytes(each["bytes"]) for each in content)
        assert len(content) == 16
        if running is served:  # the other vocabulary shows every byte of a run that is no character
            assert raw.decode(errors="replace") == choice["message"]["content"]
        for each in content:
            assert len(each["top_logprobs"]) == 20
            told = [(top["token"], bytes(top["bytes"])) for top in each["top_logprobs"] if top["bytes"]]
            assert len(set(told)) == len(told), "no two are told alike"
            assert all(raw.decode(errors="replace") == text for text, raw in told)


def test_a_half_character_has_its_bytes(served: Served) -> None:
    text = "\u20ac\U0001f30a\u65e5"
    ids = tokenizer().encode(text)
    assert len(ids) > 4, "some of these characters take several tokens"
    for n in range(1, len(ids)):
        bias = {str(ids[n]): 100}
        turn = {"max_tokens": 1, "temperature": 0, "logit_bias": bias, "logprobs": 0}
        (choice,) = ask(served, prompt=ids[:n], **turn)
        (chat,) = ask(served, C, messages=TURNS, **{**turn, "logprobs": True})
        raw = bytes(chat["logprobs"]["content"][0]["bytes"])
        assert raw in text.encode() and raw.decode(errors="replace") == chat["logprobs"]["content"][0]["token"]
        assert choice["logprobs"]["tokens"] == [choice["text"]]
    assert math.isfinite(choice["logprobs"]["token_logprobs"][0])


@pytest.mark.parametrize("seed", [1, 2])
def test_tokens_that_a_stop_string_holds_back_have_their_own_places(served: Served, seed: int) -> None:
    how = {"prompt": TEXT[:20], "max_tokens": 24, "seed": seed, "logprobs": 1, "ignore_eos": True}
    (free,) = ask(served, **how)
    # Begins to match again and again, and never does.
    stops = [character + "\u2603" for character in sorted(set(free["text"]))][:60]
    (held,) = ask(served, **how, stop=stops)
    assert held["logprobs"] == free["logprobs"] and held["text"] == free["text"]
    (parts,) = streamed(served, **how, stop=stops)
    assert parts["logprobs"] == free["logprobs"] and parts["text"] == free["text"]


def loglikelihood(network: OpenMythos, words: Tokenizer, context: str, continuation: str) -> tuple[float, bool, Any]:
    """The sum, whether each token is the likeliest, and (ids, those of the context) as lm-eval splits them."""
    n_spaces = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - n_spaces], context[len(context) - n_spaces :] + continuation
    ids, start = words.encode(context + continuation), len(words.encode(context))
    log_p = scores(network, ids)
    own = [log_p[i - 1, ids[i]].item() for i in range(start, len(ids))]
    best = all(log_p[i - 1].argmax().item() == ids[i] for i in range(start, len(ids)))
    return sum(own), best, (ids, start)


def test_lm_eval_scores_as_the_model_does(served: Served, shared: Path) -> None:
    """The requests of its `local-completions` for a multiple choice, and how it reads the answer."""
    rows = [json.loads(line) for line in (shared / "cases/lm-eval/data.jsonl").read_text().splitlines()]
    rows.append({"question": TEXT[:30], "choices": [TEXT[30:50], "qqq"]})
    asked = [(row["question"], choice) for row in rows for choice in row["choices"]]
    expected = [loglikelihood(model(), tokenizer(), *each) for each in asked]
    prompts = [ids for _, _, (ids, _) in expected]
    body = {"model": MODEL, "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    choices = sorted(ask(served, **body, echo=True), key=lambda choice: choice["index"])
    for choice, (total, greedy, (_, start)) in zip(choices, expected, strict=True):
        own = choice["logprobs"]["token_logprobs"][start:-1]
        best = choice["logprobs"]["top_logprobs"][start:-1]
        assert sum(own) == pytest.approx(total, abs=1e-4)
        assert all(value == max(top.values()) for value, top in zip(own, best, strict=True)) == greedy
    until = ["\n", ".", ";", "!", "?", "<eos>"]
    body = {"model": MODEL, "prompt": prompts[:2], "max_tokens": 8, "temperature": 0, "stop": until, "seed": 1234}
    for ids, choice in zip(prompts, ask(served, **body), strict=False):
        text = model().generate(ids, 8, temperature=0, stop=until, tokenizer=tokenizer())[len(ids) :]
        told = tokenizer().decode(text)
        cut = min([told.index(stop) for stop in until if stop in told], default=len(told))
        assert choice["text"] == told[:cut]
