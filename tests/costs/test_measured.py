"""Plans against steps that were taken. The whole table is `python -m benchmarks.plan`."""

import dataclasses

import pytest

from benchmarks.plan import cases, measure_flops, measure_memory
from open_mythos.train.depth_sampling import LoopsConfig

CASES = cases()
NAMES = [name if name == "200k" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_counted(name: str) -> None:
    assert abs(measure_flops(CASES[name]).off) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_is_the_one_measured(name: str) -> None:
    assert abs(measure_memory(CASES[name]).off) < 0.1


def test_loops_without_gradient_and_mla_are_counted_too() -> None:
    """Few tokens, so that the test is quick; in many small groups the experts' padding would show, so none."""
    cfg = CASES["3m, mla"]
    model = dataclasses.replace(cfg.model, n_experts=0)
    cfg = dataclasses.replace(cfg, model=model, batch_size=1, loops=LoopsConfig("fixed", 6, backprop_depth=2))
    assert abs(measure_flops(cfg).off) < 0.01
