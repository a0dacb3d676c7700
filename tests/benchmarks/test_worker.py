"""Workers and the coordinator's end, with a tiny model of ours on both sides."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cases.pairs import limit_players, ratio_row, share, trio
from benchmarks.client import Client, WorkerError
from benchmarks.gate import Different
from benchmarks.harness import Bench, Budget, Settings
from benchmarks.job import Job
from benchmarks.products import workload_of
from tests.models import tiny

MODEL = tiny(attn_type="mla").to_dict()
JOBS = {
    "forward": Job("forward", MODEL, rows=2, tokens=7, n_loops=3),
    "train": Job("train", MODEL, rows=2, tokens=7, n_loops=3),
    "depths": Job("train", MODEL, rows=3, tokens=7, depths=(1, 3, 2)),
    "rows": Job("train_rows", MODEL, rows=3, tokens=7, depths=(1, 3, 2)),
    "checkpointed": Job("train", MODEL, rows=2, tokens=7, n_loops=3, checkpoint=True),
    "prefill": Job("prefill", MODEL, rows=2, tokens=7, n_loops=3),
    "decode": Job("decode", MODEL, rows=2, tokens=7, n_loops=3),
    "generate": Job("generate", MODEL, rows=2, tokens=7, n_loops=3, new_tokens=4),
}


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Client]]:
    with Client("ours", 1) as one, Client("ours", 1) as other:
        for client in (one, other):
            for id, job in JOBS.items():
                client.prepare(id, job)
        yield [one, other]


@pytest.fixture
def bench() -> Bench:
    return Bench(Settings(quick=True))


@pytest.mark.parametrize("id", ["forward", "train", "prefill", "decode", "generate"])
def test_two_workers_agree(pair: list[Client], bench: Bench, id: str) -> None:
    one, other = pair
    agreement = bench.gate(one, [other], id)
    loops = 3 * (JOBS[id].new_tokens if id == "generate" else 1)
    assert agreement == {
        "forward": None if id == "generate" else 0.0,
        "gradients": 0.0 if id == "train" else None,
        "loops": loops,
        "seed": 0,
    }


def test_depths_agree_with_rows_alone(pair: list[Client], bench: Bench) -> None:
    one, other = pair
    agreement = bench.gate(one, [other], "depths", reference="rows")
    assert 0 < agreement["gradients"] < 1e-4 and agreement["loops"] is None


def test_gate_refuses_other_weights(pair: list[Client], bench: Bench) -> None:
    one, other = pair
    other.prepare("planted", replace(JOBS["forward"], seed=1))
    with pytest.raises(Different, match="differs by"):
        bench.gate(one, [other], "planted", reference="forward")


def test_gate_refuses_fewer_loops(pair: list[Client], bench: Bench) -> None:
    one, other = pair
    other.prepare("planted", replace(JOBS["generate"], n_loops=2, halt_at=3))
    with pytest.raises(Different):
        bench.gate(one, [other], "planted", reference="generate")


def test_interleaved_times_and_shares(pair: list[Client], bench: Bench) -> None:
    one, other = pair
    work = workload_of(JOBS["forward"])
    with Client("limits", 1) as limits:
        machine, found = limit_players(limits, work, "cpu")
        samples = bench.interleave(trio(one, other, one, "forward") | machine, Budget(0.0, 2, 2))
    assert set(samples.seconds) == {"peer", "ours", "again", "products"}
    n_rounds = len(samples.readings["products"])
    assert {len(values) for clocks in samples.seconds.values() for values in clocks.values()} == {n_rounds}
    assert set(samples.seconds["ours"]) == {"cpu", "wall"} and n_rounds >= 2
    assert len(found["rates"]) == len(work.shapes)
    assert all(min(rates.values()) > 0 for rates in found["rates"])
    row = ratio_row("x", "x", samples)
    assert row.spread is not None and row.noise is not None and row.value == row.spread.median > 0
    # A tiny model is all overhead.
    assert 0 < share(samples, "ours", work) < 0.5


def test_peak_memory(bench: Bench) -> None:
    peak = bench.peak_bytes("ours", JOBS["train"], calls=1)
    assert 0 < peak < 2**30


def test_errors_come_back_and_the_worker_lives_on(pair: list[Client]) -> None:
    one, _ = pair
    with pytest.raises(WorkerError, match="ours: KeyError: 'absent'"):
        one.ask("call", id="absent")
    assert one.ask("hello")["threads"] == 1


def test_a_worker_that_cannot_start_says_why() -> None:
    with Client("nothing", 1) as client, pytest.raises(WorkerError, match="side='nothing' must be one of"):
        client.ask("hello")


def test_a_dead_worker_is_an_error() -> None:
    with Client("ours", 1) as client:
        client.process.kill()
        with pytest.raises(WorkerError, match="died with status"):
            client.ask("hello")


def test_nothing_is_left_behind(pair: list[Client], bench: Bench, repo_root: Path) -> None:
    bench.gate(*([pair[0], [pair[1]]]), "forward")
    assert not [path.name for path in (repo_root / "benchmarks").glob(".gate-*")]
