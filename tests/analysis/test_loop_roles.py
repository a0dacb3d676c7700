"""The split of a change into function and state, and interventions, against loops run by hand."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import OpenMythos
from open_mythos.analysis.loop_roles import LoopRoles, across, interventions, loop_roles, run_loops, split, update
from tests.models import random_ids, scaled, tiny

BARE = {"loop_embedding": False, "lora_rank": 0}
LAST_STATE = {"halting": "none"}
SPLIT = ("delta", "function", "function_before", "function_after", "state", "state_before", "state_after")


def ids(model: OpenMythos, rows: int = 3, tokens: int = 7) -> Tensor:
    return random_ids(model.cfg, rows, tokens)


@torch.no_grad()
def by_hand(model: OpenMythos, input_ids: Tensor, order: list[int]) -> Tensor:
    """Logits after loops under these indices, each with a view that has seen nothing."""
    shape = (input_ids.shape[0], input_ids.shape[1])
    h = e = model.encode(input_ids, model.make_view(shape))
    for index in order:
        h = model.recur(h, e, torch.full((shape[0],), index), model.make_view(shape))
    return model.readout(h, model.make_view(shape))


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("changes", [{}, LAST_STATE, {"injection": "concat", "initial_state": "normal"}], ids=str)
def test_the_usual_order_is_the_model(attn_type: str, changes: dict[str, Any]) -> None:
    model = scaled(tiny(attn_type=attn_type, **changes), dtype=torch.float64)
    with torch.no_grad():
        expected = model(ids(model), n_loops=5, trace=True)
        run = run_loops(model, ids(model), range(5))
    torch.testing.assert_close(run.logits, expected.logits)
    for k, h in enumerate(run.states[1 : 1 + len(expected.hidden)]):
        torch.testing.assert_close(h, expected.hidden[k])
    if model.recurrent.act is not None:
        assert 0 < expected.exit_loop.min() + 1 < expected.exit_loop.max() + 1, "tokens should leave at various loops"


@pytest.mark.parametrize("injection", ["lti", "diagonal", "concat", "add"])
@pytest.mark.parametrize("halting", ["act", "none"])
@torch.no_grad()
def test_the_parts_add_up_to_the_change(injection: str, halting: str) -> None:
    model = scaled(tiny(injection=injection, halting=halting), dtype=torch.float64)
    run = run_loops(model, ids(model), range(4))
    for t in range(3):
        early, late = ([update(model, run, k, index) for index in (t, t + 1)] for k in (t, t + 1))
        parts = split((early[0], early[1]), (late[0], late[1]))
        torch.testing.assert_close(late[1], run.states[t + 2] - run.states[t + 1], rtol=0, atol=1e-13)
        for whole in (
            parts["function"] + parts["state"],
            parts["function_after"] + parts["state_before"],
            parts["function_before"] + parts["state_after"],
        ):
            torch.testing.assert_close(whole, late[1] - early[0], rtol=0, atol=1e-13)
        assert parts["function"].norm() > 0.01 * parts["delta"].norm()


@torch.no_grad()
def test_norms_are_those_of_loops_run_by_hand() -> None:
    model = scaled(tiny(**LAST_STATE), dtype=torch.float64)
    where = torch.zeros(3, 7, dtype=torch.bool)
    where[:, 4:] = True
    roles = loop_roles(model, ids(model), 4, where, shuffles=1)
    e = model.encode(ids(model), model.make_view((3, 7)))
    h = [e]

    def F(h: Tensor, t: int) -> Tensor:
        return model.recur(h, e, torch.full((3,), t), model.make_view((3, 7)))

    for t in range(4):
        h.append(F(h[-1], t))
    norm = lambda x: x[:, 4:].flatten(1).norm(dim=1)  # noqa: E731
    u = [h[t + 1] - h[t] for t in range(4)]
    unit = (norm(u[1]) + norm(u[2])) / 2
    before, after = F(h[1], 2) - F(h[1], 1), F(h[2], 2) - F(h[2], 1)
    expected = {
        "delta": norm(u[2] - u[1]) / unit,
        "function_before": norm(before) / unit,
        "function_after": norm(after) / unit,
        "function": norm(before + after) / 2 / unit,
        "state": norm(u[2] - u[1] - (before + after) / 2) / unit,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(roles, name)[:, 1], value)
    torch.testing.assert_close(roles.other[:, 1, 3], norm(F(h[1], 3) - F(h[1], 1)) / norm(u[1]))
    torch.testing.assert_close(roles.step[:, 2], norm(u[2]) / norm(h[3]))


@pytest.mark.parametrize("changes", [{}, LAST_STATE, {"injection": "diagonal"}], ids=str)
def test_null_control(changes: dict[str, Any]) -> None:
    """Without parts that see the index: no function part, and no order but the usual one."""
    model = scaled(tiny(**BARE, **changes))
    roles = loop_roles(model, ids(model), 5)
    for zero in (roles.function, roles.function_before, roles.function_after, roles.other, roles.distinct):
        assert zero.nan_to_num().abs().max() < 1e-6
    assert roles.share.nan_to_num().max() < 1e-6
    for name in ("swap", "shuffle"):
        assert roles.kl[name].abs().max() < 1e-6 and roles.changed[name].max() == 0
    assert roles.state.nan_to_num().max() > 0.1
    # Each loop is the same, so which one is left out or run twice makes no difference either.
    for name in ("skip", "repeat"):
        assert (roles.kl[name] - roles.kl[name][:, :1]).abs().max() < 1e-6 < roles.kl[name].max()
    assert (roles.kl["more"] - roles.kl["repeat"]).abs().max() < 1e-6


@pytest.mark.parametrize("planted", [0, 2, 3])
@pytest.mark.parametrize("part", ["lora", "embedding"])
def test_a_planted_loop_is_found(planted: int, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop 2 of 5 gets a function of its own; it stands out, and nothing else does."""
    model = scaled(tiny(max_loop_iters=5, **(BARE | {"lora_rank": 4} if part == "lora" else BARE), **LAST_STATE))
    if part == "lora":
        scale = model.recurrent.lora.scale.weight
        with torch.no_grad():
            scale[torch.arange(5) != planted] = 0
    else:
        constants = model.recurrent.constants
        waves = torch.zeros(5, model.cfg.dim)
        waves[planted, :8] = 4.0
        monkeypatch.setattr(
            model.recurrent, "constants", lambda h: dataclasses.replace(constants(h), loop_embeddings=waves)
        )
    roles = loop_roles(model, ids(model, 6), 5)
    touching = [t in (planted - 1, planted) for t in range(4)]
    for values in (roles.function, roles.kl["swap"]):
        assert (values[:, touching] > 1e-4).all()
        assert values[:, [not x for x in touching]].abs().max() < 1e-6
    others = [t for t in range(5) if t != planted]
    assert (roles.distinct[:, planted] > 0.01).all() and roles.distinct[:, others].max() < 1e-6


