"""What a request may ask for, and what is refused before it waits."""

from typing import Any

import pytest

from open_mythos.serve.params import SamplingParams


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"stop": None}, TypeError, r"stop=None must be a list; use stop=\['.'\], or leave it out"),
        ({"stop": 5}, TypeError, "stop=5 must be a list"),
        ({"stop": ["a", 5]}, TypeError, "stop=5 must be a string"),
        ({"stop": ""}, ValueError, "would end every answer at once"),
        ({"stop": ["a", ""]}, ValueError, "would end every answer at once"),
        ({"stop_token_ids": None}, TypeError, r"stop_token_ids=None must be a list; use stop_token_ids=\[0\]"),
        ({"stop_token_ids": 3}, TypeError, "stop_token_ids=3 must be a list"),
        ({"stop_token_ids": [-1]}, ValueError, "stop_token_ids=-1"),
        ({"ignore_eos": "no"}, TypeError, "ignore_eos='no' must be bool"),
        ({"seed": 2**63 - 1, "n": 2}, ValueError, "seed=9223372036854775807"),
        ({"logprobs": 21}, ValueError, "logprobs=21"),
        ({"n": 0}, ValueError, "n=0"),
        ({"max_tokens": 0}, ValueError, "max_tokens=0"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        SamplingParams(**fields)


def test_params_stay_what_was_checked() -> None:
    words, ids = ["a"], [1]
    params = SamplingParams(stop=words, stop_token_ids=ids, seed=2**63 - 1)
    words.append("")
    ids.append(-1)
    assert (params.stop_strings, params.stop_token_ids) == (("a",), (1,))
    assert hash(params) == hash(SamplingParams(stop=("a",), stop_token_ids=(1,), seed=2**63 - 1))
    assert SamplingParams(stop_token_ids=(i for i in [1, 2])).stop_token_ids == (1, 2)  # ty: ignore[invalid-argument-type]
    assert SamplingParams(stop="END").stop_strings == ("END",)
