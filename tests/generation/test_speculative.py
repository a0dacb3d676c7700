"""Self-speculative decoding against plain decoding: the same greedy text, the same distribution of samples."""

from typing import Any

import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.generation import speculative
from open_mythos.generation.sampling import probabilities
from open_mythos.generation.sampling_params import Sampling
from open_mythos.tokenization.tokenizer import ByteTokenizer
from tests.models import random_ids, scaled, tiny

FORMS = [{"attn_type": a, **experts} for a in ("gqa", "mla") for experts in ({}, {"n_experts": 0})]


def fixed(**options: Any) -> OpenMythos:
    return scaled(tiny(**{"halting": "none", **options}), dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("draft_loops", "k"), [(1, 1), (1, 4), (3, 2), (4, 7)])
def test_greedy_text_is_that_of_plain_decoding(form: dict[str, Any], draft_loops: int, k: int) -> None:
    model = fixed(**form)
    ids = random_ids(model.cfg, 1, 5)
    options: dict[str, Any] = {"max_new_tokens": 19, "n_loops": 5, "temperature": 0, "return_loops": True}
    want, loops = model.generate(ids, **options)
    out, used = model.generate(ids, draft_loops=draft_loops, num_speculative_tokens=k, **options)
    assert out.tolist() == want.tolist()
    assert used.tolist() == loops.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.6},
        {"logit_bias": {3: 4.0}},
        {"exit": "fixed"},
    ],
)
def test_penalties_bias_and_exit(options: dict[str, Any]) -> None:
    """Penalties count the drafts before each position; a model with ACT needs exit="fixed"."""
    model = fixed(halting="act" if "exit" in options else "none", coda_layers=2)
    # The prompt holds what the model would say, which frequency and presence penalties must not count.
    ids = model.generate(random_ids(model.cfg, 1, 5), 15, temperature=0, exit="fixed")
    options |= {"max_new_tokens": 15, "temperature": 0}
    assert model.generate(ids, draft_loops=1, **options).tolist() == model.generate(ids, **options).tolist()


def test_padding_and_a_plain_prompt_alike() -> None:
    model = fixed(initial_state="normal", state_std=2.0)
    ids = random_ids(model.cfg, 1, 6)
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0, "repetition_penalty": 2.0}
    want = model.generate(ids, **options)
    options["draft_loops"] = 2
    # Padding with the tokens that follow: the penalty must not count them.
    padded, mask = torch.cat((want[:, 6:9], ids), dim=1), torch.ones(1, 9, dtype=torch.int64)
    mask[:, :3] = 0
    assert model.generate(padded, attention_mask=mask, **options)[:, 3:].tolist() == want.tolist()


def test_a_round_gives_one_token_more_than_it_accepts() -> None:
    model = fixed(n_experts=0, lora_rank=0)
    rounds: list[int] = []
    run = speculative.Speculation._round

    def counted(*args: Any) -> list[int]:
        tokens = run(*args)
        rounds.append(len(tokens))
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculative.Speculation, "_round", counted)
        patch.setattr(speculative.Speculation, "_accepts", lambda *_: True)
        model.generate(random_ids(model.cfg, 1, 4), 14, draft_loops=1, num_speculative_tokens=3, seed=0)
    assert rounds == [4, 4, 4, 1]


def test_stops_and_callback() -> None:
    model, tokenizer = fixed(vocab_size=259), ByteTokenizer()
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0, "tokenizer": tokenizer}
    text = model.generate("ab", **options)
    ids = model.generate([97, 98], **options)

    def text_and_calls(**more: Any) -> tuple[str, list[tuple[int, ...]]]:
        calls: list[tuple[int, ...]] = []
        return model.generate("ab", on_token=lambda *call: calls.append(call), **more, **options), calls

    for stop in (text[9:11], ids[8], ids[2]):
        want = text_and_calls(stop=stop)
        assert len(want[1]) < 40
        assert text_and_calls(stop=stop, draft_loops=2, num_speculative_tokens=5) == want


def test_fills_the_context() -> None:
    model = fixed()
    ids = random_ids(model.cfg, 1, 5)
    n = model.cfg.max_seq_len - 5
    want = model.generate(ids, n, temperature=0)
    assert model.generate(ids, n, temperature=0, draft_loops=1).tolist() == want.tolist()
    assert model.generate(ids, 1, temperature=0, draft_loops=1).tolist() == want[:, :6].tolist()


def test_a_seed_gives_the_same_text() -> None:
    model = fixed()
    ids = random_ids(model.cfg, 1, 5)
    texts = [model.generate(ids, 20, seed=s, draft_loops=1).tolist() for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


OPTIONS: dict[str, Any] = {"temperature": 0.9, "top_k": 4, "top_p": 0.97}


def chi_square(n: int) -> float:
    """Statistic, per degree of freedom, of three new tokens in `n` texts against their exact probabilities."""
    cfg = tiny(halting="none", vocab_size=5, n_experts=0, prelude_layers=0, coda_layers=0, max_loop_iters=2)
    model, params, V = scaled(cfg), Sampling(**OPTIONS), cfg.vocab_size
    ids, counts = random_ids(cfg, 1, 4), torch.zeros(V, V, V)
    options = {"draft_loops": 1, "num_speculative_tokens": 1, "generator": torch.Generator().manual_seed(0), **OPTIONS}
    for _ in range(n):
        counts[tuple(model.generate(ids, 3, **options)[0, 4:].tolist())] += 1
    with torch.no_grad():
        one, two = torch.arange(V)[:, None], torch.cartesian_prod(torch.arange(V), torch.arange(V))
        texts = [ids, torch.cat((ids.expand(V, -1), one), 1), torch.cat((ids.expand(V * V, -1), two), 1)]
        first, second, third = (probabilities(model(x)[:, -1], params) for x in texts)
    expected = n * first.reshape(V, 1, 1) * second.reshape(V, V, 1) * third.reshape(V, V, V)
    assert not counts[expected == 0].any()
    often = expected >= 5  # which the statistic's distribution needs
    return float(((counts - expected) ** 2 / expected)[often].mean())


def test_samples_have_the_distribution_of_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """About 1; and far from it once a refused draft is replaced by a sample of p."""
    assert chi_square(800) < 1.6
    monkeypatch.setattr(speculative, "_residual", lambda p, q: p)
    assert chi_square(800) > 2.5


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"draft_loops": 4}, "draft_loops=4 must be below n_loops=4"),
        ({}, {"draft_loops": 0}, "draft_loops=0 must be at least 1"),
        ({}, {"num_speculative_tokens": 0}, "num_speculative_tokens=0 must be at least 1"),
        ({}, {"compiled": True}, "leave compiled out"),
        ({}, {"exit": "kl"}, "tokens leave by KL; pass exit='fixed'"),
        ({"halting": "act"}, {}, "tokens leave by ACT; pass exit='fixed'"),
        ({"recurrent_layers": 0}, {}, "recurrent_layers=0; leave draft_loops out"),
        ({}, {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, "but 2 are given; call it for each prompt"),
    ],
)
def test_refusals(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    model = fixed(**changes)
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": [1, 2, 3], "max_new_tokens": 9, "draft_loops": 1, **options})


def test_nan_is_an_error() -> None:
    model = fixed()
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the logits are NaN"):
        model.generate([1, 2], 4, draft_loops=1)
