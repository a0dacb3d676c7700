"""The engine's benchmark: laws, loads that stay full, bounds, and the report."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.case import Case, Results
from benchmarks.cases import CASES, engine
from benchmarks.cases.engine import OURS
from benchmarks.harness import Bench, Budget, Settings
from benchmarks.job import Job
from benchmarks.page import BEGIN, END
from benchmarks.report import render, write_report
from benchmarks.sides.clients import Arrivals, Crowd
from benchmarks.sides.engine import (
    AT_ONCE,
    DEEPEST,
    DROPPED,
    LAWS,
    MEAN,
    N_PROMPT,
    N_PROMPTS,
    NEW_TOKENS,
    REFILL,
    Load,
    PrescribedDepths,
    UntilAllAreDone,
    mean_depth,
)
from open_mythos.engine.readout_policy import Curve, StepCosts
from open_mythos.nn.halting import LatentDiff
from open_mythos.variants import mythos_200k

COSTS = {"seconds": {1: [1.0, 1.0], 64: [2.0, 2.0]}, "least_rows": 1}
RECORDED = json.loads((Path(__file__).parents[2] / "docs/results/engine/amd-epyc.json").read_text())
MODEL = dataclasses.replace(mythos_200k(), vocab_size=1024).to_dict()


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


def test_prescribed_depths_are_those_run() -> None:
    busy = load(1)
    rule = PrescribedDepths(LAWS["geometric"])
    _, loops = busy.model.generate(busy.prompts, 6, DEEPEST, seed=0, exit=rule, return_loops=True)
    used = [n for row in loops for n in row]
    assert min(used) < 4 < max(used) <= DEEPEST
    _, fewer = busy.model.generate(busy.prompts[0], 24, 2, seed=0, exit=rule, return_loops=True)
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


def job(task: str, rows: int, **arguments: Any) -> Job:
    given = {"law": "uniform", "costs": COSTS, "subject": "heavy", **arguments}
    return Job(task, MODEL, rows=rows, n_loops=DEEPEST, arguments=given)


def load(rows: int, **arguments: Any) -> Load:
    return Load(job("load", rows, **arguments))


def test_policies_that_agree_give_the_tokens_of_generate() -> None:
    loads = [load(5, policy=policy) for policy in ("ours", DROPPED, AT_ONCE)]
    for busy in loads:
        for _ in range(4 * DEEPEST):
            busy.step()  # fails when a row is idle
    answers = [busy.answers() for busy in loads]
    known = set.intersection(*(set(found) for found in answers))
    assert max(known) >= N_PROMPTS
    for number in known:
        tokens, loops = answers[0][number]
        assert answers[1][number] == answers[2][number] == (tokens, loops)
        prompt, rule = loads[0].prompts[number % N_PROMPTS], PrescribedDepths(LAWS["uniform"])
        options = {"temperature": 1.0, "top_k": None, "return_loops": True}
        alone, depths = loads[0].model.generate(prompt, len(tokens), DEEPEST, seed=number, exit=rule, **options)
        assert (alone[N_PROMPT:], depths) == (tokens, loops)
    assert loads[0].check_alone() == ""
    assert REFILL.keys() == {DROPPED, AT_ONCE}


def test_a_window_ends_with_a_read_out_and_contains_no_prompt() -> None:
    busy = load(3, policy=DROPPED, seconds=0.05)
    seconds, window = busy.time(), busy.measured
    assert window["tokens"] == window["depths"].total() == 3 * len(window["reading_s"])
    assert sum(window["looping_s"]) + sum(window["reading_s"]) == pytest.approx(seconds["cpu"] * window["tokens"])
    assert 1 <= engine.mean(window["depths"]) <= DEEPEST
    requests = [seq for seq in busy.busy.sequences.values() if seq.row >= 0]
    assert [request.n_cached for request in requests] == [N_PROMPT - 1] * 3
    assert {request.params.max_tokens for request in requests} <= set(range(1, NEW_TOKENS + 1))


def test_crowd_counts_turnarounds_in_loop_tokens() -> None:
    crowd = Crowd(dataclasses.replace(job("crowd", 32, depths=[1] * 32, seconds=0.3), new_tokens=16))
    crowd.time()
    seen = crowd.measured[1]
    # Nobody waits for a row, and only a client that asks again misses a loop: sharing is perfect.
    assert seen["turnarounds"]
    assert all(0.9 * 16 < ticks <= 16 for ticks in seen["turnarounds"])
    assert min(seen["gaps"]) > 0


def test_arrivals_at_random_are_all_answered() -> None:
    windows = []
    for policy in (OURS, DROPPED):
        task = Arrivals(job("arrivals", 2, law="geometric", share=0.5, requests=3, policy=policy, costs=COSTS))
        seconds = task.time()
        assert len(task.measured["latencies"]) == len(task.measured["answers"]) == 3
        assert all(1 <= len(tokens) <= NEW_TOKENS for tokens, _ in task.measured["answers"].values())
        assert min(task.measured["latencies"]) > 0 < seconds["cpu"]
        windows.append(task.measured["answers"])
    assert windows[0] == windows[1] and sorted(windows[0]) == [0, 1, 2]


def test_the_ideal_is_that_no_row_waits() -> None:
    window = {"depths": Counter({4: 2}), "looping_s": [1.0] * 3, "reading_s": [1.0]}
    assert engine.ideal_share([window], 2) == 1.0
    assert engine.ideal_share([window | {"looping_s": [1.0] * 7}], 2) == 0.5


def small(case: Case, rows: int) -> Case:
    given = dataclasses.replace(case.job, model=MODEL, rows=rows, arguments=case.job.arguments | {"seconds": 0.05})
    return dataclasses.replace(case, job=given)


def test_cases_make_their_records(tmp_path: Path) -> None:
    bench, results = Bench(Settings(quick=True)), Results(tmp_path / "engine" / "zen.json")
    for name in ("engine_geometric_8", "engine_modes_8"):
        outcome = CASES[name].measure(small(CASES[name], 2), bench)
        made = {
            "made_by": {"quick": True, "device": "cpu", "threads": 1},
            "date": "",
            "commit": "",
            "seconds": 1.0,
            "load": [0, 0],
            "title": name,
        }
        results.put(name, (), json.loads(json.dumps(dataclasses.asdict(outcome))) | made | {"error": None})
        assert all(row.value > 0 for row in outcome.rows)
    text = render(results.data, "engine", "zen")
    assert (
        "| over the best of (a), (b) and (c) | >= 0.97 |" in text
        and "batch_invariant on over off, heavy, R = 2" in text
    )


def test_arrivals_are_compared_by_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "WINDOWS", Budget(0.0, 1, 1))
    case = CASES["engine_arrivals_8_50"]
    outcome = case.measure(small(case, 1), Bench(Settings(quick=True)))
    assert len(outcome.rows) == 6 and all(row.value > 0 for row in outcome.rows)


def test_amdahl() -> None:
    assert engine.amdahl(16, 4.0, 1.0, 0.0) == 4
    assert engine.amdahl(16, 4.0, 1.0, 4.0) == 2.5
    assert engine.amdahl(16, 16.0, 3.0, 5.0) == 1


def test_best_threshold() -> None:
    uniform = Counter(dict.fromkeys(range(1, 17), 1))
    linear = Curve({1: 1e-3, 64: 64e-3})
    # Nothing is lost by reading out each row as it comes where rows cost in proportion.
    ratio, at = engine.best_threshold(StepCosts(linear, Curve({1: 1e-9})), uniform, 16, 16)
    assert ratio == pytest.approx(16 / 8.5, rel=0.02)
    # Where a read-out is dear and waiting is free, all wait for all.
    ratio, at = engine.best_threshold(StepCosts(linear, Curve({1: 10.0})), uniform, 16, 16)
    assert at == 16
    assert ratio == pytest.approx(1, rel=0.02)
    flat = StepCosts(Curve({1: 1.0}), Curve({1: 1.0}))
    assert engine.best_threshold(flat, uniform, 16, 16)[0] < engine.amdahl(16, 8.5, 1.0, 1.0)


def spread(value: float) -> dict[str, Any]:
    return {"median": value, "min": value, "q1": value, "q3": value, "max": value, "n": 1}


def record(case: str, value: float, share: float, **changes: Any) -> dict[str, Any]:
    """Take a recorded case with another ratio over fixed depth."""
    found = RECORDED["cases"][case]
    curves = {**found["curves"], "over_fixed": spread(value), "share": share}
    rows = [{**row, "value": {case: value, f"{case}.share": share}.get(row["id"], 1.2)} for row in found["rows"]]
    return {**found, "rows": rows, "curves": curves, **changes}


def test_report(tmp_path: Path) -> None:
    results = Results(tmp_path / "engine" / "zen.json")
    names = ("engine_geometric_8", "engine_geometric_64")
    results.data["cases"] = {
        name: record(name, v, s) for name, v, s in zip(names, (2.5, 3.25), (0.7, 0.95), strict=True)
    }
    results.put("c", (), record(names[0], 1, 1, error="Failed: x", rows=[]))
    page = tmp_path / "engine.md"
    page.write_text(f"# The engine\n\nBefore.\n\n{BEGIN}\nstale\n{END}\n\nAfter.\n")
    assert write_report(tmp_path / "engine") == page
    text = page.read_text()
    assert "stale" not in text and "| 8 requests, geometric depths | **2.50** (" in text
    assert text.startswith("# The engine\n\nBefore.\n")
    assert text.endswith("\nAfter.\n")
    text = (tmp_path / "engine" / "zen.md").read_text()
    assert "| over fixed depth, heavy, geometric | >= 3 | **2.50** | heavy, geometric, R = 8 |" in text
    assert "no (1 of 2)" in text
    assert "| over the best of (a), (b) and (c) | >= 0.97 | **1.20** |" in text
    assert "No figure for `c`: Failed: x" in text
    assert (tmp_path / "engine" / "zen-throughput.png").stat().st_size > 10_000
    page.write_text("no marks")
    with pytest.raises(ValueError, match="marks"):
        write_report(tmp_path / "engine")


def test_reach_is_that_of_the_issue() -> None:
    bounds = {
        reach.text("x")
        for case in CASES.values()
        if case.page == "engine"
        for reach in case.reach.values()
        if reach.met(reach.value)
    }
    assert bounds == {">= 0.9", ">= 3", ">= 1.5", ">= 0.97", "<= 1.5"}
    assert sum(case.page == "engine" for case in CASES.values()) == 25 + 3 + 6 + 4 + 2
