"""Halting rules against plain Python on one token, and ACT's weights at the extremes."""

import math

import pytest
import torch
from torch import Tensor, nn

from open_mythos import ACTHalting, MythosConfig, OpenMythos
from open_mythos.nn.halting import ACT, Exit, HaltingRule, make_rule
from tests.models import random_ids, scaled, tiny, worst

NAMES = ("fixed", "act", "latent_diff", "second_difference", "kl")
THRESHOLDS = {"fixed": None, "act": 0.9, "latent_diff": 0.6, "second_difference": 0.7, "kl": 0.2}
V = 11
CFG = tiny(vocab_size=V)


def path(n_loops: int, B: int, T: int, D: int) -> Tensor:
    """States (n_loops + 1, B, T, D) that settle at a pace of their own for every token."""
    pace = 0.5 + 0.6 * torch.rand(B, T, 1)
    steps = torch.randn(n_loops + 1, B, T, D) * pace ** torch.arange(n_loops + 1).view(-1, 1, 1, 1)
    return steps.cumsum(0).double()


def plain(
    name: str, states: list[list[float]], p: list[float], probe: list[list[float]], n: int, min_loops: int
) -> int:
    """The loop (counted from one) at which one token exits."""

    def norm(x: list[float]) -> float:
        return math.sqrt(sum(v * v for v in x))

    def minus(a: list[float], b: list[float]) -> list[float]:
        return [x - y for x, y in zip(a, b, strict=True)]

    def softmax(x: list[float]) -> list[float]:
        total = sum(map(math.exp, x))
        return [math.exp(v) / total for v in x]

    threshold, near_before, total = THRESHOLDS[name], False, 0.0
    for t in range(1, n):
        total += p[t - 1]
        step = minus(states[t], states[t - 1])
        if name == "act":
            done = total >= threshold
        elif name == "latent_diff":
            done = norm(step) / norm(states[t]) < threshold
        elif name == "second_difference":
            change = minus(step, minus(states[t - 1], states[t - 2])) if t > 1 else [math.inf]
            near = norm(change) / norm(states[t]) < threshold
            done, near_before = near and near_before, near
        elif name == "kl":
            now = softmax(probe[t])
            done = (
                t > 1 and sum(a * math.log(a / b) for a, b in zip(now, softmax(probe[t - 1]), strict=True)) < threshold
            )
        else:
            done = False
        if done and t >= min_loops:
            return t
    return n


class Given(nn.Module):
    """Halting probabilities that are simply there."""

    def __init__(self, p: Tensor) -> None:
        super().__init__()
        self.p, self.loop = p, 0

    def forward(self, h: Tensor) -> Tensor:
        self.loop += 1
        return self.p[self.loop - 1]


