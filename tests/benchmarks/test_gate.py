"""The gate lets equal mathematics through, and nothing else."""

import pytest
import torch

from benchmarks.gate import FORWARD_LIMIT, GRADIENT, GRADIENT_LIMIT, Agreement, Different, compare, relative_error


def outputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(3, 7, generator=generator),
        f"{GRADIENT}w": torch.randn(5, generator=generator),
        "tokens": torch.arange(6),
        "loops": torch.tensor(4),
    }


def test_equal_outputs_agree() -> None:
    assert compare(outputs(), outputs()) == Agreement(0.0, 0.0, 4)


@pytest.mark.parametrize(("name", "limit"), [("logits", FORWARD_LIMIT), (f"{GRADIENT}w", GRADIENT_LIMIT)])
def test_a_planted_difference_is_refused(name: str, limit: float) -> None:
    for factor, passes in ((0.8, True), (1.3, False)):
        ours, theirs = outputs(), outputs()
        # One element of many, by a share of the largest.
        ours[name].flatten()[0] += factor * limit * theirs[name].abs().max()
        if passes:
            assert compare(ours, theirs)
        else:
            with pytest.raises(Different, match=f"{name} differs by"):
                compare(ours, theirs)


def test_other_tokens_loops_shapes_or_names_are_refused() -> None:
    for name, changed in (
        ("tokens", torch.tensor([0, 1, 2, 3, 4, 6])),
        ("loops", torch.tensor(3)),
        ("logits", torch.zeros(7, 3)),
    ):
        with pytest.raises(Different, match=name):
            compare({**outputs(), name: changed}, outputs())
    fewer = outputs()
    del fewer[f"{GRADIENT}w"]
    for one, other in ((fewer, outputs()), (outputs(), fewer)):
        with pytest.raises(Different, match="only one side"):
            compare(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    ours, theirs = outputs(), outputs()
    ours["logits"][0, 0] = theirs["logits"][0, 0] = value
    with pytest.raises(Different, match="logits"):
        compare(ours, theirs)


def test_zero_reference_has_no_scale() -> None:
    zero = torch.zeros(3)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 1e-6, zero) > 1
