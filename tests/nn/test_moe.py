"""The mixture of experts against a loop over tokens and experts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from open_mythos import Expert, MoEFFN
from open_mythos.nn.inputs import make_view
from open_mythos.ops.grouped_linear import grouped_linear
from tests import reference
from tests.models import tiny, worst, worst_of


def build(dtype: torch.dtype = torch.float64, **changes: int) -> MoEFFN:
    moe = MoEFFN(tiny(**changes))
    for p in moe.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    nn.init.normal_(moe.router_bias, std=0.3)
    return moe.to(dtype)


def naive(moe: MoEFFN, x: Tensor) -> Tensor:
    w = {**dict(moe.named_parameters()), **dict(moe.named_buffers())}
    return torch.stack([reference.moe(w, row, moe.n_chosen)[0] for row in x.reshape(-1, x.shape[-1])]).reshape(x.shape)


SHAPES = [
    {},
    {"n_experts": 1, "n_experts_per_tok": 1},
    {"n_experts": 3, "n_experts_per_tok": 3, "expert_dim": 7, "n_shared_experts": 0},
    {"n_experts": 9, "n_experts_per_tok": 1, "expert_dim": 16, "n_shared_experts": 3},
]


@pytest.mark.parametrize("n_tokens", [1, 7, 63])
@pytest.mark.parametrize("changes", SHAPES)
def test_values_and_gradients(changes: dict[str, int], n_tokens: int) -> None:
    """float64 loops over the groups, float32 uses one grouped product where the widths are aligned."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        moe = build(dtype, **changes)
        x = torch.randn(n_tokens, 32, dtype=dtype)
        weight = torch.randn(n_tokens, 32, dtype=dtype)
        results = []
        for run, exact in ((moe, False), (naive, True)):
            for p in moe.parameters():
                p.grad = None
            if exact:
                moe, x, weight = moe.double(), x.double(), weight.double()
            x = x.detach().requires_grad_()
            out = run(moe, x) if exact else run(x)
            (out * weight).sum().backward()
            results.append([out, x.grad, *(p.grad for p in moe.parameters())])
        assert worst(results[0][0], results[1][0]) < tolerance
        assert worst_of(results[0][1:], results[1][1:]) < tolerance


