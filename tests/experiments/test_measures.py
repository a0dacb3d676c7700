"""The measures of each experiment against slow ones, its arms, and the words for its numbers."""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from open_mythos import LoopPlan, OpenMythos
from open_mythos.accounting import count_parameters
from open_mythos.experiments import addition, brackets, khop, parity, stability, verify
from open_mythos.experiments.study import Lab, Run
from open_mythos.recipes import load_recipe
from open_mythos.reports.stats import Estimate
from open_mythos.tasks import Addition, Brackets, Mixed, Parity
from open_mythos.tasks.addition import EQUALS
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE, Batch
from open_mythos.train.config import TrainConfig
from open_mythos.variants import mythos_1b
from tests.models import scaled, tiny

KHOP = load_recipe("tiny-khop")
NARROW = {"vocab_size": 101, "dim": 32, "n_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "n_experts": 4}
TINY = dataclasses.replace(mythos_1b(), **NARROW, expert_dim=8)


def narrow(cfg: TrainConfig) -> OpenMythos:
    return scaled(dataclasses.replace(cfg.model, dim=16))


def test_khop_accuracy_by_loops_is_that_of_separate_calls() -> None:
    model = narrow(KHOP)
    batch = KHOP.data.batch(np.random.default_rng(0), 400)  # no multiple of the rows at once
    named = [model(batch.input_ids, n_loops=n)[:, -1].argmax(-1) for n in (1, 2, 5)]
    batch.labels[:, -1] = named[1]
    expected = [(names == named[1]).double().mean().item() for names in named]
    assert expected[1] == 1 > max(expected[0], expected[2]) > 0
    assert khop.accuracy_by_loops(model, batch, (1, 2, 5)) == pytest.approx(expected, abs=1e-6)


def test_a_plain_model_has_one_answer() -> None:
    plain = khop.plain_baseline(KHOP)
    grid = khop.accuracy_grid(narrow(plain), khop.khop_task(plain), 130, 0, (1, 8), (1,))
    assert [len(row) for row in grid] == [1, 1]


def test_largest_fall_is_that_of_loops_that_suffice() -> None:
    suffices = khop.enough((1, 4), (1, 2, 4, 8))
    assert suffices.tolist() == [[True] * 4, [False, False, True, True]]
    grids = [
        [[0.8, 0.9, 0.9, 1.0], [0.9, 0.1, 0.9, 0.95]],  # 2 loops are too few for 4 hops
        [[0.8, 0.9, 0.7, 0.8], [0.0, 0.0, 0.9, 0.8]],
        [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.9, 0.2]],
    ]
    assert khop.largest_fall(np.array(grids), suffices) == pytest.approx([0, 0.2, 0.7])


def test_reach_ends_where_any_seed_fails() -> None:
    by_hops = np.full((2, 3), 0.95)
    assert khop.reach(by_hops) == 3
    by_hops[1, 1] = 0.5
    assert khop.reach(by_hops) == 1
    by_hops[0, 0] = 0.5
    assert khop.reach(by_hops) == 0


def test_cycles_go_through_all_symbols() -> None:
    ids, successor = khop.cycles(7, 20, np.random.default_rng(0))
    for row, (*table, question) in enumerate(ids.tolist()):
        path = [question]
        while table[path[-1]] != question:
            path.append(table[path[-1]])
        assert sorted(path) == list(range(7)) and path == successor[:, row].tolist()


def test_cycle_accuracy_is_that_of_separate_calls() -> None:
    model = narrow(KHOP)
    measured = khop.cycle_accuracy(model, 24, 150, 3, 30)
    ids, successor = khop.cycles(24, 150, stream(3, 0, Purpose.VALIDATION))
    for loops in (1, 5, 30):
        named = model(ids, n_loops=loops)[:, -1].argmax(-1).numpy()
        for name, hops in (("one_before", loops - 1), ("right", loops), ("one_after", loops + 1)):
            assert measured[name][loops - 1] == pytest.approx((named == successor[hops % 24]).mean(), abs=1e-4)
    assert sum(map(sum, measured.values())) > 0


