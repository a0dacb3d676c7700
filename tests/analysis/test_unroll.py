"""The loop one step at a time against the model's own, and the numbers read off it against one call per depth."""

import pytest
import torch
import torch.nn.functional as F

from open_mythos.analysis.lens import climb_or_jump, read_lens
from open_mythos.analysis.sweep import depth_sweep
from open_mythos.analysis.unroll import begin, unroll
from tests.models import ATTENTIONS, PARTS, random_ids, scaled, tiny, worst

SOME = ("default", "diagonal", "concat", "add", "zero-state", "no-prelude", "no-coda", "two-layers", "no-halting")


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize("part", SOME)
def test_states_are_those_of_a_trace(attn_type: str, part: str) -> None:
    cfg = tiny(attn_type=attn_type, **PARTS[part])
    model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 2, 7)
    # Beyond max_loop_iters, where the index stays.
    trace = model(ids, 6, exit="fixed", trace=True)
    states = unroll(model, ids, 6)
    assert worst(states.hidden[1:], trace.hidden) < 1e-12
    assert worst(states.hidden[0], begin(model, ids)[0]) < 1e-12


def test_noise_of_the_first_state_is_that_of_a_call() -> None:
    cfg = tiny(initial_state="normal")
    model, ids = scaled(cfg), random_ids(cfg, 2, 5)
    assert worst(unroll(model, ids, 3).hidden[1:], model(ids, 3, exit="fixed", trace=True).hidden) < 1e-5


def test_training_mode_comes_back() -> None:
    cfg = tiny(dropout=0.5)
    model, ids = scaled(cfg).train(), random_ids(cfg, 1, 5)
    first = unroll(model, ids, 3).hidden
    assert model.training and worst(first, unroll(model, ids, 3).hidden) == 0


def test_a_plain_transformer_is_refused() -> None:
    cfg = tiny(recurrent_layers=0)
    with pytest.raises(ValueError, match="recurrent_layers=0"):
        begin(scaled(cfg), random_ids(cfg, 1, 3))


def test_what_a_call_refuses_is_refused() -> None:
    cfg = tiny()
    for ids in (random_ids(cfg, 1, cfg.max_seq_len + 1), torch.tensor([[cfg.vocab_size]])):
        with pytest.raises(ValueError, match=r"max_seq_len|vocab_size"):
            unroll(scaled(cfg), ids)


def test_lens_is_what_each_depth_would_answer() -> None:
    cfg = tiny()
    model, ids = scaled(cfg), random_ids(cfg, 2, 7)
    where = torch.rand(2, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    lens = read_lens(model, ids, 5, where, n_top=3)
    with torch.no_grad():
        answers = [model(ids, n, exit="fixed")[where].double().log_softmax(-1) for n in range(1, 6)]
    assert lens.target.tolist() == answers[-1].argmax(-1).tolist()
    for n, log_p in enumerate(answers, 1):
        order = log_p.argsort(-1, descending=True)
        ranks = [1 + order[i].tolist().index(int(token)) for i, token in enumerate(lens.target)]
        assert lens.rank[n].tolist() == ranks
        assert lens.top[n].tolist() == order[:, :3].tolist()
        assert worst(lens.entropy[n], -(log_p.exp() * log_p).sum(-1)) < 1e-5
        assert worst(lens.log_p[n], log_p.gather(-1, lens.target[:, None])[:, 0]) < 1e-5


def test_the_lens_without_coda_sees_one_token() -> None:
    cfg = tiny()
    model, ids = scaled(cfg), random_ids(cfg, 1, 5)
    last = unroll(model, ids, 3).hidden[-1]
    expected = model.head(model.norm(last[:, 2])).double().log_softmax(-1).amax(-1)
    where = torch.arange(5)[None] == 2
    assert worst(read_lens(model, ids, 3, where, coda=False).log_p[-1], expected) < 1e-6


def test_sweep_is_the_loss_of_each_depth() -> None:
    cfg = tiny()
    model, ids = scaled(cfg), random_ids(cfg, 2, 7)
    labels = random_ids(cfg, 2, 7, seed=1)
    labels[:, ::3] = -100
    sweep = depth_sweep(model, ids, labels, 6)
    with torch.no_grad():
        at = [model(ids, n, exit="fixed")[labels != -100].double() for n in range(1, 7)]
    right = labels[labels != -100]
    reference = at[cfg.max_loop_iters - 1]
    assert sweep.reference == cfg.max_loop_iters and sweep.loops.tolist() == [1, 2, 3, 4, 5, 6]
    for i, logits in enumerate(at):
        assert sweep.loss[i].item() == pytest.approx(F.cross_entropy(logits, right).item(), rel=1e-5)
        assert sweep.accuracy[i].item() == pytest.approx((logits.argmax(-1) == right).double().mean().item())
        kl = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean")
        assert sweep.kl_to_reference[i].item() == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match="no place to score"):
        depth_sweep(model, ids, torch.full_like(ids, -100))


def test_climbs_jumps_and_wanderers_are_told_apart() -> None:
    climb, jump, wander = [16, 8, 4, 3, 2, 1], [16, 16, 16, 16, 16, 1], [16, 8, 12, 6, 3, 1]
    there, lost = [2, 1, 1, 1, 1, 1], [16, 8, 4, 2, 2, 2]
    found = climb_or_jump(torch.tensor([climb, jump, wander, wander, there, lost]).T)
    assert (found.n_tokens, found.n_moved) == (6, 4)
    assert (found.climb, found.jump, found.wander, found.monotone) == (0.25, 0.25, 0.5, 0.5)
    # Falls of the wanderer in units of log 16: the largest is 3 to 1, the rise 8 to 12.
    largest = torch.tensor([0.25, 1, 0.396, 0.396])
    assert found.largest_drop == pytest.approx(largest.quantile(0.5).item(), abs=1e-3)
    assert found.even_drop == 0.2


def test_the_control_is_the_order_of_the_loops() -> None:
    # Of the 6 orders of 3 different ranks in between one falls all the way; equal ranks are in order in any order.
    once = climb_or_jump(torch.tensor([[16], [8], [4], [2], [1]]), n_orders=2000)
    assert once.monotone == 1 and once.monotone_control[0] == pytest.approx(1 / 6, abs=0.03)
    assert once.largest_drop == pytest.approx(0.25) and once.largest_drop_control[0] > 0.4
    flat = climb_or_jump(torch.tensor([[16], [4], [4], [4], [1]]))
    assert flat.monotone_control == (1, 1, 1)


def test_no_answer_that_moved_gives_no_number() -> None:
    found = climb_or_jump(torch.ones(4, 3, dtype=torch.int64))
    assert found.n_moved == 0 and found.climb != found.climb
