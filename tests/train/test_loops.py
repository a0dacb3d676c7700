"""Depth laws: their means, and that a row's depth depends on (seed, step, row) alone."""

import numpy as np
import pytest

from open_mythos.train.loops import LoopsConfig, loop_plan

LAWS = {
    "fixed": LoopsConfig("fixed", 4),
    "uniform": LoopsConfig("uniform", 4.5),
    "poisson": LoopsConfig("poisson", 4),
    "poisson_lognormal": LoopsConfig("poisson_lognormal", 32),
}


@pytest.mark.parametrize(
    ("law", "mean", "std"),
    [
        ("fixed", 4, 0),
        ("uniform", 4.5, np.sqrt((8**2 - 1) / 12)),
        ("poisson", 4, np.sqrt(3)),
        # Var = E[lambda] + Var[lambda], lambda log-normal with mean 32.
        ("poisson_lognormal", 33, np.sqrt(32 + 32**2 * (np.exp(0.25) - 1))),
    ],
)
def test_moments(law: str, mean: float, std: float) -> None:
    depths = LAWS[law].depths(seed=1, step=2, rows=100_000)
    assert depths.min() >= 1
    assert depths.mean() == pytest.approx(mean, rel=0.01)
    assert depths.std() == pytest.approx(std, rel=0.02)


def test_huginn_quantiles() -> None:
    """Huginn's law as simulated in its paper's setting: median 29, 95 % at 67, 1.4 % at most 8."""
    depths = LAWS["poisson_lognormal"].depths(seed=3, step=0, rows=200_000)
    assert abs(np.median(depths) - 29) <= 1
    assert abs(np.quantile(depths, 0.95) - 67) <= 1
    assert np.mean(depths <= 8) == pytest.approx(0.014, abs=0.003)


def test_uniform_covers_its_range() -> None:
    assert set(LAWS["uniform"].depths(0, 0, 1000)) == set(range(1, 9))


@pytest.mark.parametrize("cfg", LAWS.values(), ids=LAWS)
def test_depends_on_seed_step_and_row_alone(cfg: LoopsConfig) -> None:
    whole = cfg.depths(seed=7, step=11, rows=64)
    assert np.array_equal(whole, cfg.depths(seed=7, step=11, rows=64))
    # Row i is the same in a batch of any size, so how the batch is cut into micro-batches or ranks does not matter.
    for rows in (1, 7, 63):
        assert np.array_equal(whole[:rows], cfg.depths(seed=7, step=11, rows=rows))
    if cfg.law != "fixed":
        assert not np.array_equal(whole, cfg.depths(seed=7, step=12, rows=64))
        assert not np.array_equal(whole, cfg.depths(seed=8, step=11, rows=64))


def test_one_depth_per_batch() -> None:
    cfg = LoopsConfig("poisson", 4, per="batch")
    depths = np.array([cfg.depths(0, step, 8) for step in range(4000)])
    assert (depths == depths[:, :1]).all()
    assert depths[:, 0].mean() == pytest.approx(4, rel=0.03)


def test_max_loops_cuts() -> None:
    depths = LoopsConfig("poisson", 8, max_loops=9).depths(0, 0, 1000)
    assert depths.max() == 9
    assert (depths == np.minimum(LoopsConfig("poisson", 8).depths(0, 0, 1000), 9)).all()


def test_plan_raises_depths_to_the_tasks_need() -> None:
    cfg = LoopsConfig("poisson", 4, backprop_depth=3)
    need = tuple(range(1, 9))
    plan = loop_plan(cfg, 0, 0, 8, need)
    assert plan.n_grad == 3
    assert plan.depths == tuple(int(d) for d in np.maximum(cfg.depths(0, 0, 8), need))
    assert all(type(d) is int for d in plan.depths)
    shared = loop_plan(LoopsConfig("fixed", 2, per="batch"), 0, 0, 8, need)
    assert shared.depths == (8,) * 8
    assert loop_plan(LoopsConfig(), 0, 0, 3).depths == (4, 4, 4)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"law": "posson"}, "loops.law='posson'"),
        ({"mean": 0}, "loops.mean=0"),
        ({"mean": float("inf")}, "loops.mean=inf"),
        ({"mean": 5000}, "loops.mean=5000"),
        ({"law": "fixed", "mean": 2.5}, "loops.mean=2"),
        ({"law": "uniform", "mean": 2.25}, "loops.mean=2"),
        ({"sigma": -1}, "loops.sigma=-1"),
        ({"per": "row"}, "loops.per='row'"),
        ({"max_loops": 0}, "loops.max_loops=0"),
        ({"max_loops": 4097}, "loops.max_loops=4097"),
        ({"backprop_depth": 0}, "loops.backprop_depth=0"),
        ({"backprop_depth": True}, "loops.backprop_depth=True"),
    ],
)
def test_refuses(kwargs: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LoopsConfig(**kwargs)
