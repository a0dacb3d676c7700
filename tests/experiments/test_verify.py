"""The published checks: each part against a reference."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from open_mythos.experiments import stability, verify
from open_mythos.variants import mythos_1b

TINY = dataclasses.replace(
    mythos_1b(), vocab_size=101, dim=32, n_heads=2, kv_lora_rank=8, q_lora_rank=8, n_experts=4, expert_dim=8
)


def test_published_halting_loses_what_has_not_halted() -> None:
    hidden = torch.ones(3, 1, 3, 2)
    p = torch.tensor([[0.5, 0.1, 0.995], [0.6, 0.1, 0.3], [0.2, 0.1, 0.3]])[:, None]
    out = stability.published_act(hidden, p, 0.99)
    torch.testing.assert_close(out[0, :, 0], torch.tensor([1.0, 0.3, 1.0]))


def test_published_halting_is_ours_where_every_token_halts() -> None:
    model = stability.untrained(TINY, 0, "0.5.0's")
    assert model.recurrent is not None and model.recurrent.act is not None
    with torch.no_grad():
        model.recurrent.act.halt.bias.fill_(0.5)  # all halt at the second loop, so that no state is frozen before
        ids = stability.tokens(TINY, 0, 20)
        hidden = model(ids, exit="fixed", trace=True).hidden
        out = stability.published_act(hidden, model.recurrent.act(hidden), TINY.act_threshold)
        torch.testing.assert_close(model.readout(out, model.make_view((1, 20))), model(ids), rtol=1e-4, atol=1e-5)


def test_free_decay_is_what_runs() -> None:
    injection = stability.FreeLTI(4, 1.5)
    h, e, y = torch.randn(3, 1, 2, 4)
    torch.testing.assert_close(injection.after(h, e, y, injection.get_A()), 1.5 * h + 0.1 * e + y)
    assert {name for name, _ in injection.named_parameters()} == {"A", "B"}


@pytest.mark.parametrize("form", stability.FORMS)
def test_ablation_first_step_is_one_step_of_adam(form: str) -> None:
    run = stability.ablation(form, "free from .95", 0, 2)
    # As published: 1.000 after the first update, a rate of 0.05 away from 0.95 (less AdamW's decay).
    assert run["A"][0] == pytest.approx(1.0, abs=1e-3)
    assert run["loss"][0] == pytest.approx(math.log(512), abs=0.2)
    assert run["gradient"][0] > 0


def test_growth_is_linear_where_nothing_decays() -> None:
    norms = stability.growth(0)["1.0"]
    assert norms[0] == pytest.approx(91, rel=0.02) and norms[7] == pytest.approx(726, rel=0.02)


def test_loops_agree_with_separate_calls() -> None:
    found = verify.loops_matter(TINY, 1, "our")
    model = stability.untrained(TINY, 1)
    ids = stability.tokens(TINY, 1)
    with torch.no_grad():
        reference, logits = model(ids, 16, exit="fixed"), model(ids, 3, exit="fixed")
    same = (reference.argmax(-1) == logits.argmax(-1)).float().mean().item()
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum")
    assert found["last state"][2]["agreement"] == pytest.approx(same)
    assert found["last state"][2]["kl"] == pytest.approx(kl.item() / 128, rel=1e-3)
    assert all(found[output][-1]["kl"] == 0 for output in found)


def test_act_computes_less_and_says_the_same() -> None:
    found = verify.act_saves(TINY, 0)
    used = found["tokens_by_loops"]
    assert sum(used) == 128 and sum(n > 0 for n in used) > 3
    assert found["off"]["token_loops"] == 128 * 16
    assert found["on"]["token_loops"] < found["all computed"]["token_loops"]
    assert found["on"]["difference"] < 1e-4 and found["all computed"]["difference"] < 1e-4


def test_line() -> None:
    assert verify.line((1, 2, 3), (3, 5, 7)) == pytest.approx({"start": 1, "slope": 2, "r2": 1})


def test_no_decay_beyond_the_bound() -> None:
    found = stability.spectral_radius(32)
    assert found["start"] == pytest.approx([math.exp(-1)] * 2, abs=1e-6)
    assert all(0.99 < most <= 0.99609375 for most in found["most"].values())


def test_a_run_without_a_number_is_dead() -> None:
    assert stability.dead(np.array([[1.0, 0.0], [1.0, math.nan], [1.0, 0.3]])).tolist() == [True, True, False]
