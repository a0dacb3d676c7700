"""Sampling against a reference in plain Python that works on one row."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.generation.sampling import Sampling, generator_of, sample

SETTINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=3.0, top_k=3),
    Sampling(top_p=0.6),
    Sampling(min_p=0.2),
    Sampling(repetition_penalty=1.7),
    Sampling(temperature=0.8, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=0.5),
    Sampling(frequency_penalty=0.7),
    Sampling(presence_penalty=-1.1),
    Sampling(logit_bias={2: -100, 5: 2.5}),
    Sampling(0.7, 9, 0.95, 0.01, 1.3, frequency_penalty=-0.4, presence_penalty=1.5, logit_bias={3: 1, 12: -2}),
]
ANSWER = [7, 0, 7, 5, 7]
"""Tokens generated so far; the penalties of frequency and presence depend on nothing else."""


def reference(logits: list[float], params: Sampling, previous: list[int], answer: list[int]) -> list[float]:
    """The probabilities of the next token of one row, step by step."""
    scores = list(logits)
    for i in {i for i in previous if i >= 0}:
        scores[i] = scores[i] / params.repetition_penalty if scores[i] > 0 else scores[i] * params.repetition_penalty
    for i in range(len(scores)):
        n = answer.count(i)
        scores[i] -= params.frequency_penalty * n + params.presence_penalty * (n > 0)
        scores[i] += dict(params.biases).get(i, 0)
    if params.temperature == 0:
        return [float(i == scores.index(max(scores))) for i in range(len(scores))]
    weights = [math.exp((s - max(scores)) / params.temperature) for s in scores]
    ranked = sorted(range(len(weights)), key=lambda i: -weights[i])[: params.top_k or len(weights)]
    total, before, kept = sum(weights[i] for i in ranked), 0.0, []
    for i in ranked:
        if before < params.top_p:
            kept.append(i)
        before += weights[i] / total
    kept = [i for i in kept if weights[i] >= params.min_p * max(weights)]
    return [weights[i] / sum(weights[j] for j in kept) if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("params", SETTINGS, ids=lambda p: " ".join(str(v) if v else "-" for v in vars(p).values()))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_draws_follow_the_reference(params: Sampling, dtype: torch.dtype) -> None:
    draws = 40_000
    logits = (torch.randn(13, dtype=torch.float64) * 2).to(dtype)
    previous = [3, 3, 7, 0, -1]
    expected = torch.tensor(reference(logits.tolist(), params, previous, ANSWER), dtype=torch.float64)
    seen, answer = (torch.tensor([*ids, -1]).expand(draws, -1) for ids in (previous, ANSWER))
    tokens = sample(logits.expand(draws, -1), params, previous_ids=seen, answer_ids=answer)
    share = torch.bincount(tokens, minlength=13) / draws
    assert tokens.dtype == torch.int64
    assert (share[expected == 0] == 0).all()
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from([1, 2, 7, 63]),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    params=st.builds(
        Sampling,
        temperature=st.sampled_from([0, 1e-320, 1e-4, 1, 1e30]),
        top_k=st.none() | st.integers(0, 70),
        top_p=st.sampled_from([0, 1e-300, 0.3, 0.999999, 1]),
        min_p=st.sampled_from([0, 1e-300, 0.5, 1]),
        repetition_penalty=st.sampled_from([1e-4, 0.7, 1, 1e4]),
    ),
)
def test_every_row_gets_a_token_that_the_reference_allows(seed, vocab_size, scale, params) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, vocab_size, generator=generator) * scale
    if vocab_size > 2:
        logits[:, 1] = -torch.inf
    previous = torch.randint(-1, vocab_size, (5, 4), generator=generator)
    tokens = sample(logits, params, generator, previous)
    assert ((tokens >= 0) & (tokens < vocab_size)).all()
    penalty = params.repetition_penalty
    seen = (previous[:, :, None] == torch.arange(vocab_size)).any(1)
    scores = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    chosen = scores.gather(1, tokens[:, None])
    assert torch.isfinite(chosen).all()
    better = (scores > chosen).sum(1)
    if params.top_k:
        assert (better < params.top_k).all()
    if params.temperature in (0, 1e-320) or params.top_p <= 1e-300 or params.min_p == 1:
        # Two scores closer than float32 resolves at this temperature are one.
        assert ((scores.amax(1) - chosen[:, 0]) <= 1e-6 * params.temperature).all()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(6, 40) * 2
    penalties = {"frequency_penalty": 0.3, "presence_penalty": -0.7, "logit_bias": {3: 0.1, 7: -0.3}}
    params = Sampling(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2, **penalties)
    previous = torch.randint(-1, 40, (6, 9))

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in range(6)]

    together = sample(logits, params, generators(), previous, previous)
    alone = [
        sample(logits[i : i + 1], params, [g], previous[i : i + 1], previous[i : i + 1])
        for i, g in enumerate(generators())
    ]
    assert together.tolist() == torch.cat(alone).tolist()
    assert len(set(together.tolist())) > 1


def test_a_seed_repeats_and_greedy_draws_nothing() -> None:
    logits = torch.randn(64, 100)
    drawn = [sample(logits, Sampling(), torch.Generator().manual_seed(s)).tolist() for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    assert sample(logits, Sampling(temperature=0), generator).tolist() == logits.argmax(-1).tolist()
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24], ids=["lowest", "highest"])
def test_the_ends_of_the_uniform_range_choose_a_kept_token(monkeypatch, uniform: float) -> None:
    monkeypatch.setattr(torch, "rand", lambda n, dtype, **_: torch.full((n,), uniform, dtype=dtype))
    logits = torch.randn(2000, 50)
    logits[:, [0, -1]] = -torch.inf
    tokens = sample(logits, Sampling(min_p=0.3))
    probabilities = logits.softmax(-1)
    assert (probabilities.gather(1, tokens[:, None]) >= 0.299 * probabilities.amax(1, keepdim=True)).all()


def test_large_vocabulary_draws_the_right_tail_token(monkeypatch) -> None:
    """200,000 equal tokens share half the mass; at 0.75 lies the middle one."""
    monkeypatch.setattr(torch, "rand", lambda n, dtype, **_: torch.full((n,), 0.75, dtype=dtype))
    logits = torch.zeros(1, 200_001)
    logits[0, 0] = math.log(200_000)
    assert abs(sample(logits, Sampling()).item() - 100_000) <= 1


def test_penalties_are_those_of_openais_documentation() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, before the bias; greedy decoding follows them."""
    logits = torch.tensor([[1.0, 0.9, 0.0, 0.5]])
    answer = torch.tensor([[0, 0, 1, -1]])
    for options, token in (
        ({}, 0),
        ({"frequency_penalty": 0.15}, 1),  # 0.7 and 0.75
        ({"frequency_penalty": 0.5}, 3),  # 0 and 0.4
        ({"presence_penalty": 0.45}, 0),  # 0.55 and 0.45
        ({"presence_penalty": 0.6}, 3),
        ({"logit_bias": {2: 1.1}}, 2),
        ({"logit_bias": {0: -100, 1: -100}}, 3),
        ({"presence_penalty": 0.6, "logit_bias": {0: 0.7}}, 0),
    ):
        assert sample(logits, Sampling(temperature=0, **options), answer_ids=answer).item() == token, options
    assert sample(logits, Sampling(temperature=0, presence_penalty=2)).item() == 0, "no answer yet"


