"""The loop_roles experiment: its arms, the planted loop's size, and what its report says of made-up numbers."""

import dataclasses

import pytest
import torch

from open_mythos.analysis.loop_roles import LoopRoles, loop_roles
from open_mythos.analysis.loop_roles_section import verdict
from open_mythos.experiments import loop_roles as experiment
from open_mythos.tasks.task import IGNORE
from tests.experiments.test_exits import sharpened


def test_null_controls_differ_in_the_parts_that_see_the_index_alone() -> None:
    arms = experiment.arms(False)
    for name in experiment.TITLES:
        own, null = arms[name], arms[f"{name}-null"]
        assert (own.model.loop_embedding, own.model.lora_rank) == (True, 8)
        assert (null.model.loop_embedding, null.model.lora_rank) == (False, 0)
        assert dataclasses.replace(null, model=own.model) == own
        assert dataclasses.replace(null.model, loop_embedding=True, lora_rank=8) == own.model


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_what_is_planted_has_the_size_asked_for(strength: float) -> None:
    cfg = experiment.arms(False)["diagonal-null"]
    model = sharpened(cfg, 4, dim=16, n_heads=2, n_kv_heads=2, expert_dim=8)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    batch = experiment.questions(cfg, 8, 0)
    planted = experiment.plant(model, batch, 2, strength)
    roles = loop_roles(planted, batch.input_ids, 4, batch.labels != IGNORE)
    assert roles.other[:, 1, 2].mean().item() == pytest.approx(strength, rel=1e-4)
    assert roles.other[:, [0, 1, 3]][:, :, [0, 1, 3]].max() == 0
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def made_up(function: float, state: float, changed: float, n: int = 120, fewer: float = 0.1) -> LoopRoles:
    """Roles at 4 loops with parts of these sizes in every sequence, and this share of answers changed by a shuffle."""
    generator = torch.Generator().manual_seed(0)

    def noisy(mean: float, *shape: int) -> torch.Tensor:
        return mean * (1 + 0.1 * torch.randn(n, *shape, generator=generator, dtype=torch.float64))

    parts = {name: noisy(1.0, 3) for name in ("delta", "cosine")}
    parts |= {name: noisy(function, 3) for name in ("function", "function_before", "function_after")}
    parts |= {name: noisy(state, 3) for name in ("state", "state_before", "state_after")}
    sizes = {"skip": 4, "repeat": 4, "swap": 3, "shuffle": 8, "more": 1}
    return LoopRoles(
        step=noisy(0.5, 4),
        other=noisy(function, 4, 4),
        **parts,
        kl={name: noisy(fewer if name == "skip" else changed, size) for name, size in sizes.items()},
        changed={name: noisy(changed, size) for name, size in sizes.items()},
    )


def test_the_verdict_follows_the_numbers() -> None:
    function = verdict([made_up(1.0, 0.3, 0.4)] * 3)
    assert "from loop 0 to 1, 1 to 2, 2 to 3 mostly because the function differs." in function
    assert "The loops are not interchangeable" in function and "for 0 and 1 and for 1 and 2 and for 2 and 3" in function
    assert "The order of the loops matters more" in function
    state = verdict([made_up(0.3, 1.0, 0.001)] * 3)
    assert "mostly because the state has moved on." in state
    assert "The loops are interchangeable as far as answers go" in state and "for none" in state
    assert "The number of loops matters more than their order" in state
    few = verdict([made_up(0.3, 1.0, 0.0, n=50)])
    assert "is open" in few, "50 sequences without a change do not show that fewer than 1% change"
    open_ = verdict([made_up(0.3, 1.0, 0.0), made_up(1.0, 0.3, 0.03)])
    assert "do not tell" in open_ and "is open" in open_
    assert "nor their order clearly matters more" in verdict([made_up(1.0, 1.0, 0.1)])
    assert "nor their order matters here" in verdict([made_up(1.0, 1.0, 1e-4, fewer=1e-5)])
    assert verdict([made_up(0.0, 1.0, 0.0)]).startswith("No loop has a function of its own")
    alone = verdict([made_up(0.0, 1.0, 0.0, n=1)])
    assert alone.startswith("No loop has a function of its own"), "what is zero needs no interval"


def test_a_broken_control_is_said_so() -> None:
    run = {"seed": 0, "accuracy": 1.0, "roles": made_up(0.2, 1.0, 0.1).to_dict()}
    run["planted"] = {str(strength): dict(run) for strength in experiment.STRENGTHS}
    report = experiment.STUDY.report({"runs": {arm: [run] for arm in experiment.arms(True)}})
    text = "\n".join(map(str, report.parts))
    assert "NOT zero, so the measurement is at fault" in text and "NOT found at every strength" in text


def test_a_control_that_was_not_measured_does_not_pass() -> None:
    zero, lost, one = (made_up(0.0, 1.0, 0.0) for _ in range(3))
    lost.function[:] = torch.nan
    one.kl["swap"][0] = torch.nan
    assert experiment.null([zero])["passed"] == "float error at most"
    for controls in ([zero, lost], [lost, zero], [zero, one], [one, zero]):
        assert "NOT zero" in experiment.null(controls)["passed"]
