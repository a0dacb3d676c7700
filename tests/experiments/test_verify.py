"""The verification's parts against references, and what its report says of made-up numbers."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from open_mythos.experiments import verify, verify_report
from open_mythos.experiments.study import Lab
from open_mythos.variants import mythos_1b

TINY = dataclasses.replace(
    mythos_1b(), vocab_size=101, dim=32, n_heads=2, kv_lora_rank=8, q_lora_rank=8, n_experts=4, expert_dim=8
)


def test_published_halting_loses_what_has_not_halted() -> None:
    hidden = torch.ones(3, 1, 3, 2)
    p = torch.tensor([[0.5, 0.1, 0.995], [0.6, 0.1, 0.3], [0.2, 0.1, 0.3]])[:, None]
    out = verify.published_act(hidden, p, 0.99)
    torch.testing.assert_close(out[0, :, 0], torch.tensor([1.0, 0.3, 1.0]))


def test_published_halting_is_ours_where_every_token_halts() -> None:
    model = verify.untrained(TINY, 0, "0.5.0's")
    assert model.recurrent is not None and model.recurrent.act is not None
    with torch.no_grad():
        model.recurrent.act.halt.bias.fill_(0.5)  # all halt at the second loop, so that no state is frozen before
        ids = verify.tokens(TINY, 0, 20)
        hidden = model(ids, exit="fixed", trace=True).hidden
        out = verify.published_act(hidden, model.recurrent.act(hidden), TINY.act_threshold)
        torch.testing.assert_close(model.readout(out, model.make_view((1, 20))), model(ids), rtol=1e-4, atol=1e-5)


def test_free_decay_is_what_runs() -> None:
    injection = verify.FreeLTI(4, 1.5)
    h, e, y = torch.randn(3, 1, 2, 4)
    torch.testing.assert_close(injection.after(h, e, y, injection.get_A()), 1.5 * h + 0.1 * e + y)
    assert {name for name, _ in injection.named_parameters()} == {"A", "B"}


@pytest.mark.parametrize("form", verify.FORMS)
def test_ablation_first_step_is_one_step_of_adam(form: str) -> None:
    run = verify.ablation(form, "free from .95", 0, 2)
    # As published: 1.000 after the first update, a rate of 0.05 away from 0.95 (less AdamW's decay).
    assert run["A"][0] == pytest.approx(1.0, abs=1e-3)
    assert run["loss"][0] == pytest.approx(math.log(512), abs=0.2)
    assert run["gradient"][0] > 0


def test_growth_is_linear_where_nothing_decays() -> None:
    norms = verify.growth(0)["1.0"]
    assert norms[0] == pytest.approx(91, rel=0.02) and norms[7] == pytest.approx(726, rel=0.02)


def test_loops_agree_with_separate_calls() -> None:
    found = verify.loops_matter(TINY, 1, "our")
    model = verify.untrained(TINY, 1)
    ids = verify.tokens(TINY, 1)
    with torch.no_grad():
        reference, logits = model(ids, 16, exit="fixed"), model(ids, 3, exit="fixed")
    same = (reference.argmax(-1) == logits.argmax(-1)).float().mean().item()
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum")
    assert found["last state"][2]["agreement"] == pytest.approx(same)
    assert found["last state"][2]["kl"] == pytest.approx(kl.item() / 128, rel=1e-3)
    assert all(found[output][-1]["kl"] == 0 for output in found)


def test_act_computes_less_and_says_the_same() -> None:
    found = verify.act_saves(TINY, 0, 1)
    used = found["tokens_by_loops"]
    assert sum(used) == 128 and sum(n > 0 for n in used) > 3
    assert found["off"]["token_loops"] == 128 * 16
    assert found["on"]["token_loops"] < found["all computed"]["token_loops"]
    assert found["on"]["difference"] < 1e-4 and found["all computed"]["difference"] < 1e-4


def test_line() -> None:
    assert verify_report.line((1, 2, 3), (3, 5, 7)) == pytest.approx((1, 2, 1))


def test_no_decay_beyond_the_bound() -> None:
    found = verify.spectral_radius(TINY)
    assert found["start"] == pytest.approx([math.exp(-1)] * 2, abs=1e-6)
    assert all(0.99 < most <= 0.99609375 for most in found["most"].values())


def counts(bounded: int, free: int, mended: int) -> dict[str, int]:
    dead = {"published": [bounded, free, free], "mended": [0, mended, mended], "ours": [0] * 3}
    return {f"{form}, {decay}": dead[form][i] for form in dead for i, decay in enumerate(verify.DECAYS)}


@pytest.mark.parametrize(
    ("n", "says"),
    [
        ((0, 5, 5), "as published"),
        ((3, 3, 0), "also with a bounded A"),
        ((0, 3, 0), "only with a free A and 0.5.0's ACT together"),
        ((0, 0, 0), "No run died"),
        ((2, 2, 1), "neither A nor halting alone"),
    ],
)
def test_verdict_follows_from_the_counts(n: tuple[int, int, int], says: str) -> None:
    ablation: dict[str, Any] = {arm: [{}] * 5 for arm in counts(*n)}
    assert says in verify_report._verdict(ablation, counts(*n))
    alone = {arm: runs[:1] for arm, runs in ablation.items()}
    assert "nothing is claimed" in verify_report._verdict(alone, counts(*n))


def test_a_bounded_run_that_died_in_any_form_is_told() -> None:
    ablation: dict[str, Any] = {arm: [{}] * 5 for arm in counts(0, 1, 0)}
    n_dead = counts(0, 1, 0) | {"mended, bounded": 4}
    assert "as published" not in verify_report._verdict(ablation, n_dead)


def test_a_run_without_a_number_is_dead() -> None:
    assert [verify_report.dead({"gradient": [1.0, x]}) for x in (0.0, math.nan, 0.3)] == [True, True, False]


def test_whole_experiment_resumes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "mythos_1b", lambda: TINY)
    monkeypatch.setattr(verify, "ablation", lambda *_: {"A": [0.5] * 60, "loss": [6.3] * 60, "gradient": [0.1] * 60})
    monkeypatch.setattr(verify, "BEYOND", (17, 20))
    lab = Lab(tmp_path, False, (0, 1))
    results = verify.run(lab)
    assert len(results["loops"]["our"]) == len(results["growth"]) == 2

    def again(*_: Any) -> None:
        raise AssertionError("what was measured is measured again")

    for part in ("loops_matter", "growth", "ablation", "latency", "beyond", "act_saves", "spectral_radius"):
        monkeypatch.setattr(verify, part, again)
    assert verify.run(lab) == results
    report = verify.EXPERIMENT.report(results)
    assert "No run died" in report.finding
