"""Plans of every recipe: exact parameters, laws of depth, exchanges worked out by hand, remedies that help."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from open_mythos.accounting import count_parameters
from open_mythos.cli import main
from open_mythos.costs import make_plan
from open_mythos.costs.depth_distribution import deepest, mean_loops, probabilities
from open_mythos.costs.flops import hidden_matrices
from open_mythos.costs.gpus import CARDS
from open_mythos.costs.memory import RankParameters, peak
from open_mythos.costs.plan import sent_bytes
from open_mythos.costs.saved_activations import execution_of
from open_mythos.model import OpenMythos
from open_mythos.recipes import RECIPES, load_recipe
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.distributed import ParallelConfig
from open_mythos.train.optim import is_hidden_matrix

LAWS = [
    LoopsConfig("fixed", 5),
    LoopsConfig("fixed", 5, max_loops=3),
    LoopsConfig("uniform", 4.5, backprop_depth=3),
    LoopsConfig("poisson", 1),
    LoopsConfig("poisson", 8, backprop_depth=4),
    LoopsConfig("poisson", 6, max_loops=7),
    LoopsConfig("poisson_lognormal", 8, sigma=0.5),
]


def gpus_of(cfg: TrainConfig) -> int:
    return cfg.parallel.experts


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan_with_exact_parameters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load_recipe(name)
    plan = make_plan(cfg, gpus_of(cfg))
    with torch.device("meta"):
        model = OpenMythos(cfg.model)
    assert plan.parameters.total == sum(p.numel() for p in model.parameters())
    widths = {id(m.weight): m.widths for m in model.modules() if hasattr(m, "widths")}
    expected: dict[tuple[int, int], int] = {}
    for parameter, p in model.named_parameters():
        if is_hidden_matrix(parameter, p):
            for rows in widths.get(id(p), (p.shape[-2],)):
                shape = (rows, p.shape[-1])
                expected[shape] = expected.get(shape, 0) + p.numel() // (p.shape[-1] * p.shape[-2])
    assert hidden_matrices(cfg.model) == expected
    assert main(["plan", name, "--gpus", str(gpus_of(cfg))]) == 0
    shown = capsys.readouterr().out
    assert f"{plan.parameters.total:,}" in shown and ("Does not fit" in shown) == (not plan.fits)


@pytest.mark.parametrize("loops", LAWS, ids=str)
def test_probabilities_are_those_of_the_draws(loops: LoopsConfig) -> None:
    p, n = probabilities(loops), 200_000
    depths = loops.depths(0, 0, n)
    assert p.sum() == pytest.approx(1) and p[0] == 0 and depths.max() < len(p)
    drawn = np.bincount(depths, minlength=len(p)) / n
    assert np.abs(drawn - p).max() < 5 / n**0.5
    kept = np.minimum(depths, loops.backprop_depth or depths.max())
    assert mean_loops(loops) == pytest.approx(depths.mean(), rel=0.01)
    assert mean_loops(loops, window=True) == pytest.approx(kept.mean(), rel=0.01)


def test_the_deepest_micro_batch_by_enumeration() -> None:
    loops = LoopsConfig("uniform", 2)  # 1, 2 or 3
    sums = [sum(rows) for rows in itertools.product((1, 2, 3), repeat=4)]
    for draws in (1, 10, 80, 81, 1000):
        expected = max(s for s in sums if draws * sum(other >= s for other in sums) / len(sums) >= 1)
        assert deepest(loops, 4, draws) == expected
    assert deepest(dataclasses.replace(loops, per="batch"), 4, 1000) == 12
    assert deepest(LoopsConfig("fixed", 16, backprop_depth=4), 7, 1) == 28


def test_exchanges_worked_out_by_hand() -> None:
    cfg = dataclasses.replace(load_recipe("mythos-1b"), checkpoint_loops=False)
    counts, execution = count_parameters(cfg.model), execution_of(cfg)
    total, routed = counts.total, counts.routed_experts

    def sent(gpus: int, **parallel: object) -> dict[str, float]:
        changed = dataclasses.replace(cfg, parallel=ParallelConfig(**parallel))
        return sent_bytes(changed, execution, gpus, 16 * 256, 16 * 256)

    assert sent(1) == {}
    assert sent(4) == {"all-reduce of gradients": pytest.approx(2 * 4 * total * 3 / 4)}
    both = sent(8, kind="fsdp", rows=4)  # 32 rows of a rank, four at a time
    assert both["all-gather of weights"] == pytest.approx(8 * 2 * 4 * total * 7 / 8)
    assert both["reduce-scatter of gradients"] == pytest.approx(8 * 4 * total * 7 / 8)
    spread = sent(16, kind="fsdp", experts=8)
    assert spread["all-gather of weights"] == pytest.approx(2 * 4 * (total - routed) * 15 / 16)
    assert spread["all-reduce of experts' gradients"] == pytest.approx(2 * 4 * routed / 8 / 2)
    # Forward and backward: 4 choices of 2,048 values, float32 there and bf16 back, 7 of 8 to other ranks.
    tokens = 16 * 2048 * 16
    assert spread["all-to-all of tokens"] == pytest.approx(2 * tokens * 4 * 2048 * (4 + 2) * 7 / 8)


def test_shares_add_up_to_the_model() -> None:
    cfg = load_recipe("mythos-3b-fineweb-edu")
    counts = count_parameters(cfg.model)
    for gpus in (8, 64, 512):
        assert RankParameters.of(cfg, gpus).stored * gpus == pytest.approx(counts.total)
    # Spread experts are held whole by each group of ranks.
    cfg = dataclasses.replace(cfg, parallel=ParallelConfig("fsdp", experts=8))
    rest = counts.total - counts.routed_experts
    assert RankParameters.of(cfg, 64).stored * 64 == pytest.approx(rest + 8 * counts.routed_experts)


@pytest.mark.parametrize(
    ("name", "gpus", "changes"),
    [
        ("mythos-3b-fineweb-edu", 8, {"checkpoint_loops": False, "parallel": ParallelConfig()}),
        ("mythos-10b", 64, {"parallel": ParallelConfig()}),
        ("parcae-style-140m", 1, {"parallel": ParallelConfig()}),
        ("mythos-3b-fineweb-edu", 1, {}),
    ],
)
def test_the_remedy_fits(name: str, gpus: int, changes: dict, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = dataclasses.replace(load_recipe(name), **changes)
    plan = make_plan(cfg, gpus)
    assert not plan.fits and plan.remedy is not None and plan.remedy.startswith("use --")
    told = plan.remedy.removeprefix("use ").split()
    now = cfg.parallel
    given = ["--parallel.kind", now.kind, "--parallel.experts", str(now.experts), "--parallel.rows", str(now.rows)]
    given += ["--checkpoint-loops" if cfg.checkpoint_loops else "--no-checkpoint-loops"]
    assert main(["plan", name, "--gpus", str(gpus), *given, *told, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def test_what_no_gpu_holds_is_told() -> None:
    plan = make_plan(load_recipe("mythos-1t"), 512)
    assert not plan.fits and plan.remedy is not None and "436.9 GB" in plan.remedy


def test_a_plan_costs_what_its_parts_say() -> None:
    cfg = load_recipe("mythos-3b-fineweb-edu")
    plan = make_plan(cfg, 64, "h200", 0.5, 3.0)
    assert plan.tokens_per_s == pytest.approx(64 * 0.5 * 989.4e12 / plan.flops_per_token)
    assert plan.days * 86400 * plan.tokens_per_s == pytest.approx(cfg.steps * 256 * 2048)
    assert plan.gpu_hours == pytest.approx(plan.days * 24 * 64) and plan.price == pytest.approx(3 * plan.gpu_hours)
    half = make_plan(cfg, 64, "h200", 0.25)
    assert half.days == pytest.approx(2 * plan.days) and half.price is None


def test_less_memory_where_it_should_be() -> None:
    cfg = load_recipe("parcae-style-140m")

    def at(**changes: object) -> float:
        changed = dataclasses.replace(cfg, **changes)
        return peak(changed, execution_of(changed), 8).total

    assert at(checkpoint_loops=True) < at() < at(parallel=ParallelConfig(rows=32))
    assert at(loops=LoopsConfig("poisson", 8, backprop_depth=2)) < at() < at(loops=LoopsConfig("poisson", 8))
    assert at(parallel=ParallelConfig("fsdp", rows=16)) < at() < at(dtype="float32")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--gpus", "7"], "--batch-size 256 rows cannot be shared out evenly over --gpus 7"),
        (
            ["--gpus", "4", "--parallel.kind", "fsdp", "--parallel.experts", "8"],
            "--gpus 4 must be a multiple of --parallel.experts 8",
        ),
        (["--mfu", "1.5"], "--mfu 1.5"),
        (["--dtype", "float64"], "use --dtype bfloat16"),
    ],
)
def test_what_cannot_be_is_refused(args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mythos-1b", *args]) == 2
    assert told in capsys.readouterr().err


def test_a_configuration_file_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(load_recipe("ablation-118m").to_yaml())
    assert main(["plan", "--config", str(path), "--gpus", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 117_808_066


def test_the_command_knows_every_card() -> None:
    from typing import get_args, get_type_hints

    from open_mythos.cli.costs import Plan

    assert set(get_args(get_type_hints(Plan)["gpu"])) == set(CARDS)