def test_every_arm_of_khop_can_be_trained_and_asked() -> None:
    configs, quick = khop.arms(quick=False), khop.arms(quick=True)["diagonal"]
    assert configs["diagonal"] == KHOP
    # The quick form comes to the end of its ramp.
    assert quick.loops.ramp_steps < quick.steps < KHOP.steps
    size = {name: count_parameters(cfg.model).total for name, cfg in configs.items()}
    assert abs(size["plain-parameters"] / size["diagonal"] - 1) < 0.1
    assert size["plain-depth"] > 2 * size["diagonal"]
    assert len({(cfg.steps, cfg.batch_size, khop.khop_task(cfg).max_distance) for cfg in configs.values()}) == 1
    for name, cfg in configs.items():
        task = khop.khop_task(cfg)
        assert task.long_chain > khop.DISTANCES[-1] and khop.LOOPS[-1] >= khop.DISTANCES[-1]
        # The farthest that training asks, whatever the arm.
        depths = cfg.loops.depths(0, cfg.steps, 8)
        labels = task.batch(np.random.default_rng(0), 8, depths).labels
        assert labels.ndim == (3 if cfg.losses.per_loop else 2)
        if name.startswith("plain"):
            assert depths.tolist() == [task.max_distance] * 8
            logits = OpenMythos(cfg.model)(torch.zeros(2, task.seq_len, dtype=torch.int64), plan=LoopPlan((1,) * 2))
            assert logits.logits.shape == (2, task.seq_len, task.vocab_size)


def test_parity_grid_is_that_of_separate_calls() -> None:
    cfg = parity.arms(quick=True)["coupled"]
    model = narrow(cfg)
    grid = parity.measure(Run("coupled", cfg, 3, {"rows": 20}, Lab(Path(), True, (3,)), model))["accuracy"]
    batch = Parity(parity.FARTHEST).batch(stream(3, 0, Purpose.VALIDATION), 20)
    for loops in (1, 7, parity.FARTHEST):
        right = (model(batch.input_ids, n_loops=loops).argmax(-1) == batch.labels).double().mean(0)
        assert [row[loops - 1] for row in grid] == pytest.approx(right[1:].tolist(), abs=1e-4)


def test_only_coupled_arms_of_parity_are_asked_no_more_bits_than_loops() -> None:
    for name, cfg in parity.arms(quick=True).items():
        depths = cfg.loops.depths(0, cfg.steps, 4)
        asked = (cfg.data.batch(stream(0, 0, Purpose.DATA), 4, depths).labels != IGNORE).sum(1).tolist()
        assert asked == (depths.tolist() if name in ("coupled", "base100") else [parity.TRAINED] * 4)


def test_rows_that_never_settle_and_balanced_ones_are_left_out() -> None:
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 7, 600) for name in ("nesting", "place", "settled", "kind")}
    added = {"nesting": [6, 6], "place": [-1, 3], "settled": [1, 0], "kind": [0, 0]}
    more = {name: np.append(values, added[name]) for name, values in rows.items()}
    before = brackets.correlations([rows])["raw"].mean
    assert brackets.correlations([more])["raw"].mean == before
    more["settled"][-1] = 1
    assert brackets.correlations([more])["raw"].mean != before


def test_without_variation_there_is_no_correlation() -> None:
    said = brackets.side(Estimate([0.2, float("nan"), 0.3]), "later", "earlier", "no order")
    assert "all rows settle at one loop, as in 1 of 3 seeds" in said
    found = brackets.settling([[5, 1, 0, 3], [5, 0, 0, 0]])
    assert found["settles"].by_seed.tolist() == pytest.approx([2.5, np.nan], nan_ok=True)
    assert found["never"].by_seed.tolist() == [5 / 9, 1]


