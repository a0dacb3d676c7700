"""Depth laws: their means, and that a row's depth depends on (seed, step, row) alone."""

import numpy as np
import pytest

from open_mythos.train.depth_sampling import LoopsConfig

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
def test_depends_on_seed_and_step_alone(cfg: LoopsConfig) -> None:
    whole = cfg.depths(seed=7, step=11, rows=64)
    assert np.array_equal(whole, cfg.depths(seed=7, step=11, rows=64))
    if cfg.law != "fixed":
        assert not np.array_equal(whole, cfg.depths(seed=7, step=12, rows=64))
        assert not np.array_equal(whole, cfg.depths(seed=8, step=11, rows=64))


@pytest.mark.parametrize(("processes", "rows"), [(2, 8), (64, 8), (48, 10), (7, 9)])
def test_processes_have_about_equal_work(processes: int, rows: int) -> None:
    """What the largest share has over the mean one, against rows that are only drawn."""
    cfg, worst = LoopsConfig("poisson", 8), {"dealt": 0.0, "drawn": 0.0}
    for step in range(200):
        depths = cfg.depths(0, step, processes * rows)
        drawn = np.random.default_rng(step).permutation(depths)
        for name, x in (("dealt", depths), ("drawn", drawn)):
            worst[name] += x.reshape(processes, rows).sum(1).max() / x.sum() * processes - 1
    for name, excess in worst.items():
        print(f"{processes} processes of {rows} rows, {name}: the slowest has {100 * excess / 200:.1f} % over the mean")
    assert worst["dealt"] < 0.6 * worst["drawn"]


def test_every_row_gets_every_depth() -> None:
    """Dealing favours no place in the batch."""
    depths = np.array([LAWS["poisson"].depths(0, step, 24) for step in range(4000)])
    assert np.abs(depths.mean(0) - 4).max() < 0.15
    assert np.abs(depths.std(0) - np.sqrt(3)).max() < 0.15


@pytest.mark.parametrize("law", ["fixed", "uniform", "poisson", "poisson_lognormal"])
def test_a_mean_that_rises(law: str) -> None:
    cfg = LoopsConfig(law, 8, mean_ramp_steps=100)
    means = [cfg.mean_at(step) for step in range(101)]
    assert means[0] == 1 and means[75] == pytest.approx(1 + 7 / 2) and means[100] == 8
    assert means == sorted(means)
    first, half, last = (cfg.depths(0, step, 20_000).mean() for step in (0, 75, 100))
    extra = 1 if law == "poisson_lognormal" else 0
    assert first == pytest.approx(1 + extra, abs=0.05)
    assert half == pytest.approx(5 if law == "fixed" else 4.5 + extra, rel=0.02)
    assert last == pytest.approx(8 + extra, rel=0.02)


def test_one_depth_per_batch() -> None:
    cfg = LoopsConfig("poisson", 4, per="batch")
    depths = np.array([cfg.depths(0, step, 8) for step in range(4000)])
    assert (depths == depths[:, :1]).all()
    assert depths[:, 0].mean() == pytest.approx(4, rel=0.03)


def test_max_loops_cuts() -> None:
    depths = LoopsConfig("poisson", 8, max_loops=9).depths(0, 0, 1000)
    assert depths.max() == 9
    assert (depths == np.minimum(LoopsConfig("poisson", 8).depths(0, 0, 1000), 9)).all()


def test_ramp_raises_the_cut() -> None:
    cfg = LoopsConfig("uniform", 3.5, max_loops=6, ramp_steps=60)
    without = LoopsConfig("uniform", 3.5)
    for step in range(80):
        cut = min(6, 1 + step // 10)
        depths = cfg.depths(0, step, 100)
        assert depths.max() == cut
        assert (depths == np.minimum(without.depths(0, step, 100), cut)).all()


def test_no_depth_is_beyond_what_the_model_takes() -> None:
    depths = LoopsConfig("poisson_lognormal", 4096).depths(0, 0, 1000)
    assert depths.max() == 4096


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
        ({"ramp_steps": -1}, "loops.ramp_steps=-1"),
        ({"ramp_steps": 5}, "loops.ramp_steps=5 needs a depth to rise to; use loops.max_loops=8"),
        ({"backprop_depth": 0}, "loops.backprop_depth=0"),
    ],
)
def test_refuses(kwargs: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LoopsConfig(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"law": 3}, "loops.law=3 must be one of 'fixed'"),
        ({"mean": "4"}, "loops.mean='4' must be a finite number"),
        ({"max_loops": 2.0}, "loops.max_loops=2.0 must be int"),
        ({"backprop_depth": True}, "loops.backprop_depth=True must be int"),
    ],
)
def test_refuses_types(kwargs: dict, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        LoopsConfig(**kwargs)