def test_grouped_product_with_empty_groups() -> None:
    """Groups of 0, 1, 7 and 63 rows; an expert without tokens has a gradient, and it is zero."""
    counts = torch.tensor([0, 7, 1, 0, 63, 0])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for width in (16, 7):
            x = torch.randn(71, width, dtype=dtype, requires_grad=True)
            weight = torch.randn(6, 12, width, dtype=dtype, requires_grad=True)
            out = grouped_linear(x, weight, counts)
            expected = torch.cat([rows @ w.T for rows, w in zip(x.split(counts.tolist()), weight, strict=True)])
            assert worst(out, expected) < tolerance
            direction = torch.randn_like(out)
            for a, b in zip(
                torch.autograd.grad((out * direction).sum(), (x, weight)),
                torch.autograd.grad((expected * direction).sum(), (x, weight)),
                strict=True,
            ):
                assert worst(a, b) < tolerance
                assert torch.isfinite(a).all()
            (grad,) = torch.autograd.grad(grouped_linear(x, weight, counts).square().sum(), weight)
            assert not grad[counts == 0].any() and grad[counts > 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_expert_without_tokens_has_zero_gradient(dtype: torch.dtype) -> None:
    moe = build(dtype)
    moe.router_bias[2] = -100
    moe(torch.randn(7, 32, dtype=dtype)).sum().backward()
    for p in (moe.experts.gate_up, moe.experts.down):
        assert torch.isfinite(p.grad).all() and not p.grad[2].any() and p.grad[[0, 1, 3]].flatten(1).any(1).all()


def test_bias_shifts_the_choice_only() -> None:
    """Another bias that leads to the same choice gives the same output and gradients, bit for bit."""
    moe, x = build(torch.float32), torch.randn(63, 32)
    results = []
    for shift in (torch.zeros(4), torch.full((4,), 5.0)):
        moe.zero_grad()
        bias = moe.router_bias.clone()
        moe.router_bias += shift
        out = moe(x)
        out.square().sum().backward()
        moe.router_bias.copy_(bias)
        results.append([out, *(p.grad.clone() for p in moe.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    moe.router_bias += torch.tensor([100.0, 100.0, 0, 0])
    gates = (moe.router(x)[:, :2]).softmax(-1)
    experts = [reference_expert(moe, i) for i in (0, 1)]
    expected = sum(gates[:, i : i + 1] * experts[i](x) for i in (0, 1)) + moe.shared(x)
    assert worst(moe(x), expected) < 1e-5


def reference_expert(moe: MoEFFN, i: int) -> Expert:
    expert = Expert(32, 12)
    for linear, weight in ((expert.gate_up, moe.experts.gate_up[i]), (expert.down, moe.experts.down[i])):
        linear.weight = nn.Parameter(weight.detach())
    return expert


def test_far_apart_logits_are_no_nan() -> None:
    """The bias may choose experts whose share of the whole softmax underflows: 0 / 0 if gates were taken from that."""
    moe = build(torch.float32)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:, 0] = torch.tensor([300.0, 200.0, 0.0, -100.0])
        moe.router_bias.copy_(torch.tensor([-1000.0, -1000.0, 0, 0]))
    x = torch.randn(5, 32)
    x[:, 0] = 1
    out = moe(x)
    out.sum().backward()
    assert torch.isfinite(out).all() and all(torch.isfinite(p.grad).all() for p in moe.parameters())


def test_a_token_does_not_depend_on_the_others() -> None:
    moe, x = build(torch.float64), torch.randn(63, 32, dtype=torch.float64)
    together = moe(x)
    assert worst(torch.cat([moe(row[None]) for row in x]), together) < 1e-13
    shuffled = torch.randperm(63)
    assert worst(moe(x[shuffled]), together[shuffled]) < 1e-13


def test_statistics_count_active_tokens() -> None:
    moe = build(torch.float64)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    active = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    base = make_view((2, 5), 8, 1e4, torch.float64, torch.device("cpu"))
    for mask in (None, active):
        log: list = []
        moe(x, base.at_loop(torch.zeros(2, dtype=torch.int64), active=mask, router_log=log))
        ((z, load),) = log
        rows = x[active] if mask is not None else x.flatten(0, 1)
        logits = rows @ moe.router.weight.T
        chosen = (logits + moe.router_bias).topk(2).indices.flatten()
        assert load.tolist() == torch.bincount(chosen, minlength=4).tolist()
        assert worst(z, logits.exp().sum(-1).log().square().sum()) < 1e-12


def test_shared_experts_are_one_wide_one() -> None:
    moe = build(n_shared_experts=3)
    parts = []
    for part in range(3):
        rows = slice(part * 24, (part + 1) * 24)
        gate, up = (w[rows] for w in moe.shared.gate_up.weight.chunk(2))
        down = moe.shared.down.weight[:, rows]
        parts.append(lambda x, gate=gate, up=up, down=down: reference.swiglu(x, gate, up, down))
    x = torch.randn(32, dtype=torch.float64)
    assert worst(moe.shared(x), sum(f(x) for f in parts)) < 1e-13


def test_bias_stays_float32() -> None:
    moe = MoEFFN(tiny())
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()):
        moe.router_bias.fill_(1.0).add_(1e-4)
        convert(moe)
        assert moe.router_bias.dtype == torch.float32 and float(moe.router_bias[0]) == pytest.approx(1.0001, abs=1e-7)
        assert "router_bias" in dict(moe.named_buffers())
    assert moe.to("meta").router_bias.is_meta


def test_tokens_travel_in_autocasts_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """To spread experts, which are here all with one process."""
    sent = []

    def dispatch_and_combine(
        x: Tensor, chosen: Tensor, gates: Tensor, n: int, group: None, experts: Callable
    ) -> Tensor:
        sent.append(x.dtype)
        return experts(x, chosen, gates)

    monkeypatch.setattr("open_mythos.nn.moe.dispatch_and_combine", dispatch_and_combine)
    moe, x = build(torch.float32), torch.randn(7, tiny().dim)
    with torch.autocast("cpu", torch.bfloat16):
        alone = moe(x)
        monkeypatch.setattr(moe.experts, "group", "some processes")
        assert torch.equal(moe(x), alone)
    moe(x)
    assert sent == [torch.bfloat16, torch.float32]