def test_bracket_rows_are_of_one_length_and_shares_those_of_separate_calls() -> None:
    model = narrow(brackets.arms(quick=True)["sampled"])
    found, n = brackets.by_row(model, 150, seed=2), brackets.LENGTH
    task = Brackets(n, n, 1, n // 2)
    batch = task.encode(*task.draw(stream(2, 0, Purpose.VALIDATION), 150))
    deep, place = np.array(found["rows"]["nesting"]), np.array(found["rows"]["place"])
    assert set(deep[place < 0].tolist()) == set(range(1, n // 2 + 1))
    for loops in (1, brackets.LOOPS):
        said = model(batch.input_ids, n_loops=loops).argmax(-1)
        right = ((said == batch.labels) | (batch.labels == IGNORE)).all(-1).numpy()
        for name, which in (("broken", place >= 0), ("balanced", place < 0)):
            for depth, shares in found["right"][name].items():
                assert shares[loops - 1] == pytest.approx(right[which & (deep == depth)].mean(), abs=1e-4)


def test_tasks_of_the_mixture_are_measured_at_their_longest() -> None:
    cfg = brackets.arms(quick=True)["mixed"]
    assert isinstance(cfg.data, Mixed)
    found = brackets.by_task(narrow(cfg), cfg.data, 60, seed=0)["tasks"]
    assert set(found) == {"parity", "addition", "brackets"}
    assert sum(found["parity"]["settled"]) == sum(found["addition"]["settled"]) == 60
    assert 10 < sum(found["brackets"]["settled"]) < 50
    for task in found.values():
        # What is right after the last loop has settled, and nothing else has.
        assert task["right"][-1] == pytest.approx(1 - task["settled"][0] / sum(task["settled"]), abs=1e-4)


@pytest.mark.parametrize("halting", ["none", "act"])
def test_exact_match_is_that_of_greedy_decoding(halting: str) -> None:
    """One digit, and labels that a model of random weights often gets right: those that it writes itself."""
    model = scaled(tiny(vocab_size=16, max_loop_iters=3, halting=halting))
    ids = Addition(1, 1).batch(np.random.default_rng(0), 60).input_ids
    prompt = ids[:, : (ids[0] == EQUALS).nonzero().item() + 1]

    def written(n_loops: int) -> torch.Tensor:
        return model.generate(prompt, max_new_tokens=2, n_loops=n_loops, temperature=0.0)[:, prompt.shape[1] :]

    # Two tokens of the answer; every third row asks for another token than the model writes.
    answer = written(2).clone()
    answer[::3, 1] = (answer[::3, 1] + 1) % 16
    ids = torch.cat([prompt, answer[:, :1]], dim=1)
    labels = torch.full_like(ids, IGNORE)
    labels[:, -2:] = answer
    right, used = addition.by_loops(model, Batch(ids, labels), (1, 2, 5))
    assert right[1] == pytest.approx(40 / 60)
    for n, share, loops in zip((1, 2, 5), right, used, strict=True):
        assert share == pytest.approx((written(n) == answer).all(-1).double().mean().item())
        assert loops == n if halting == "none" else 1 <= loops <= n


@pytest.mark.parametrize("state", ["e", "zero"])
def test_cosines_are_those_of_separate_calls(state: str) -> None:
    model = scaled(tiny(vocab_size=16, max_loop_iters=3, initial_state=state))
    batch = Addition(2, 2).batch(np.random.default_rng(0), 5)
    where = batch.labels != IGNORE
    with torch.no_grad():
        view = model.make_view((5, batch.input_ids.shape[1]))
        states = [model(batch.input_ids, n, exit="fixed", trace=True).hidden[-1] for n in range(1, 6)]
        states.insert(0, model.encode(batch.input_ids, view))
    expected = [F.cosine_similarity(b[where], a[where], dim=-1).mean().item() for a, b in pairwise(states)]
    got = addition.cosines(model, batch, 5)
    assert len(got) == 5
    if state == "zero":
        assert got.pop(0) is None
        expected.pop(0)
    assert got == pytest.approx(expected, abs=1e-6)


def test_arms_of_addition_differ_in_what_they_are_to_differ_in() -> None:
    def differing(a: TrainConfig, b: TrainConfig) -> set[str]:
        one, other = a.to_dict(), b.to_dict()
        return {key for key in one if one[key] != other[key]}

    whole = addition.arms(quick=False)
    assert differing(whole["sampled"], load_recipe("tiny-addition")) == {"eval"}
    assert differing(whole["sampled"], whole["fixed"]) == {"loops"}
    assert differing(whole["sampled"], whole["deep"]) == {"loops", "model"}
    assert differing(whole["sampled"], whole["four"]) == {"data", "steps"}
    assert differing(addition.published(30_000), load_recipe("addition-dgx")) == {"model", "data", "eval"}
    cfg = whole["published"]
    assert cfg.schedule.warmup_steps / cfg.steps == pytest.approx(2000 / 30_000, rel=1e-3)
    assert (cfg.model.dim, cfg.model.head_dim) == (128, 32)
    for name, quick in addition.arms(quick=True).items():
        assert quick.model == whole[name].model and quick.steps < whole[name].steps / 4


def test_the_click_is_the_first_time_at_the_goal() -> None:
    assert addition.click({"curve": [(100, 0.5), (200, 0.995), (300, 0.9)]}) == 200
    assert addition.click({"curve": [[100, 0.5]]}) is None


def test_problems_met_in_training_are_counted() -> None:
    """100 steps of 128 problems, half of which have 2 digits, against a simulation."""
    drawn = np.random.default_rng(0).integers(0, 8100, 6400)
    expected = len(np.unique(drawn)) / 8100
    assert addition.seen({"steps": 100, "batch_size": 128}, 2) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("four", "most", "says"),
    [
        ([1.0, 1.0], [0.6, 0.61], "collapses"),
        ([1.0, 1.0], [0.998, 0.998], "falls"),
        ([0.9, 0.91], [0.99, 1.0], "rises"),
        ([0.9, 0.9], [0.901, 0.899], "stays"),
        ([0.9, 0.9], [0.7, 1.0], "falls by more than 0.1 in 1 of 2 seeds, too mixed"),
        ([0.4, 0.4], [0.1, 0.1], "has not learned the task"),
        ([1.0], [0.6], "changes by -0.400 in its one run"),
    ],
)
def test_only_a_change_that_is_surely_small_is_none(four: list[float], most: list[float], says: str) -> None:
    assert addition.change(Estimate(four), Estimate(most)).startswith(says)


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
