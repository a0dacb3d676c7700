"""The whole model against its definition in tests/reference.py: logits, states, weights, exits and gradients."""

import functools
import itertools
import operator

import pytest
import torch

from open_mythos import LoopPlan, OpenMythos
from open_mythos.nn.halting import KL, LatentDiff, SecondDifference
from tests.models import ATTENTIONS, CASES, PARTS, RULES, THRESHOLDS, random_ids, scaled, tiny, worst, worst_of
from tests.reference import Oracle, Token


def expected(model: OpenMythos, ids: torch.Tensor, n_loops: int, exit: str | None) -> tuple[list[Token], float]:
    oracle = Oracle(model, n_loops, exit, THRESHOLDS.get(exit or ""))
    with torch.no_grad():
        return oracle.run(ids[0].tolist()), oracle.margin


@pytest.mark.parametrize(("attn_type", "part"), CASES)
@torch.no_grad()
def test_forward_is_the_definition(attn_type: str, part: str) -> None:
    cfg = tiny(attn_type=attn_type, **PARTS[part])
    model, single = scaled(cfg, dtype=torch.float64), scaled(cfg)
    ids = random_ids(cfg, 1, 7, seed=2)
    split = 0
    for exit, n_loops in [(exit, 6) for exit in RULES] + [(None, 2)]:
        tokens, margin = expected(model, ids, n_loops, exit)
        loops = [token.loops for token in tokens]
        split += len(set(loops)) > 1
        for net, tolerance in ((model, 1e-12), (single, 1e-4)):
            assert net is model or margin > 1e-5, "too near a tie for float32: take another seed"
            trace = net(ids, n_loops, exit=exit, exit_threshold=THRESHOLDS.get(exit or ""), trace=True)
            assert (trace.exit_loop[0] + 1).tolist() == loops
            error = worst(trace.logits[0], torch.stack([token.logits for token in tokens]))
            print(f"logits in {net.dtype} within {error:.1e} of their scale, exit={exit}, {n_loops} loops")
            assert error < tolerance
            assert len(trace.hidden) == max(loops)
            assert (trace.halt_weight.sum(0) - 1).abs().max() < 1e-6
            for i, token in enumerate(tokens):
                states = token.hidden + token.hidden[-1:] * (max(loops) - token.loops)
                assert worst(trace.hidden[:, 0, i], torch.stack(states)) < tolerance
                if exit is None and cfg.halting == "act":
                    assert worst(trace.halt_weight[: token.loops, 0, i], torch.stack(token.weights)) < tolerance
                    assert not trace.halt_weight[token.loops :, 0, i].any()
    assert split, "the comparison means little unless tokens of the row leave the loop at different times"


def loss_of(logits: list[torch.Tensor], extras: list[torch.Tensor | None]) -> torch.Tensor:
    """A number that every logit and every auxiliary loss moves differently."""
    generator = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in logits)
    return total + sum(10 * x for x in extras if x is not None)


def compare_training(cfg_changes: dict, depths: tuple[int, ...], n_grad: int | None, T: int = 5) -> None:
    """One training pass of a batch against its rows alone, token by token, in float64."""
    cfg = tiny(**cfg_changes)
    model = scaled(cfg, dtype=torch.float64).train()
    ids = random_ids(cfg, len(depths), T)
    out = model(ids, plan=LoopPlan(depths, n_grad))
    loss = loss_of(list(out.logits), [out.ponder_cost, out.router_z_loss])

    rows, ponder, z, loads = [], [], [], torch.zeros(cfg.n_experts)
    for row, depth in zip(ids.tolist(), depths, strict=True):
        cut = depth - n_grad if n_grad is not None and n_grad < depth else None
        oracle = Oracle(model, depth, detach_at=cut)
        tokens = oracle.run(row)
        rows.append(torch.stack([token.logits for token in tokens]))
        ponder += [token.loops + token.weights[-1] for token in tokens]
        z.append(oracle.router_z)
        loads += torch.bincount(
            torch.tensor(oracle.loads or [[]], dtype=torch.int64).flatten(), minlength=cfg.n_experts
        )
        assert out.loops[len(rows) - 1].tolist() == [token.loops for token in tokens]
    if n_grad is not None:
        # The loops before the window count in the statistic, but bring no gradient.
        z = [_cut(values, depth, n_grad, cfg.recurrent_layers) for values, depth in zip(z, depths, strict=True)]
    extras = [
        torch.stack(ponder).mean() if cfg.halting == "act" else None,
        torch.stack(functools.reduce(operator.iadd, z, [])).mean() if cfg.n_experts else None,
    ]
    reference = loss_of(rows, extras)
    assert worst(loss, reference) < 1e-12
    if cfg.n_experts:
        assert out.tokens_per_expert.sum(0).tolist() == loads.tolist()

    parameters = list(model.parameters())
    got, want = (torch.autograd.grad(x, parameters, materialize_grads=True) for x in (loss, reference))
    assert worst_of(got, want) < 1e-11


