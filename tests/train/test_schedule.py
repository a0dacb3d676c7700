"""The learning-rate factor at the points that define it."""

import math

import pytest

from open_mythos.train.schedule import ScheduleConfig


def test_published_addition_schedule() -> None:
    cfg = ScheduleConfig(warmup_steps=2000, shape="cosine", final_ratio=1e-5 / 3e-4)
    lr = [3e-4 * cfg.factor(step, 30_000) for step in (0, 1999, 2000, 16_000, 30_000)]
    assert lr == pytest.approx([3e-4 / 2000, 3e-4, 3e-4, (3e-4 + 1e-5) / 2, 1e-5])


def test_linear_cooldown_over_the_last_quarter() -> None:
    cfg = ScheduleConfig(warmup_steps=10, shape="linear", cooldown=0.25, final_ratio=0.2)
    factors = [cfg.factor(step, 110) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:86] == [1.0] * 76
    assert factors[86:] == pytest.approx([0.2 + 0.8 * (110 - step) / 25 for step in range(86, 110)])


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("n_steps", [1, 7, 100])
@pytest.mark.parametrize("warmup_steps", [0, 3, 50])
def test_every_step_learns(shape: str, n_steps: int, warmup_steps: int) -> None:
    cfg = ScheduleConfig(warmup_steps=warmup_steps, shape=shape)
    factors = [cfg.factor(step, n_steps) for step in range(n_steps)]
    assert all(0 < f <= 1 and math.isfinite(f) for f in factors)
    after = factors[warmup_steps:]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"warmup_steps": -1}, "schedule.warmup_steps=-1"),
        ({"shape": "cos"}, "schedule.shape='cos'"),
        ({"cooldown": 0.0}, "schedule.cooldown=0.0"),
        ({"cooldown": 1.1}, "schedule.cooldown=1.1"),
        ({"final_ratio": float("nan")}, "schedule.final_ratio=nan"),
    ],
)
def test_refuses(kwargs: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ScheduleConfig(**kwargs)


def test_refuses_half_a_step() -> None:
    with pytest.raises(TypeError, match=r"schedule.warmup_steps=2.5 must be int"):
        ScheduleConfig(warmup_steps=2.5)  # ty: ignore[invalid-argument-type]