def test_a_nucleus_of_nothing_is_the_best_token() -> None:
    logits = torch.randn(200, 50)
    assert sample(logits, Sampling(top_p=0, temperature=5.0)).tolist() == logits.argmax(-1).tolist()
    assert sample(torch.zeros(40, 9), Sampling(top_p=0)).unique().numel() == 1, "one of equals, always the same"


def test_biases_stay_what_was_checked() -> None:
    given = {3: 1.5, 1: -2}
    params = Sampling(logit_bias=given)
    given[3] = 1000
    assert params.biases == ((1, -2), (3, 1.5)) and hash(params) == hash(Sampling(logit_bias=((3, 1.5), (1, -2))))
    assert dataclasses.replace(params, temperature=0).biases == params.biases


def test_every_int64_is_a_seed_of_its_own() -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**33, -1, -2, -(2**63), 2**63 - 1]
    drawn = [torch.rand(2, generator=generator_of(seed)).tolist() for seed in seeds * 2]
    assert drawn[: len(seeds)] == drawn[len(seeds) :] and len({tuple(each) for each in drawn}) == len(seeds)
    assert drawn[1] == torch.rand(2, generator=torch.Generator().manual_seed(1)).tolist(), "as it was for small ones"


def test_generators_must_fit_the_rows() -> None:
    with pytest.raises(ValueError, match="2 generators do not fit logits of 3 rows; pass one, or one per row"):
        sample(torch.zeros(3, 4), Sampling(), [torch.Generator(), torch.Generator()])


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("temperature", -1, ValueError),
        ("temperature", math.nan, ValueError),
        ("temperature", math.inf, ValueError),
        ("temperature", True, TypeError),
        ("temperature", "0.7", TypeError),
        ("temperature", None, TypeError),
        ("top_k", -1, ValueError),
        ("top_k", 5.0, TypeError),
        ("top_k", False, TypeError),
        ("top_p", -0.1, ValueError),
        ("top_p", 1.01, ValueError),
        ("top_p", math.nan, ValueError),
        ("top_p", True, TypeError),
        ("min_p", -0.1, ValueError),
        ("min_p", 1.5, ValueError),
        ("min_p", math.nan, ValueError),
        ("repetition_penalty", 0, ValueError),
        ("repetition_penalty", -2.0, ValueError),
        ("repetition_penalty", math.inf, ValueError),
        ("repetition_penalty", True, TypeError),
    ],
)
def test_bad_parameters_name_field_value_and_remedy(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{field}={re.escape(repr(value))} must be .+; use .+"):
        dataclasses.replace(Sampling(), **{field: value})
