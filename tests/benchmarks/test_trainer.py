"""The cases of the trainer itself, on a smaller variant than they are run on."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.case import Case
from benchmarks.cases import alone
from benchmarks.harness import Bench, Settings
from benchmarks.job import Job
from benchmarks.models import THREE_M, as_published
from benchmarks.sides import trainer
from benchmarks.worker import Worker
from open_mythos.config import MythosConfig
from open_mythos.variants import mythos_3m


@pytest.fixture
def job(tmp_path) -> Job:
    arguments = {"variant": "200k", "steps": 3, "checkpoint_every": 1, "folder": str(tmp_path)}
    return Job("run", rows=2, tokens=8, n_loops=2, arguments=arguments)


def test_a_run_saves_and_reads_its_own_timers(job: Job) -> None:
    task = trainer.WholeRun(job)
    run = task.fresh()
    task.run(run)
    assert sorted(path.name for path in (run.out_dir / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    # Saving a model after every step of a few milliseconds costs more than nothing, and less than all.
    assert 0 < task.measured["overhead"] < 1


def test_muon_is_a_part_of_a_step(job: Job) -> None:
    task = trainer.Steps(job)
    before = task.run_on.model.prelude[0].attn.wo.weight.clone()
    for _ in range(2):
        task.run(task.fresh())
    assert task.step == 2 and 0 < task.measured["muon"] < 1
    assert not before.equal(task.run_on.model.prelude[0].attn.wo.weight)


class Here(Worker):
    """A worker without a process."""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        return getattr(self, do)(**arguments)


def test_cases_make_rows(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(Settings(quick=True))
    monkeypatch.setattr(bench, "workers", lambda *sides: contextlib.nullcontext([Here(side, 1) for side in sides]))
    steps = replace(job, task="steps", arguments={"variant": "200k", "batches": [1, 2]})
    outcome = alone.muon_share(Case("muon_30m", "a share", alone.muon_share, steps), bench)
    assert [row.id for row in outcome.rows] == ["muon_30m.1", "muon_30m.2"]
    assert all(0 < row.value < 1 for row in outcome.rows) and outcome.sides["2 rows"]["tokens_per_s"] > 0
    own, against = alone.overhead(Case("overhead_3m", "a share", alone.overhead, job), bench).rows
    assert 0 < own.value < 1 and against.value > 0 and against.noise is not None


def test_shapes_of_variants_have_the_mathematics_of_0_5() -> None:
    cfg = MythosConfig(**THREE_M)
    assert (cfg.dim, cfg.n_experts, cfg.injection, cfg.halting, cfg.lora_rank) == (256, 8, "lti", "act", 16)
    assert as_published(mythos_3m()) == THREE_M
