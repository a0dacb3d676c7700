"""The cases of exits on a model made here: the timed path against its slow reference, and the arithmetic."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.case import Case
from benchmarks.cases import CASES, exits
from benchmarks.gate import compare
from benchmarks.harness import Bench, Settings
from benchmarks.job import Job
from benchmarks.models import MID
from benchmarks.sides.exits import TASKS, trained
from open_mythos import OpenMythos
from open_mythos.nn.driver import Compaction
from open_mythos.recipes import load_recipe

SMALL = {"dim": 32, "n_heads": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "n_experts": 4, "expert_dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model whose tokens exit at different depths."""
    torch.manual_seed(0)
    model = OpenMythos(dataclasses.replace(load_recipe("adaptive-text").model, **SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    path = tmp_path_factory.mktemp("adaptive") / "final"
    model.save_pretrained(path)
    return str(path)


def job(task: str, folder: str, **changes: object) -> Job:
    arguments = {"folder": folder, "exit": "kl", "exit_threshold": 0.01}
    base = Job(task, rows=3, tokens=9, new_tokens=7, n_loops=8, arguments=arguments)
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("task", ["exits_generate", "exits_prefill"])
@pytest.mark.parametrize("compaction", ["always", "counts"])
def test_the_timed_path_is_its_slow_reference(task: str, compaction: Compaction, folder: str) -> None:
    fast, slow = TASKS[task](job(task, folder)), TASKS[f"{task}_reference"](job(f"{task}_reference", folder))
    for each in (fast, slow):
        each.draw(1)
    block = fast.model.recurrent
    assert block is not None
    assert slow.model.recurrent is block
    fast.fresh()
    assert block.compaction == "counts"
    block.compaction = compaction
    answer = fast.run(None)
    assert len(set(answer["depths"].flatten().tolist())) > 2
    compare(answer, slow.run(slow.fresh()))
    assert block.compaction == "never"


def test_a_missing_model_tells_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mythos train adaptive-text --out"):
        trained(str(tmp_path / "final"), "cpu")


@pytest.mark.parametrize("case", [CASES["exits_generate_b4"], CASES["exits_prefill_b1"]], ids=["generate", "prefill"])
def test_a_case_runs_from_gate_to_rows(case: Case, folder: str) -> None:
    arguments = {**case.job.arguments, "folder": folder}
    short = dataclasses.replace(case.job, rows=2, tokens=16, new_tokens=4, arguments=arguments)
    outcome = case.measure(dataclasses.replace(case, job=short), Bench(Settings(quick=True)))
    assert [row.id for row in outcome.rows] == [case.name, f"{case.name}.allowed", f"{case.name}.loops"]
    assert all(row.value > 0 for row in outcome.rows)
    assert outcome.gate is not None


def test_what_loop_counts_allow() -> None:
    # A prefill of 10 s besides loops of 2 s: at 3 of 8 loops it is 16 s of 26.
    prefill = Job("exits_prefill", n_loops=8)
    assert exits.allowed(prefill, {"full": 26.0, "shallow": 14.0}, {"mean_depth": 3}) == pytest.approx(26 / 16)
    # A prompt of 1 s and loops of 1 s; 2 decoded tokens of 3 s and loops of 1 s with two rows, of 0.75 s with one.
    text = Job("exits_generate", rows=2, new_tokens=3, n_loops=8)
    seconds = {"full": 31.0, "shallow": 13.0, "prompt_full": 9.0, "prompt_shallow": 3.0}
    seconds |= {"decode_1_full": 9.0, "decode_1_shallow": 4.5, "decode_2_full": 11.0, "decode_2_shallow": 5.0}
    # The first new token was read off the prompt, whose loops are counted there.
    reading = {"prompt_depth": 6.0, "depths": [[8, 2, 4], [1, 3, 4]]}
    assert exits.mean_depth(reading) == 3.25
    # Two loops of both rows, one of one, and four of both; then all that went into the rest.
    assert exits.allowed(text, seconds, reading) == pytest.approx(31 / (7 + 6 + 2.75 + 4))
    assert exits.allowed(text, seconds, reading, proportional=True) == pytest.approx(31 / (7 + 6 + 2.5 + 4))


def test_the_recipe_is_the_mid_model_over_bytes() -> None:
    model = load_recipe("adaptive-text").model.to_dict()
    assert {name for name, value in MID.items() if model[name] != value} == {"vocab_size", "rope_theta"}
