"""Calls that cannot be answered are refused before any work, by the name of the argument and with a remedy."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import LoopPlan, OpenMythos
from open_mythos.tokenization.tokenizer import ByteTokenizer
from tests.models import scaled, tiny, worst

REMEDY = re.compile(
    r"\b(use|leave|make|give|pass|shorten|set|check|pad|one per row|see|stop on|covers|must come from)\b"
)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
ONE = torch.tensor([[1, 2, 3]])


def forward(*args: Any, **kwargs: Any) -> Callable:
    return lambda model: model(*args, **kwargs)


def generate(input_ids: Any, max_new_tokens: Any = 4, *args: Any, **kwargs: Any) -> Callable:
    return lambda model: model.generate(input_ids, max_new_tokens, *args, **kwargs)


def with_cache(ids: Tensor, rows: int = 2, room: int = 8, levels: int = 4, used: int = 0, **kwargs: Any) -> Callable:
    def call(model: OpenMythos) -> Any:
        cache = model.make_cache(rows, room, levels)
        if used:
            model(torch.ones(rows, used, dtype=torch.int64), cache=cache)
        return model(ids, cache=cache, **kwargs)

    return call


def with_cache_of_another_dtype(model: OpenMythos) -> Any:
    cache = model.make_cache(2, 8)
    return model.double()(IDS, cache=cache)


def plan(depths: tuple[int, ...], n_grad: int | None = None, **kwargs: Any) -> Callable:
    return lambda model: model(IDS, plan=LoopPlan(depths, n_grad), **kwargs)


BAD_LOOPS: list[tuple[Any, type[Exception]]] = [
    *((n, ValueError) for n in (0, -5, 4097, 10**9)),
    *((n, TypeError) for n in (True, False, 2.5, 2.0, "3", math.nan)),
]
BAD_IDS: list[tuple[Any, type[Exception], list[str]]] = [
    (torch.tensor([[1, 53]]), ValueError, ["53", "vocab_size=53"]),
    (torch.tensor([[-1, 3]]), ValueError, ["-1", "vocab_size=53"]),
    (torch.tensor([[2**40, 3]]), ValueError, [str(2**40)]),
    (torch.tensor([1, 2, 3]), ValueError, ["(3,)"]),
    (torch.ones(1, 2, 3, dtype=torch.int64), ValueError, ["(1, 2, 3)"]),
    (torch.ones(1, 0, dtype=torch.int64), ValueError, ["empty"]),
    (torch.ones(0, 3, dtype=torch.int64), ValueError, ["(0, 3)"]),
    (torch.tensor(3), ValueError, ["()"]),
    (torch.ones(1, 3), TypeError, ["float32"]),
    (torch.ones(1, 3, dtype=torch.bool), TypeError, ["bool"]),
    (torch.ones(1, 3, dtype=torch.bfloat16), TypeError, ["bfloat16"]),
]
BAD_THRESHOLDS: list[tuple[Any, type[Exception]]] = [
    *((x, ValueError) for x in (0.0, -1.0, math.nan, math.inf)),
    *((x, TypeError) for x in (True, "0.1", [0.1])),
]
BAD_SAMPLING: list[tuple[str, Any, type[Exception]]] = [
    ("temperature", -1, ValueError),
    ("temperature", math.nan, ValueError),
    ("temperature", math.inf, ValueError),
    ("temperature", "1", TypeError),
    ("temperature", None, TypeError),
    ("temperature", True, TypeError),
    ("top_k", -1, ValueError),
    ("top_k", 2.0, TypeError),
    ("top_k", True, TypeError),
    ("top_p", -0.1, ValueError),
    ("top_p", 1.1, ValueError),
    ("top_p", math.nan, ValueError),
    ("top_p", "0.9", TypeError),
    ("min_p", -0.1, ValueError),
    ("min_p", 1.1, ValueError),
    ("min_p", math.nan, ValueError),
    ("repetition_penalty", 0.0, ValueError),
    ("repetition_penalty", -1.0, ValueError),
    ("repetition_penalty", math.inf, ValueError),
    ("repetition_penalty", None, TypeError),
]

CALLS: list[tuple[Callable, type[Exception], list[str]]] = [
    *((forward(IDS, n), error, ["n_loops"]) for n, error in BAD_LOOPS),
    *((generate(IDS, 2, n), error, ["n_loops"]) for n, error in BAD_LOOPS),
    *((with_cache(IDS, n_loops=n), error, ["n_loops"]) for n, error in BAD_LOOPS),
    *((lambda m, n=n: m.make_cache(1, 8, n), error, ["n_loops"]) for n, error in BAD_LOOPS),
    *((lambda m, n=n: LoopPlan((2, n)), error, ["depths"]) for n, error in BAD_LOOPS),
    *((lambda m, n=n: LoopPlan((2, 2), n), error, ["n_grad"]) for n, error in BAD_LOOPS),
    *((forward(ids), error, ["input_ids", *named]) for ids, error, named in BAD_IDS),
    *((generate(ids), error, ["input_ids", *named]) for ids, error, named in BAD_IDS),
    *((forward(x), TypeError, ["input_ids"]) for x in ([[1, 2]], "text", None, 3)),
    (forward(torch.ones(1, 65, dtype=torch.int64)), ValueError, ["65", "max_seq_len=64"]),
    (forward(torch.ones(1, 10**6, dtype=torch.int64)), ValueError, ["1000000", "max_seq_len=64"]),
    # Masks.
    (forward(IDS, attention_mask=torch.ones(2, 4)), ValueError, ["attention_mask", "(2, 4)", "(2, 3)"]),
    (forward(IDS, attention_mask=torch.ones(3)), ValueError, ["attention_mask", "(3,)"]),
    (forward(IDS, attention_mask=torch.ones(2, 1, 3)), ValueError, ["attention_mask"]),
    (forward(IDS, attention_mask=[[1, 1, 1]] * 2), TypeError, ["attention_mask"]),
    (with_cache(IDS, used=2, attention_mask=torch.ones(2, 5)), ValueError, ["attention_mask", "(2, 3)"]),
    (generate(IDS, attention_mask=torch.ones(2, 4)), ValueError, ["attention_mask"]),
    (generate(IDS, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]])), ValueError, ["attention_mask", "left"]),
    (generate(IDS, attention_mask=torch.tensor([[1, 0, 1], [1, 1, 1]])), ValueError, ["attention_mask", "left"]),
    (generate(IDS, attention_mask=torch.tensor([[0, 0, 0], [1, 1, 1]])), ValueError, ["attention_mask", "left"]),
    (generate([[1, 2], [3]], attention_mask=torch.ones(2, 2)), ValueError, ["attention_mask"]),
    # The cache.
    (with_cache(IDS, n_loops=5), ValueError, ["n_loops=5", "4 levels", "n_loops=5)"]),
    (with_cache(ONE), ValueError, ["batch_size=2", "1 rows"]),
    (with_cache(IDS, room=2), ValueError, ["max_len=2", "max_len=3"]),
    (with_cache(IDS, used=6), ValueError, ["6 of max_len=8", "max_len=9"]),
    (forward(IDS, cache={}), TypeError, ["cache", "make_cache"]),
    (forward(IDS, cache=True), TypeError, ["cache", "make_cache"]),
    (lambda m: m.make_cache(0, 8), ValueError, ["batch_size"]),
    (lambda m: m.make_cache(True, 8), TypeError, ["batch_size"]),
    (lambda m: m.make_cache(2.0, 8), TypeError, ["batch_size"]),
    (lambda m: m.make_cache(1, 0), ValueError, ["max_len"]),
    (lambda m: m.make_cache(1, 65), ValueError, ["max_len=65", "max_len=64"]),
    (lambda m: m.make_cache(1, 10**12), ValueError, ["max_len"]),
    (lambda m: m.make_cache(1, "8"), TypeError, ["max_len"]),
    (with_cache_of_another_dtype, ValueError, ["cache", "float32", "float64"]),
    # Arguments of 0.5.0, and misspelt ones.
    (forward(IDS, kv_cache={}), TypeError, ["kv_cache", "cache=model.make_cache"]),
    (forward(IDS, start_pos=0), TypeError, ["start_pos", "cache="]),
    (forward(IDS, n_loop=3), TypeError, ["n_loop"]),
    (forward(IDS, attention_masks=None), TypeError, ["attention_masks"]),
    # Exit rules.
    *((forward(IDS, exit=x), ValueError, ["exit", "'kl'"]) for x in ("KL", "klx", "latent-diff", "", "always")),
    *((forward(IDS, exit=x), TypeError, ["exit"]) for x in (3, True, ["kl"], 0.5)),
    *((forward(IDS, exit="kl", exit_threshold=x), error, ["exit_threshold"]) for x, error in BAD_THRESHOLDS),
    *((generate(IDS, exit="latent_diff", exit_threshold=x), error, ["exit_threshold"]) for x, error in BAD_THRESHOLDS),
    (forward(IDS, exit="act", exit_threshold=1.5), ValueError, ["exit_threshold=1.5"]),
    (forward(IDS, exit="fixed", exit_threshold=0.1), ValueError, ["exit_threshold", "fixed"]),
    (forward(IDS, exit_threshold=0.1), ValueError, ["exit_threshold=0.1", "exit='kl'"]),
    (generate(IDS, exit="lates_diff"), ValueError, ["exit", "'latent_diff'"]),
    # Plans.
    (plan((2,)), ValueError, ["plan.depths", "2 rows"]),
    (plan((2, 2, 2)), ValueError, ["plan.depths", "2 rows"]),
    (plan((3, 4), 2), ValueError, ["n_grad=2", "halting"]),
    (plan((3, 4), n_loops=4), ValueError, ["n_loops", "plan"]),
    (plan((3, 4), exit="kl"), ValueError, ["exit", "plan"]),
    (plan((3, 3), trace=True), ValueError, ["trace", "plan", "halting='none'"]),
    (lambda m: m(IDS, plan=LoopPlan((3, 4)), cache=m.make_cache(2, 8)), ValueError, ["cache", "plan"]),
    (plan((3, 4), last_only=True), ValueError, ["last_only", "plan"]),
    (forward(IDS, plan=3), TypeError, ["plan", "LoopPlan"]),
    (forward(IDS, plan=(3, 4)), TypeError, ["plan", "LoopPlan"]),
    (lambda m: LoopPlan(()), ValueError, ["depths"]),
    (lambda m: m.update_expert_bias(torch.ones(2, 4)), ValueError, ["tokens_per_expert", "(2, 4)", "(1, 4)"]),
    (lambda m: m.update_expert_bias(torch.ones(4)), ValueError, ["tokens_per_expert", "(4,)"]),
    (lambda m: m.update_expert_bias(torch.ones(1, 4), math.nan), ValueError, ["rate"]),
    # Generation.
    *((generate(IDS, **{name: value}), error, [name]) for name, value, error in BAD_SAMPLING),
    *((generate(IDS, n), error, ["max_new_tokens"]) for n, error in BAD_LOOPS if n != 10**9 and n != 4097),
    (generate(IDS, 62), ValueError, ["max_new_tokens=62", "max_seq_len=64", "max_new_tokens=61"]),
    (generate(IDS, 10**9), ValueError, ["max_new_tokens", "max_seq_len=64"]),
    (generate(torch.ones(1, 64, dtype=torch.int64), 1), ValueError, ["64", "max_seq_len=64"]),
    (generate(torch.ones(1, 65, dtype=torch.int64), 1), ValueError, ["65", "max_seq_len=64"]),
    (generate([]), (TypeError, ValueError), ["input_ids"]),
    (generate([[]]), ValueError, ["input_ids", "empty"]),
    (generate([[1], []]), ValueError, ["input_ids", "empty"]),
    (generate(""), ValueError, ["input_ids"]),
    (generate("", tokenizer=ByteTokenizer()), ValueError, ["empty"]),
    (generate("text"), ValueError, ["tokenizer"]),
    (generate(["a", [1]], tokenizer=ByteTokenizer()), TypeError, ["input_ids", "mixes"]),
    (generate([[1], "a"], tokenizer=ByteTokenizer()), TypeError, ["input_ids", "mixes"]),
    (generate("text", tokenizer=ByteTokenizer()), ValueError, ["vocab_size=53", "tokenizer"]),
    (generate([1, 99]), ValueError, ["99", "vocab_size=53"]),
    (generate(None), TypeError, ["input_ids"]),
    (generate(7), TypeError, ["input_ids"]),
    (generate([1.5, 2]), TypeError, ["input_ids"]),
    (generate([[1, 2.5]]), TypeError, ["input_ids"]),
    (generate([True, False]), TypeError, ["input_ids"]),
    (generate([1, 2, None]), TypeError, ["input_ids"]),
    (generate(IDS, stop=53), ValueError, ["stop=53", "52"]),
    (generate(IDS, stop=-1), ValueError, ["stop=-1"]),
    (generate(IDS, stop=True), TypeError, ["stop"]),
    (generate(IDS, stop=1.5), TypeError, ["stop"]),
    (generate(IDS, stop=[1, None]), TypeError, ["stop"]),
    (generate(IDS, stop=None), TypeError, ["stop"]),
    (generate(IDS, stop=""), ValueError, ["stop"]),
    (generate(IDS, stop="."), ValueError, ["stop", "tokenizer"]),
    (generate(IDS, seed=1.5), TypeError, ["seed"]),
    (generate(IDS, seed=True), TypeError, ["seed"]),
    (generate(IDS, seed="7"), TypeError, ["seed"]),
    (generate(IDS, seed=2**70), ValueError, ["seed"]),
    (generate(IDS, seed=[1]), ValueError, ["seed", "2 rows"]),
    (generate(IDS, seed=[1, 2, 3]), ValueError, ["seed", "2 rows"]),
    (generate(IDS, seed=[1, 2.5]), TypeError, ["seed"]),
    (generate(IDS, seed=1, generator=torch.Generator()), ValueError, ["seed", "generator"]),
    (generate(IDS, generator=7), TypeError, ["generator"]),
    (generate(IDS, pad_id=-1), ValueError, ["pad_id"]),
    (generate(IDS, pad_id="0"), TypeError, ["pad_id"]),
    (generate(IDS, on_token=3), TypeError, ["on_token"]),
]


@pytest.mark.parametrize(
    ("call", "error", "named"), CALLS, ids=[f"{i}-{'-'.join(n)}" for i, (_, _, n) in enumerate(CALLS)]
)
def test_bad_calls_are_refused(call: Callable, error: type[Exception], named: list[str]) -> None:
    model = scaled(tiny())
    blocks: list[Any] = []
    for module in (model.embed, model.recurrent.block):
        # The cache of a few cases is filled first, with two or six tokens; the refused call has three or one.
        module.register_forward_pre_hook(lambda _, args: blocks.append(args[0].shape))
    with pytest.raises(error) as caught:
        call(model)
    message = str(caught.value)
    assert all(word in message for word in named) and REMEDY.search(message), message
    assert all(shape[1] in (2, 6) for shape in blocks), "work was done before the refusal"


def test_there_are_enough_bad_calls() -> None:
    assert len(CALLS) >= 90


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (forward(IDS, 3), ["n_loops=3", "recurrent_layers=0"]),
        (generate(IDS, 3, 3), ["n_loops=3", "recurrent_layers=0"]),
        (lambda m: m.make_cache(1, 8, 3), ["n_loops=3", "recurrent_layers=0"]),
        (forward(IDS, trace=True), ["recurrent_layers=0"]),
        (forward(IDS, exit="kl"), ["recurrent_layers=0"]),
        (forward(IDS, exit="fixed"), ["recurrent_layers=0"]),
    ],
)
def test_a_plain_transformer_has_no_loops(call: Callable, named: list[str]) -> None:
    with pytest.raises(ValueError, match="leave") as caught:
        call(scaled(tiny(recurrent_layers=0)))
    assert all(word in str(caught.value) for word in named)


def test_act_needs_a_learned_halting() -> None:
    with pytest.raises(ValueError, match="exit='act' needs a model with halting='act'; use"):
        scaled(tiny(halting="none"))(IDS, exit="act")


@torch.no_grad()
def test_a_refused_call_leaves_the_cache_untouched() -> None:
    model = scaled(tiny())
    cache = model.make_cache(2, 6, 4)
    model(IDS, cache=cache)
    before = [x.clone() for layer in cache.layers for x in layer]
    for kwargs, ids in (
        ({"n_loops": 5}, IDS),
        ({"n_loops": 0}, IDS),
        ({}, torch.ones(2, 4, dtype=torch.int64)),
        ({}, torch.full((2, 1), 53)),
        ({}, ONE),
        ({"exit": "typo"}, IDS),
        ({"exit": "kl", "exit_threshold": -1}, IDS),
        ({"attention_mask": torch.ones(2, 6)}, IDS),
        ({"plan": LoopPlan((2, 2))}, IDS),
    ):
        with pytest.raises((ValueError, TypeError)):
            model(ids, cache=cache, **kwargs)
        assert cache.length == 3 and cache.n_valid.tolist() == [3, 3]
    assert all(torch.equal(a, b) for a, b in zip(before, (x for layer in cache.layers for x in layer), strict=True))
    full = model(IDS.repeat(1, 2))
    assert worst(model(IDS, cache=cache), full[:, 3:]) < 1e-5


@torch.no_grad()
def test_what_is_allowed_at_the_edges() -> None:
    model = scaled(tiny())
    assert model(torch.ones(1, 64, dtype=torch.int64)).shape == (1, 64, 53)
    assert model(IDS.int(), 1).shape == (2, 3, 53)
    assert model(torch.tensor([[0, 52]])).shape == (1, 2, 53)
    assert model(ONE[:, :1], 4096).isfinite().all()
    assert model.generate(IDS, 2, top_k=10**6).shape == (2, 5)
    assert model.generate(IDS, 2, top_k=0).shape == model.generate(IDS, 2, top_k=None).shape == (2, 5)
    assert model(IDS, exit="act", exit_threshold=1.0).shape == (2, 3, 53)