def drive(rule: HaltingRule, states: Tensor, n_loops: Tensor, probe: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Exit loops (counted from one) and weights (L, B, T) of tokens whose states are given."""
    state, weights = rule.init(states[0], n_loops), []
    active, loops = torch.ones(states.shape[1:3], dtype=torch.bool), torch.zeros(states.shape[1:3], dtype=torch.int64)
    for t in range(int(n_loops.max())):
        rows = {"h": states[t], "n_loops": n_loops, "out": torch.zeros_like(states[t])}
        exit = Exit(rule, lambda _, t=t: None if probe is None else probe[t + 1])
        _, state, out, weight = exit.apply(rows, state, states[t + 1], torch.full_like(n_loops, t), active)
        loops += active
        weights.append(torch.zeros(loops.shape) if weight is None else weight)
        active = active & ~out
    assert not active.any()
    return loops, torch.stack(weights)


@pytest.mark.parametrize("min_loops", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_rules_are_the_plain_ones(name: str, min_loops: int) -> None:
    B, T, D = 3, 63, 5
    n_loops = torch.tensor([9, 4, 1])
    states, p = path(9, B, T, D), torch.rand(9, B, T) * 0.6
    probe = states @ torch.randn(D, V).double()
    rule = make_rule(name, THRESHOLDS[name], min_loops, CFG, None) if name != "act" else ACT(Given(p), 0.9, min_loops)
    loops, _ = drive(rule, states, n_loops, probe)
    for b in range(B):
        for t in range(T):
            expected = plain(
                name, states[:, b, t].tolist(), p[:, b, t].tolist(), probe[:, b, t].tolist(), int(n_loops[b]), min_loops
            )
            assert int(loops[b, t]) == expected
    assert name == "fixed" or len(loops[0].unique()) > 2


@pytest.mark.parametrize("name", NAMES)
def test_state_can_be_indexed_by_rows(name: str) -> None:
    """An engine may drop and reorder rows between loops: what a rule says of a row does not change."""
    act = ACTHalting(5, 4).double()
    nn.init.normal_(act.halt.weight)
    states, probe = path(6, 4, 7, 5), torch.randn(7, 4, 7, V).double()
    rule = make_rule(name, THRESHOLDS[name], 1, CFG, act)
    n_loops, rows = torch.tensor([6, 3, 5, 2]), torch.tensor([2, 0])
    full = rule.init(states[0], n_loops)
    for t in range(3):
        full, *_ = rule.update(full, states[t], states[t + 1], torch.full((4,), t), probe[t])
    some = {key: x[rows] for key, x in full.items()}
    index = torch.tensor([3, 3, 3, 3])
    after, done = rule.update(full, states[3], states[4], index, probe[4])
    some_after, some_done = rule.update(some, states[3][rows], states[4][rows], index[rows], probe[4][rows])
    assert torch.equal(done[rows], some_done)
    if rule.weighted:
        weight, some_weight = rule.weigh(full, after, done), rule.weigh(some, some_after, some_done)
        assert worst(weight[rows], some_weight) < 1e-14


def probabilities(n_loops: int) -> Tensor:
    """(L, 1, T): constant from 1e-9 to 1 - 1e-9 and the exact ends, then random over that range loop by loop."""
    exponent = torch.linspace(-9, math.log10(0.5), 40, dtype=torch.float64)
    low = 10**exponent
    constant = torch.cat((low, 1 - low, torch.tensor([0.0, 1.0], dtype=torch.float64)))
    drawn = 10 ** torch.empty(n_loops, 60, dtype=torch.float64).uniform_(-9, 0)
    drawn = torch.where(torch.rand(n_loops, 60) < 0.5, drawn, 1 - drawn)
    return torch.cat((constant.expand(n_loops, -1), drawn), 1)[:, None]


@pytest.mark.parametrize("min_loops", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_sum_to_one(dtype: torch.dtype, min_loops: int) -> None:
    """n_loops 1 to 64, halting probabilities 1e-9 to 1 - 1e-9, states in float32 and bf16."""
    largest = 0.0
    for n_loops in range(1, 65):
        p = probabilities(n_loops).float()
        states = torch.zeros(n_loops + 1, 1, p.shape[2], 1, dtype=dtype)
        for threshold in (0.99, 1.0):
            _, weights = drive(ACT(Given(p), threshold, min_loops), states, torch.tensor([n_loops]))
            assert weights.dtype == torch.float32 and (weights >= 0).all()
            largest = max(largest, float((weights.sum(0) - 1).abs().max()))
    print(f"largest |sum of weights - 1| in {dtype}, min_loops={min_loops}: {largest:.1e}")
    assert largest < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_weights_of_a_model_sum_to_one(dtype: torch.dtype) -> None:
    cfg = tiny(n_experts=0, dim=16)
    model, ids = scaled(cfg, dtype=dtype), random_ids(cfg, 1, 9)
    for n_loops in (1, 2, 3, 17, 64):
        for gain, p in ((0.0, 1e-9), (0.0, 0.01), (0.0, 1 - 1e-6), (8.0, 0.3), (50.0, 0.01)):
            nn.init.normal_(model.recurrent.act.halt.weight, std=gain)
            nn.init.constant_(model.recurrent.act.halt.bias, math.log(p / (1 - p)))
            trace = model(ids, n_loops, trace=True)
            assert trace.halt_weight.dtype == torch.float32
            assert (trace.halt_weight.sum(0) - 1).abs().max() < 1e-6
            assert torch.isfinite(trace.logits).all()


def expected_depth(dim: int) -> float:
    cfg = MythosConfig(
        vocab_size=64,
        dim=dim,
        n_heads=4,
        n_kv_heads=4,
        attn_type="gqa",
        prelude_layers=1,
        coda_layers=1,
        n_experts=4,
        n_experts_per_tok=1,
        n_shared_experts=1,
        expert_dim=64,
    )
    with torch.no_grad():
        trace = OpenMythos(cfg)(random_ids(cfg, 1, 16), trace=True)
    weights = trace.halt_weight
    return float((weights * torch.arange(1, len(weights) + 1)[:, None, None]).sum(0).mean())


def test_expected_depth_at_initialisation_does_not_depend_on_width() -> None:
    narrow, wide = expected_depth(64), expected_depth(2048)
    print(f"expected depth of a fresh model, 16 loops: dim 64 {narrow:.4f}, dim 2048 {wide:.4f}")
    assert abs(narrow - wide) < 0.1 * wide
    assert 1 < wide < 16


def test_fresh_halting_is_one_in_max_loops() -> None:
    for max_loops, p in ((1, 0.5), (2, 0.5), (16, 1 / 16), (4096, 1 / 4096)):
        assert ACTHalting(8, max_loops)(torch.randn(1, 3, 8))[0, 0].item() == pytest.approx(p, rel=1e-5)


def test_halting_is_wide() -> None:
    """Probabilities are float32 from bf16 states and weights, under autocast too: 1e-4 must not vanish against 1."""
    act = ACTHalting(8, 10_000).to(torch.bfloat16)
    h = torch.randn(1, 3, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = act(h)
    assert act(h).dtype == under_autocast.dtype == torch.float32
    assert torch.equal(act(h), under_autocast)
    assert act.double()(h.double()).dtype == torch.float64


def test_kl_needs_its_probe() -> None:
    rule = make_rule("kl", None, 1, CFG, None)
    h = torch.zeros(1, 1, 5)
    with pytest.raises(ValueError, match="probe"):
        rule.update(rule.init(h, torch.tensor([3])), h, h, torch.tensor([0]))