def _cut(values: list[torch.Tensor], depth: int, n_grad: int, layers: int) -> list[torch.Tensor]:
    """Detach the entries of loops before the window; `values` lists the layers of the loops of the tokens in turn."""
    return [x if i // layers % depth >= depth - n_grad else x.detach() for i, x in enumerate(values)]


@pytest.mark.parametrize(("attn_type", "part"), CASES)
def test_gradients_are_those_of_the_definition(attn_type: str, part: str) -> None:
    """Rows of different depths, so also: dropping finished rows changes neither loss nor gradients."""
    compare_training({"attn_type": attn_type, **PARTS[part]}, (3, 5, 4) if part == "min-loops" else (2, 5, 1), None)


@pytest.mark.parametrize("part", ["default", "diagonal", "concat", "add", "zero-state", "two-layers"])
def test_gradients_stop_at_the_window(part: str) -> None:
    """Of rows that joined before, at and after its start; e is reached through the window's loops only."""
    compare_training({"halting": "none", **PARTS[part]}, (2, 6, 1, 3), 2)


@pytest.mark.parametrize("T", [1, 7, 63])
@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_odd_lengths(attn_type: str, T: int) -> None:
    cfg = tiny(attn_type=attn_type)
    model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 1, T)
    tokens, _ = expected(model, ids, 3, None)
    with torch.no_grad():
        assert worst(model(ids, 3)[0], torch.stack([token.logits for token in tokens])) < 1e-12


def test_a_plain_transformer_is_the_definition() -> None:
    for attn_type in ATTENTIONS:
        cfg = tiny(attn_type=attn_type, recurrent_layers=0, prelude_layers=2)
        model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 2, 7)
        logits = model(ids)
        for row in range(2):
            tokens, _ = expected(model, ids[row : row + 1], 1, None)
            assert worst(logits[row], torch.stack([token.logits for token in tokens])) < 1e-12
        out = model(ids, plan=LoopPlan((1, 1)))
        assert torch.equal(out.logits, logits) and out.ponder_cost is None and not out.loops.any()


@pytest.mark.parametrize("part", ["default", "diagonal", "no-halting"])
@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_no_token_sees_a_later_one(attn_type: str, part: str) -> None:
    cfg = tiny(attn_type=attn_type, **PARTS[part])
    model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 2, 9)
    for exit in RULES:
        options = {"exit": exit, "exit_threshold": THRESHOLDS.get(exit or "")}
        before = model(ids, 5, **options)
        for at in (1, 8):
            changed = ids.clone()
            changed[:, at] = (changed[:, at] + 1) % cfg.vocab_size
            after = model(changed, 5, **options)
            assert worst(after[:, :at], before[:, :at]) < 1e-12
            assert worst(after[:, at:], before[:, at:]) > 1e-3
            assert worst(model(ids[:, :at], 5, **options), before[:, :at]) < 1e-12


@torch.no_grad()
def test_more_loops_matter_and_stay_at_the_last_index() -> None:
    cfg = tiny(halting="none")
    model, ids = scaled(cfg), random_ids(cfg, 1, 7)
    assert torch.equal(model(ids), model(ids, cfg.max_loop_iters))
    logits = [model(ids, n) for n in (1, 2, 4, 5, 8)]
    assert all(worst(a, b) > 1e-3 for a, b in itertools.pairwise(logits))
    assert torch.isfinite(model(ids, 100)).all()
    tokens, _ = expected(scaled(cfg, dtype=torch.float64), ids, 9, None)
    assert worst(model(ids, 9)[0], torch.stack([token.logits for token in tokens])) < 1e-5


@pytest.mark.parametrize("threshold", [0.3, 1.0, None])
@torch.no_grad()
def test_halting_of_another_threshold(threshold: float | None) -> None:
    """exit="act" keeps the weighted sum, at the threshold given or the model's own."""
    cfg = tiny()
    model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 1, 7)
    tokens = Oracle(model, 6, "act", threshold).run(ids[0].tolist())
    logits = model(ids, 6, exit="act", exit_threshold=threshold)
    assert worst(logits[0], torch.stack([token.logits for token in tokens])) < 1e-12


@torch.no_grad()
def test_a_rule_may_be_an_object() -> None:
    cfg = tiny()
    model, ids = scaled(cfg), random_ids(cfg, 2, 7)
    for name, rule in (
        ("latent_diff", LatentDiff(0.3)),
        ("second_difference", SecondDifference(0.5)),
        ("kl", KL(0.03, 1, cfg.vocab_size)),
    ):
        assert torch.equal(model(ids, 6, exit=rule), model(ids, 6, exit=name, exit_threshold=rule.threshold))
    with pytest.raises(ValueError, match="exit_threshold"):
        model(ids, exit=LatentDiff(0.3), exit_threshold=0.2)


@torch.no_grad()
def test_stages_compose_to_forward() -> None:
    """encode, recur one loop at a time and readout are forward; and recur takes rows that stand at different loops."""
    for attn_type in ATTENTIONS:
        cfg = tiny(attn_type=attn_type, halting="none")
        model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 3, 7)
        view = model.make_view((3, 7))
        e = h = model.encode(ids, view)
        for t in range(6):
            h = model.recur(h, e, torch.full((3,), t), view)
        assert worst(model.readout(h, view), model(ids, 6)) < 1e-13
        h = torch.randn(3, 7, cfg.dim, dtype=torch.float64)
        index = torch.tensor([3, 0, 9])
        ragged = model.recur(h, e, index, view)
        for row in range(3):
            one = slice(row, row + 1)
            alone = model.recur(h[one], e[one], index[one], model.make_view((1, 7)))
            assert worst(ragged[one], alone) < 1e-13
