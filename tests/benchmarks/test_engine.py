"""The engine's benchmark: laws, loads that stay full, bounds, and the report."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine.__main__ import Args, cases, main
from benchmarks.engine.bounds import allowed, best_threshold
from benchmarks.engine.fairness import SHALLOW, Crowd
from benchmarks.engine.laws import DEEPEST, LAWS, MEAN, PrescribedDepths, UntilAllAreDone, mean_depth
from benchmarks.engine.load import NEW_TOKENS, Load, mean
from benchmarks.engine.policies import AT_ONCE, DROPPED, POLICIES, REFILL
from benchmarks.engine.reach import REACH
from benchmarks.engine.report import BEGIN, END, render, write_report
from benchmarks.engine.subjects import N_PROMPT, N_PROMPTS
from open_mythos import OpenMythos
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.engine.step_costs import Curve, StepCosts
from open_mythos.nn.halting import LatentDiff
from open_mythos.variants import mythos_200k

COSTS = StepCosts(Curve({1: 1.0, 64: 2.0}), Curve({1: 1.0, 64: 2.0}))
PROMPTS = torch.randint(256, (N_PROMPTS, N_PROMPT), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def model() -> OpenMythos:
    torch.manual_seed(0)
    return OpenMythos(mythos_200k()).eval()


def test_laws() -> None:
    assert mean_depth(LAWS["uniform"]) == (1 + DEEPEST) / 2
    assert mean_depth(LAWS["geometric"]) == pytest.approx(MEAN)
    for law in LAWS.values():
        assert sum(law) == pytest.approx(1)
        assert min(law) > 0
    ratios = {b / a for a, b in zip(LAWS["geometric"][:-2], LAWS["geometric"][1:-1], strict=True)}
    assert max(ratios) == pytest.approx(min(ratios))


@pytest.mark.parametrize("law", LAWS)
def test_depths_are_drawn_by_the_law(law: str) -> None:
    n = 8000
    h = torch.randn(n, 1, 48, generator=torch.Generator().manual_seed(0))
    depths = PrescribedDepths(LAWS[law]).init(h, torch.full((n,), DEEPEST))["depth"].flatten()
    counts = torch.bincount(depths, minlength=DEEPEST + 1)[1:].double()
    expected = torch.tensor(LAWS[law]).double() * n
    # 37.7 is passed once in a thousand by chance, with 15 degrees of freedom.
    assert ((counts - expected) ** 2 / expected).sum() < 37.7
    assert len(counts) == DEEPEST


def test_a_depth_is_the_token_s_own_and_scaling_leaves_it() -> None:
    rule, n_loops = PrescribedDepths(LAWS["uniform"]), torch.full((5,), DEEPEST)
    h = torch.randn(5, 3, 48, generator=torch.Generator().manual_seed(1))
    together = rule.init(h, n_loops)["depth"]
    assert together.unique().numel() > 3
    for i in range(5):
        for j in range(3):
            assert rule.init(3 * h[i : i + 1, j : j + 1], n_loops[:1])["depth"].item() == together[i, j]


def test_prescribed_depths_are_those_run(model: OpenMythos) -> None:
    rule = PrescribedDepths(LAWS["geometric"])
    _, loops = model.generate(PROMPTS, 6, DEEPEST, seed=0, exit=rule, return_loops=True)
    used = [n for row in loops for n in row]
    assert min(used) < 4 < max(used) <= DEEPEST
    _, fewer = model.generate(PROMPTS[0], 6, 2, seed=0, exit=rule, return_loops=True)
    assert set(fewer) == {1, 2}


def test_until_all_are_done() -> None:
    h = torch.ones(3, 1, 4)
    rule = UntilAllAreDone(LatentDiff(0.5))
    state = rule.init(h, torch.full((3,), 9))
    near, far = 1.1, 9.0
    steps = ([near, far, far], [far, near, far], [far, far, near])
    for loop, factors in enumerate(steps):
        h_new = h * torch.tensor(factors)[:, None, None]
        state, exit_mask = rule.update(state, h, h_new, torch.full((3,), loop))
        # Once done stays done; nobody leaves before the last.
        assert exit_mask.tolist() == [[loop == 2]] * 3


def load(model: OpenMythos, rows: int, **options: Any) -> Load:
    params = {"n_loops": DEEPEST, "exit": PrescribedDepths(LAWS["uniform"])}
    return Load(model, PROMPTS, rows, params, costs=COSTS, **options)


def test_policies_that_agree_give_the_tokens_of_generate(model: OpenMythos) -> None:
    answers = []
    for refill in (None, REFILL[DROPPED], REFILL[AT_ONCE]):
        busy = load(model, 5, refill=refill)
        for _ in range(4 * DEEPEST):
            busy.step()  # fails when a row is idle
        answers.append(busy.answers)
    known = set.intersection(*(set(found) for found in answers))
    assert max(known) >= N_PROMPTS
    for number in known:
        tokens, loops = answers[0][number]
        assert answers[1][number] == answers[2][number] == (tokens, loops)
        prompt, rule = PROMPTS[number % N_PROMPTS], PrescribedDepths(LAWS["uniform"])
        options = {"temperature": 1.0, "top_k": None, "return_loops": True}
        alone, depths = model.generate(prompt, len(tokens), DEEPEST, seed=number, exit=rule, **options)
        assert (alone[N_PROMPT:], depths) == (tokens, loops)


def test_a_window_ends_with_a_read_out_and_holds_no_prompt(model: OpenMythos) -> None:
    busy = load(model, 3, refill=REFILL[DROPPED])
    window = busy.window(0.05)
    assert window.tokens == window.depths.total() == 3 * len(window.reading)
    assert sum(window.plain) + sum(window.reading) == pytest.approx(window.cpu)
    assert 1 <= mean(window.depths) <= DEEPEST
    requests = [work.request for work in busy.engine.work.values() if work.row is not None]
    assert [request.n_cached for request in requests] == [N_PROMPT - 1] * 3
    assert {request.params.max_tokens for request in requests} <= set(range(1, NEW_TOKENS + 1))


def test_crowd_counts_turnarounds_in_loop_tokens(model: OpenMythos) -> None:
    engine = Engine(model, config=EngineConfig(32, 64, 32 * 64), costs=COSTS)
    crowd = Crowd(engine, PROMPTS, [SHALLOW] * 32)
    seen = crowd.serve(0.3)[SHALLOW]
    # Nobody waits for a row, and only a client that asks again misses a loop: sharing is perfect.
    assert seen.turnarounds
    assert all(0.9 * crowd.ideal(SHALLOW) < ticks <= crowd.ideal(SHALLOW) for ticks in seen.turnarounds)
    assert min(seen.gaps) > 0


def test_amdahl() -> None:
    assert allowed(16, 4.0, 1.0, 0.0) == 4
    assert allowed(16, 4.0, 1.0, 4.0) == 2.5
    assert allowed(16, 16.0, 3.0, 5.0) == 1


def test_best_threshold() -> None:
    uniform = Counter(dict.fromkeys(range(1, 17), 1))
    linear = Curve({1: 1e-3, 64: 64e-3})
    # Nothing is lost by reading out each row as it comes where rows cost in proportion.
    ratio, at = best_threshold(StepCosts(linear, Curve({1: 1e-9})), uniform, 16, 16)
    assert ratio == pytest.approx(16 / 8.5, rel=0.02)
    # Where a read-out is dear and waiting is free, all wait for all.
    ratio, at = best_threshold(StepCosts(linear, Curve({1: 10.0})), uniform, 16, 16)
    assert at == 16
    assert ratio == pytest.approx(1, rel=0.02)
    flat = StepCosts(Curve({1: 1.0}), Curve({1: 1.0}))
    assert best_threshold(flat, uniform, 16, 16)[0] < allowed(16, 8.5, 1.0, 1.0)


def spread(value: float) -> dict[str, Any]:
    return {"median": value, "min": value, "q1": value, "q3": value, "max": value, "n": 1}


def record(kind: str, **found: Any) -> dict[str, Any]:
    return {
        **found,
        "kind": kind,
        "error": None,
        "date": "2026-01-01",
        "commit": "0123456789",
        "seconds": 60.0,
        "load": [0.5, 1.0],
        "run": {"seconds": 1.0, "rounds": 5},
        "made_by": {"quick": False},
    }


def policies(rows: int, over: float, share: float) -> dict[str, Any]:
    return record(
        "Policies",
        subject="heavy",
        law="geometric",
        rows=rows,
        rates={policy: spread(100.0 * rows) for policy in POLICIES},
        depths=dict.fromkeys(POLICIES, 4.0),
        costs={"1": [1e-3, 2e-3], "64": [2e-3, 4e-3]},
        loop_s=1e-3,
        outer_s=2e-3,
        limit=3.5,
        threshold=2.9,
        threshold_rows=4,
        share=share,
        over_fixed=spread(over),
        best=DROPPED,
        over_best=spread(1.2),
        over_at_once=spread(1.1),
        noise=spread(1.0),
    )


def test_report(tmp_path: Path) -> None:
    found = {"a": policies(8, 2.5, 0.7), "b": policies(64, 3.25, 0.95), "c": record("Modes") | {"error": "Failed: x"}}
    page = tmp_path / "engine.md"
    page.write_text(f"# The engine\n\nBefore.\n\n{BEGIN}\nstale\n{END}\n\nAfter.\n")
    assert write_report({"machine": {}, "cases": found}, tmp_path / "engine") == page
    text = page.read_text()
    assert "stale" not in text
    assert text.startswith("# The engine\n\nBefore.\n")
    assert text.endswith("\nAfter.\n")
    assert "| over fixed depth, loop-heavy, geometric | >= 3 | **2.50** | heavy, geometric, R = 8 |" in text
    assert "no (1 of 2)" in text
    assert "| over the best of (a), (b) and (c) | >= 0.97 | **1.20** |" in text
    assert "No figure for `c`: Failed: x" in text
    assert (tmp_path / "engine" / "throughput.png").stat().st_size > 10_000
    page.write_text("no marks")
    with pytest.raises(ValueError, match="marks"):
        write_report({"machine": {}, "cases": found}, tmp_path / "engine")


def test_report_says_when_it_is_quick() -> None:
    quick = policies(8, 2.5, 0.7) | {"made_by": {"quick": True}}
    assert "No figure here is to be quoted" in render({"machine": {}, "cases": {"a": quick}}, "engine")


def test_reach_is_that_of_the_issue() -> None:
    assert [(reach.text, reach.met(reach.bound)) for reach in REACH] == [
        (">= 0.9", True),
        (">= 3", True),
        (">= 1.5", True),
        (">= 0.97", True),
        ("<= 1.5", True),
    ]
    assert not REACH[-1].met(1.6)
    assert REACH[-1].worst([(1.0, "x"), (1.6, "y")]) == (1.6, "y")


def test_cases_are_named_once_and_unknown_ones_refused(tmp_path: Path) -> None:
    assert len(cases()) == 25 + 3 + 6 + 2
    with pytest.raises(SystemExit, match="begins no case"):
        main(Args(cases=("nothing",), out=tmp_path))