@pytest.mark.parametrize("name", ["skip", "repeat", "swap", "shuffle", "more"])
def test_interventions_are_loops_run_by_hand(name: str) -> None:
    model = scaled(tiny(**LAST_STATE))
    where = torch.zeros(3, 7, dtype=torch.bool)
    where[:, -2:] = True
    roles = loop_roles(model, ids(model), 4, where, shuffles=3, seed=5)
    expected_orders = {
        "skip": [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]],
        "repeat": [[0, 0, 1, 2, 3], [0, 1, 1, 2, 3], [0, 1, 2, 2, 3], [0, 1, 2, 3, 3]],
        "swap": [[1, 0, 2, 3], [0, 2, 1, 3], [0, 1, 3, 2]],
        "shuffle": interventions(4, 3, 5)["shuffle"],
        "more": [[0, 1, 2, 3, 4]],
    }
    usual = by_hand(model, ids(model), [0, 1, 2, 3])[:, -2:].log_softmax(-1)
    for i, order in enumerate(expected_orders[name]):
        other = by_hand(model, ids(model), order)[:, -2:].log_softmax(-1)
        kl = (usual.exp() * (usual - other)).sum(-1).mean(1)
        torch.testing.assert_close(roles.kl[name][:, i].float(), kl, rtol=1e-4, atol=1e-5)
        moved = (usual.argmax(-1) != other.argmax(-1)).float().mean(1)
        torch.testing.assert_close(roles.changed[name][:, i].float(), moved)


def test_shuffles_are_orders_but_the_usual() -> None:
    drawn = interventions(3, 50, 0)["shuffle"]
    assert {tuple(order) for order in drawn} == {(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}


@torch.no_grad()
def test_an_order_under_act_is_a_model_with_its_rows_in_that_order() -> None:
    """ACT counts loops that ran; only what the block sees of the index is moved."""
    model = scaled(tiny(loop_embedding=False))
    order = [2, 0, 3, 1]
    got = run_loops(model, ids(model), order).logits
    scale = model.recurrent.lora.scale.weight
    scale.copy_(scale[order].clone())
    torch.testing.assert_close(got, model(ids(model)), rtol=1e-4, atol=1e-5)


def test_rows_do_not_depend_on_each_other() -> None:
    model = scaled(tiny(n_experts=0))
    both, alone = (loop_roles(model, x, 4, shuffles=2) for x in (ids(model), ids(model)[1:2]))
    for name in (*SPLIT, "other", "step", "cosine"):
        torch.testing.assert_close(getattr(both, name)[1:2], getattr(alone, name), rtol=1e-3, atol=1e-4, equal_nan=True)


def test_saved_roles_come_back() -> None:
    model = scaled(tiny())
    roles = loop_roles(model, ids(model), 6)
    assert roles.delta.isnan().any(), "some row should have no token left in its last loops"
    again = LoopRoles.from_dict(roles.to_dict())
    for name in (*SPLIT, "other"):
        torch.testing.assert_close(getattr(again, name), getattr(roles, name), rtol=1e-3, atol=0, equal_nan=True)
    torch.testing.assert_close(again.kl["skip"], roles.kl["skip"], rtol=1e-3, atol=0)


def test_what_cannot_be_measured_is_refused() -> None:
    model = scaled(tiny())
    with pytest.raises(ValueError, match="n_loops"):
        loop_roles(model, ids(model), 1)
    with pytest.raises(ValueError, match="where has shape"):
        loop_roles(model, ids(model), 4, torch.zeros(3, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="recurrent_layers=0"):
        loop_roles(scaled(tiny(recurrent_layers=0)), random_ids(tiny(), 2, 3))


def test_intervals_of_one_model_are_over_sequences_and_of_several_over_seeds() -> None:
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = SimpleNamespace(step=x), SimpleNamespace(step=x + 1)
    one, several = across([first], "step"), across([first, second], "step")  # ty: ignore[invalid-argument-type]
    assert one.mean.tolist() == pytest.approx(x.mean(0).tolist())
    assert (one.high - one.low).tolist() == pytest.approx((2 * 1.96 * x.std(0) / 30**0.5).tolist(), rel=0.2)
    assert several.mean.tolist() == pytest.approx((x.mean(0) + 0.5).tolist())
    # Student's t at one degree of freedom, times the standard error of values that differ by 1.
    assert (several.high - several.low).tolist() == pytest.approx([12.706] * 2)
