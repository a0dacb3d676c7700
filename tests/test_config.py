"""A configuration that cannot be is refused when it is made, by the name of the field and with a value that works."""

import copy
import dataclasses
import math
import re
from typing import get_type_hints

import pytest
import torch

from open_mythos import MythosConfig, OpenMythos
from open_mythos.checks import Range
from tests.models import tiny

REMEDY = re.compile(r"\b(use|leave|make|give|pass|shorten|set|check|did you mean|the fields are|the default is)\b")

POSITIVE = (
    "vocab_size dim n_heads n_kv_heads max_seq_len max_loop_iters kv_lora_rank q_lora_rank qk_rope_head_dim "
    "qk_nope_head_dim v_head_dim n_experts_per_tok expert_dim max_output_tokens min_loops"
).split()
NOT_NEGATIVE = "prelude_layers coda_layers recurrent_layers n_experts n_shared_experts lora_rank".split()
INTEGERS = POSITIVE + NOT_NEGATIVE
FLOATS = "act_threshold rope_theta dropout norm_eps embed_scale state_std".split()
CHOICES = {
    "attn_type": ["bogus", "GQA", "gpa", ""],
    "injection": ["lit", "diag", "LTI"],
    "initial_state": ["noise", "zeros"],
    "halting": ["ACT", "never"],
    "block_norm": ["last", "sandwitch"],
}
LARGEST = {
    name: limits.high
    for name, hint in get_type_hints(MythosConfig, include_extras=True).items()
    for limits in getattr(hint, "__metadata__", ())
    if isinstance(limits, Range) and name not in FLOATS
}
BEYOND = (2**31, 10**12 + 1, 10**4000)
SWITCHES = "loop_embedding prelude_norm qk_norm".split()

WRONG: list[tuple[dict, type[Exception], list[str]]] = [
    *(({name: value}, ValueError, [name]) for name in POSITIVE for value in (0, -3)),
    *(({name: -1}, ValueError, [name]) for name in NOT_NEGATIVE),
    *(({name: True}, TypeError, [name]) for name in INTEGERS),
    *(({name: 4.5 if name != "dim" else "32"}, TypeError, [name]) for name in INTEGERS),
    *(({name: None}, TypeError, [name]) for name in INTEGERS[::3]),
    *(({name: math.nan}, ValueError, [name]) for name in FLOATS),
    *(({name: math.inf}, ValueError, [name]) for name in FLOATS),
    *(({name: "0.5"}, TypeError, [name]) for name in FLOATS),
    *(({name: value}, ValueError, [name, value]) for name, values in CHOICES.items() for value in values),
    *(({name: 1}, TypeError, [name]) for name in CHOICES),
    *(({name: value}, TypeError, [name]) for name in SWITCHES for value in (1, "yes", None)),
    ({"act_threshold": 0.0}, ValueError, ["act_threshold"]),
    ({"act_threshold": -1.0}, ValueError, ["act_threshold"]),
    ({"act_threshold": 2}, ValueError, ["act_threshold"]),
    ({"dropout": 1.0}, ValueError, ["dropout"]),
    ({"dropout": -0.1}, ValueError, ["dropout"]),
    ({"rope_theta": 1.0}, ValueError, ["rope_theta"]),
    ({"rope_theta": -5e5}, ValueError, ["rope_theta"]),
    ({"max_loop_iters": 4097}, ValueError, ["max_loop_iters", "4096"]),
    ({"max_loop_iters": 10**9}, ValueError, ["max_loop_iters", "4096"]),
    ({"max_loop_iters": 4, "min_loops": 5}, ValueError, ["min_loops=5", "use min_loops=4"]),
    ({"n_heads": 5}, ValueError, ["n_heads=5", "dim=32", "use n_heads=4"]),
    ({"n_heads": 7, "dim": 256}, ValueError, ["n_heads=7 must divide dim=256; use n_heads=8"]),
    ({"n_kv_heads": 3}, ValueError, ["n_kv_heads=3", "n_heads=4"]),
    *(({name: value}, ValueError, [name, str(LARGEST[name])]) for name in LARGEST for value in BEYOND),
    ({"n_heads": 10, "dim": 2**20}, ValueError, ["n_heads=10 must divide dim=1048576; use n_heads=8"]),
    ({"n_heads": 4095, "dim": 2**20 - 3}, ValueError, ["n_heads=4095", "use n_heads=1"]),
    ({"n_kv_heads": 8}, ValueError, ["n_kv_heads=8", "use n_kv_heads=4"]),
    ({"dim": 12, "n_heads": 4}, ValueError, ["dim=12", "odd head width 3"]),
    ({"attn_type": "mla", "qk_rope_head_dim": 7}, ValueError, ["qk_rope_head_dim=7", "use 8"]),
    ({"attn_type": "mla", "qk_norm": True}, ValueError, ["qk_norm", "attn_type='gqa'"]),
    ({"n_experts_per_tok": 5}, ValueError, ["n_experts_per_tok=5", "n_experts=4"]),
    ({"dim": 4, "n_heads": 2}, ValueError, ["dim=4", "loop_embedding"]),
    (
        {"recurrent_layers": 0, "prelude_layers": 0, "coda_layers": 0},
        ValueError,
        ["recurrent_layers", "prelude_layers"],
    ),
]


