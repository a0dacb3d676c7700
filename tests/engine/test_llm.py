"""LLM: answers to lists of prompts, against `generate` one at a time, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos import LLM, OpenMythos, SamplingParams
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.generation.generate import reply
from open_mythos.tokenization.chat_template import BadMessages
from open_mythos.tokenization.tokenizer import ByteTokenizer
from tests.models import scaled, tiny

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def model() -> OpenMythos:
    return scaled(tiny(vocab_size=259))


@pytest.fixture(scope="module")
def llm(model: OpenMythos) -> LLM:
    return LLM(model, ByteTokenizer())


def expected(model: OpenMythos, prompt: str, **options: Any) -> str:
    return model.generate(prompt, 6, tokenizer=ByteTokenizer(), **options)[len(prompt) :]


def test_answers_are_those_of_generate_in_the_order_of_the_prompts(llm: LLM, model: OpenMythos) -> None:
    prompts = ["a river", "so", "the long way home"]
    each = [SamplingParams(temperature=0, max_tokens=6, n_loops=n, exit="latent_diff") for n in (1, 3, 4)]
    outputs = llm.generate(prompts, each, progress=False)
    assert [output.prompt for output in outputs] == prompts
    for output, params in zip(outputs, each, strict=True):
        (answer,) = output.outputs
        new, loops = model.generate(
            output.prompt_token_ids, 6, params.n_loops, 0, exit="latent_diff", return_loops=True
        )
        assert (output.prompt_token_ids + answer.token_ids, answer.loops) == (new, loops)
        text = expected(model, output.prompt or "", temperature=0, n_loops=params.n_loops, exit="latent_diff")
        assert answer.text == text
        assert (answer.finish_reason, answer.stop_reason, answer.cumulative_logprob) == ("length", None, None)
    assert len({output.request_id for output in outputs + llm.generate("a", GREEDY, progress=False)}) == 4


def test_a_prompt_may_be_given_in_many_ways(llm: LLM) -> None:
    ids = list(b"so it")
    ways: list[Any] = [
        "so it",
        {"prompt": "so it"},
        ids,
        {"prompt_token_ids": ids},
        ["so it"],
        [ids],
        [{"prompt": "so it"}],
    ]
    answers = [llm.generate(way, GREEDY, progress=False) for way in ways]
    assert {output.outputs[0].text for way in answers for output in way} == {answers[0][0].outputs[0].text}
    assert [way[0].prompt for way in answers] == ["so it", "so it", None, None, "so it", None, "so it"]
    assert llm.generate([], GREEDY, progress=False) == []
    assert len(llm.generate("so it", progress=False)[0].outputs[0].token_ids) == 16


def test_several_answers_have_a_seed_each(llm: LLM, model: OpenMythos) -> None:
    (output,) = llm.generate("so", SamplingParams(n=3, seed=7, max_tokens=6), progress=False)
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    alone = [llm.generate("so", SamplingParams(seed=7 + i, max_tokens=6), progress=False)[0] for i in range(3)]
    assert [answer.token_ids for answer in output.outputs] == [one.outputs[0].token_ids for one in alone]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3


def test_stops_are_told(llm: LLM, model: OpenMythos) -> None:
    (free,) = llm.generate("a river", GREEDY, progress=False)
    token = free.outputs[0].token_ids[2]
    at = free.outputs[0].token_ids.index(token)
    stopped = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=[token])
    (answer,) = llm.generate("a river", stopped, progress=False)[0].outputs
    assert (answer.finish_reason, answer.stop_reason) == ("stop", token)
    assert answer.token_ids == free.outputs[0].token_ids[: at + 1]


def test_logprobs_are_those_of_the_model(llm: LLM, model: OpenMythos) -> None:
    (output,) = llm.generate("so", SamplingParams(temperature=0, max_tokens=3, logprobs=2, n_loops=2), progress=False)
    (answer,) = output.outputs
    assert answer.logprobs is not None and answer.cumulative_logprob is not None
    ids = torch.tensor([output.prompt_token_ids + answer.token_ids])
    with torch.no_grad():
        logits = model(ids[:, :-1], n_loops=2).log_softmax(-1)[0, -3:]
    for row, token, told in zip(logits, answer.token_ids, answer.logprobs, strict=True):
        best = row.topk(2).indices.tolist()
        assert set(told) == {token, *best}
        assert [told[i].logprob for i in best] == pytest.approx([float(row[i]) for i in best], abs=1e-4)
        assert told[token].decoded_token == ByteTokenizer().decode([token])
    own = [float(row[token]) for row, token in zip(logits, answer.token_ids, strict=True)]
    assert answer.cumulative_logprob == pytest.approx(sum(own), abs=1e-4)
    (only,) = llm.generate("so", SamplingParams(temperature=0, max_tokens=3, logprobs=0), progress=False)
    assert [len(one) for one in only.outputs[0].logprobs or []] == [1, 1, 1]


def test_chat_uses_the_template(llm: LLM, model: OpenMythos) -> None:
    turns = [{"role": "user", "content": "hi?"}]
    longer = [*turns, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "hey"}]
    told = [reply(model, ByteTokenizer(), messages, 6, temperature=0) for messages in (turns, longer)]
    assert [output.outputs[0].text for output in llm.chat([turns, longer], GREEDY, progress=False)] == told
    assert llm.chat(turns, GREEDY, progress=False)[0].outputs[0].text == told[0]
    with pytest.raises(BadMessages, match="role='robot'"):
        llm.chat([{"role": "robot", "content": "hi"}], progress=False)


def test_a_turn_without_an_end_token_ends_in_its_text(model: OpenMythos, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoEnd(ByteTokenizer):
        eos_id = None

    llm, heard = LLM(model, NoEnd()), []
    add = llm.engine.add

    def listen(prompt: Any, params: SamplingParams) -> Any:
        heard.append(params.stop_strings)
        return add(prompt, params)

    monkeypatch.setattr(llm.engine, "add", listen)
    llm.chat([{"role": "user", "content": "hi?"}], SamplingParams(max_tokens=2, stop=".", seed=0), progress=False)
    assert heard == [(".", "<|end|>")]


def test_a_folder_and_a_model_without_text(model: OpenMythos, llm: LLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    from_folder = LLM(tmp_path, device="cpu").generate("a river", GREEDY, progress=False)
    assert from_folder[0].outputs == llm.generate("a river", GREEDY, progress=False)[0].outputs
    ids = LLM(model).generate(list(b"a river"), GREEDY, progress=False)[0].outputs[0]
    assert ids.token_ids == from_folder[0].outputs[0].token_ids and ids.text == ""
    with pytest.raises(ValueError, match="messages need a tokenizer"):
        LLM(model).chat([{"role": "user", "content": "hi"}])


def test_progress_goes_to_stderr(llm: LLM, capsys: pytest.CaptureFixture) -> None:
    llm.generate(["a", "b"], GREEDY)
    out, err = capsys.readouterr()
    assert out == "" and "2/2" in err and "tokens/s" in err and "loops" in err


@pytest.mark.parametrize(
    ("prompts", "params", "error", "told"),
    [
        (3, None, TypeError, "prompts=3 must be a string"),
        ([3.5], None, TypeError, r"prompts\[0\]=3.5 must be a string or a list of ids"),
        (["a", {"text": "b"}], None, ValueError, r"prompts\[1\] has the keys text; give it 'prompt'"),
        (["a", ""], None, ValueError, "empty"),
        (["a", [300]], None, ValueError, "300"),
        (["a", "b"], [GREEDY], ValueError, "sampling_params has 1 for 2 prompts"),
        ("a", [3], TypeError, "sampling_params"),
        ("a", SamplingParams(max_tokens=64), ValueError, "max_tokens=64"),
    ],
)
def test_refusals_leave_nothing_behind(llm: LLM, prompts: Any, params: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        llm.generate(prompts, params, progress=False)
    assert not llm.engine.sequences


def test_a_loaded_model_has_its_device(model: OpenMythos) -> None:
    with pytest.raises(ValueError, match=r"use model.to\(...\) on a model"):
        LLM(model, device="cpu")
    with pytest.raises(FileNotFoundError, match="folder nowhere does not exist"):
        LLM("nowhere")


def test_nan_is_an_error_with_a_remedy(model: OpenMythos) -> None:
    broken = scaled(tiny(vocab_size=259))
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    llm = LLM(broken, ByteTokenizer())
    with pytest.raises(FloatingPointError, match="use earlier weights, or float32"):
        llm.generate(["a", "b"], GREEDY, progress=False)
    assert not llm.engine.sequences


def test_an_interrupt_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, n_steps = llm.engine.step, 0

    def interrupted() -> Any:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=40), progress=False)
    assert not llm.engine.sequences


def test_a_machine_without_invariant_products_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "invariant", property(lambda engine: False))
    config = EngineConfig(max_rows=2, kv_tokens=100)
    with pytest.warns(UserWarning, match=r"cpu, torch.float32.*depend in its last bits.*on what else runs"):
        LLM(scaled(tiny()), config=config)
    LLM(scaled(tiny()), config=EngineConfig(max_rows=2, kv_tokens=100, batch_invariant=False))