@pytest.mark.parametrize(("changes", "error", "named"), WRONG, ids=lambda x: str(x)[:60] if isinstance(x, dict) else "")
def test_wrong_values_are_refused(changes: dict, error: type[Exception], named: list[str]) -> None:
    good = tiny()
    with pytest.raises(error) as caught:
        tiny(**changes)
    message = str(caught.value)
    assert all(word in message for word in named) and REMEDY.search(message), message
    # A field set afterwards is caught when a model is built from the configuration, before anything is allocated.
    late = copy.copy(good)
    for name, value in changes.items():
        setattr(late, name, value)
    with pytest.raises(error, match=re.escape(message)):
        OpenMythos(late)


def test_there_are_enough_wrong_values() -> None:
    assert len(WRONG) >= 110


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS])
def test_a_message_stays_short_whatever_the_value(name: str) -> None:
    for value in (10**5000, -(10**5000), "9" * 10**6, [[1] * 10**6], {"a" * 10**6: 1}, 10**400):
        with pytest.raises((TypeError, ValueError), match=f"{name}=") as error:
            tiny(**{name: value})
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("n_head", "did you mean 'n_heads'"),
        ("nheads", "did you mean 'n_heads'"),
        ("max_loops", "did you mean 'max_loop_iters'"),
        ("vocabsize", "did you mean 'vocab_size'"),
        ("attention", "the fields are vocab_size"),
        ("zzz", "the fields are vocab_size"),
    ],
)
def test_misspelt_fields_are_refused(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint) as error:
        MythosConfig.from_dict({name: 4})
    assert repr(name) in str(error.value)
    with pytest.raises(TypeError, match=name):
        MythosConfig(**{name: 4})


def test_dict_round_trip() -> None:
    cfg = tiny(attn_type="mla", injection="concat", dropout=0.1, loop_embedding=False)
    values = cfg.to_dict()
    assert MythosConfig.from_dict(values) == cfg
    names = [field.name for field in dataclasses.fields(MythosConfig)]
    assert list(values) == names[: names.index("norm_eps")], "fields of published models appear where they are used"
    assert list(dataclasses.replace(cfg, trained_loops=4).to_dict()) == [*values, "trained_loops"]
    assert all(type(value) in (int, float, str, bool) for value in values.values())
    assert type(MythosConfig(dropout=0).dropout) is float


def test_refusal_comes_before_allocation() -> None:
    """A model of 10^15 parameters is refused for another field without a byte being asked for."""
    with pytest.raises(ValueError, match="n_kv_heads"):
        tiny(dim=2**20, vocab_size=2**30, n_heads=4, n_kv_heads=3)
    late = tiny()
    late.vocab_size, late.dim, late.n_kv_heads = 2**30, 2**20, 3
    with pytest.raises(ValueError, match="n_kv_heads"):
        OpenMythos(late)


def test_odd_but_possible_shapes_build_and_run() -> None:
    for changes in (
        {"dim": 8, "n_heads": 4, "n_kv_heads": 1},
        {
            "dim": 8,
            "n_heads": 1,
            "n_kv_heads": 1,
            "expert_dim": 1,
            "vocab_size": 1,
            "max_seq_len": 1,
            "max_loop_iters": 1,
        },
        {"attn_type": "mla", "dim": 9, "n_heads": 5, "n_kv_heads": 3, "kv_lora_rank": 1, "q_lora_rank": 1},
        {
            "attn_type": "mla",
            "dim": 1,
            "loop_embedding": False,
            "v_head_dim": 1,
            "qk_nope_head_dim": 1,
            "qk_rope_head_dim": 2,
        },
        {"dim": 2, "n_heads": 1, "n_kv_heads": 1, "loop_embedding": False, "lora_rank": 64},
    ):
        cfg = tiny(**changes)
        with torch.no_grad():
            assert torch.isfinite(OpenMythos(cfg)(torch.zeros(1, 1, dtype=torch.int64))).all()
