"""The fast products against torch's own: `linear`, the five ways through the experts, causal attention in blocks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.nn.mlp import Expert
from open_mythos.ops import experts
from open_mythos.ops.causal_attention import CausalAttention
from open_mythos.ops.linear import Linear, linear
from tests.models import worst, worst_of

SIZES = [(1, 7, 63), (63, 1, 7), (300, 96, 80), (2048, 64, 33)]
"""Rows, inputs, outputs; the last two are large enough for oneDNN."""


@pytest.mark.parametrize(("M", "K", "N"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear(M: int, K: int, N: int, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    x, weight = (torch.randn(*s).to(dtype).requires_grad_() for s in ((3, M, K), (N, K)))
    direction = torch.randn(3, M, N).to(dtype)
    out, expected = linear(x, weight), F.linear(x, weight)
    assert worst(out, expected) < tolerance and out.dtype == dtype
    grads = [torch.autograd.grad((y * direction).sum(), (x, weight)) for y in (out, expected)]
    assert worst_of(*grads) < tolerance
    with torch.no_grad():
        assert worst(linear(x, weight), expected) < tolerance


@pytest.mark.parametrize("shape", [(1, 1, 48), (3, 48), (2, 4, 48), (9, 48)])
@torch.no_grad()
def test_linear_inside_a_compiler(shape: tuple[int, ...]) -> None:
    """Few rows become a sum; the last shape has one too many."""
    torch._dynamo.reset()
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(33, 48, dtype=torch.float64)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert worst(compiled(x, weight), F.linear(x, weight)) < 1e-12
    assert worst(compiled(x.mT.contiguous().mT, weight), F.linear(x, weight)) < 1e-12


@pytest.mark.parametrize("layout", ["transposed", "slice", "transposed slice", "every second"])
def test_linear_takes_any_layout(layout: str) -> None:
    base = torch.randn(700, 700)
    weight = {
        "transposed": base.T,
        "slice": base[:, :512],
        "transposed slice": base[:512].T,
        "every second": base[::2],
    }[layout]
    for x in (torch.randn(40, weight.shape[1]), torch.randn(weight.shape[1], 40).T):
        assert worst(linear(x, weight), F.linear(x, weight)) < 1e-5


def test_linear_has_a_second_derivative() -> None:
    x, weight = torch.randn(300, 96, requires_grad=True), torch.randn(80, 96, requires_grad=True)
    grads = []
    for f in (linear, F.linear):
        (dx,) = torch.autograd.grad(f(x, weight).square().sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(dx.square().sum(), (x, weight)))
    assert worst_of(*grads) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
def test_linear_under_function_transforms_and_forward_mode() -> None:
    x, weight = torch.randn(300, 96), torch.randn(80, 96)
    f = lambda w: linear(x, w).square().sum()  # noqa: E731
    assert worst(torch.func.grad(f)(weight), 2 * (x @ weight.T).T @ x) < 1e-5
    _, change = torch.func.jvp(lambda w: linear(x, w), (weight,), (weight,))
    assert worst(change, x @ weight.T) < 1e-5


def test_maps_of_one_input_are_separate() -> None:
    module = Linear(16, 3, 5, 7)
    x = torch.randn(2, 4, 16)
    for part, weight in zip(module.split(x), module.weight.split((3, 5, 7)), strict=True):
        assert worst(part, x @ weight.T) < 1e-6


@pytest.mark.parametrize("dim", [7, 96])
def test_expert_gradients(dim: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        expert = Expert(dim, 2 * dim + 1).to(dtype)
        x = torch.randn(3, 150, dim, dtype=dtype, requires_grad=True)
        leaves = [x, *expert.parameters()]
        gate, up = expert.gate_up.weight.chunk(2)
        plain = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), expert.down.weight)
        direction = torch.randn_like(plain)
        grads = [torch.autograd.grad((y * direction).sum(), leaves) for y in (expert(x), plain)]
        assert worst(expert(x), plain) < tolerance and worst_of(*grads) < tolerance


def routed(n: int, dtype: torch.dtype, E: int = 6, C: int = 2, D: int = 48, width: int = 40) -> tuple[Tensor, ...]:
    """x, chosen, gates, gate_up, down; the last expert is chosen by nobody."""
    chosen = torch.rand(n, E - 1).topk(C).indices
    x, gates = torch.randn(n, D, dtype=dtype), torch.rand(n, C, dtype=dtype)
    weights = torch.randn(E, 2 * width, D, dtype=dtype) / D**0.5, torch.randn(E, D, width, dtype=dtype) / width**0.5
    return x, chosen, gates, *weights


def one_token_at_a_time(x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for token, own, scales in zip(x, chosen.tolist(), gates, strict=True):
        y = torch.zeros_like(token)
        for expert, scale in zip(own, scales, strict=True):
            gate, up = (gate_up[expert] @ token).chunk(2)
            y = y + scale * (down[expert] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("n", [1, 7, 63])
@pytest.mark.parametrize(
    "way",
    [
        experts.by_group,
        experts.all_experts,
        experts.by_pair,
        experts.by_gather,
        experts.by_expert,
        experts.by_expert_together,
    ],
)
@torch.no_grad()
def test_every_way_through_the_experts(way: object, n: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x, chosen, gates, *weights = routed(n, dtype)
        assert worst(way(x, chosen, gates, tuple(weights)), one_token_at_a_time(x, chosen, gates, *weights)) < tolerance


@torch.no_grad()
def test_compiled_code_reads_the_chosen_experts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as that is less than to read every expert once."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(experts, "by_gather", lambda *args: "gather")
    monkeypatch.setattr(experts, "all_experts", lambda *args: "all")
    weights = torch.ones(6, 448, 320), torch.ones(6, 320, 224)
    ways = [experts.routed_experts(torch.ones(n, 320), torch.zeros(n, 2, dtype=int), None, weights) for n in (1, 2, 3)]
    assert ways == ["gather", "gather", "all"]


@pytest.mark.parametrize("n", [1, 7, 63, 400])
def test_gradients_of_experts_one_by_one(n: int) -> None:
    """By x, by the gates and by both weights; an expert without tokens has zeros, not what its memory held before."""
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        x, chosen, gates, *weights = routed(n, dtype)
        leaves = [t.requires_grad_() for t in (x, gates, *weights)]
        direction = torch.randn_like(x)
        outs = (
            experts._OneByOne.apply(x, chosen, gates, *weights),
            one_token_at_a_time(x, chosen, gates, *weights),
        )
        grads = [torch.autograd.grad((out * direction).sum(), leaves, retain_graph=True) for out in outs]
        assert worst_of(*grads) < tolerance
        assert not grads[0][2][-1].any() and not grads[0][3][-1].any()
        second = [
            torch.autograd.grad(torch.autograd.grad((out * direction).sum(), x, create_graph=True)[0].sum(), leaves[2:])
            for out in outs
        ]
        assert worst_of(*second) < tolerance


@pytest.mark.parametrize(("T", "H", "G", "K", "W"), [(1, 2, 1, 6, 4), (63, 4, 2, 8, 8), (300, 4, 4, 24, 16)])
def test_causal_attention_in_blocks(T: int, H: int, G: int, K: int, W: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        q, k, v = (torch.randn(2, T, n, w, dtype=dtype, requires_grad=True) for n, w in ((H, K), (G, K), (G, W)))
        own = torch.arange(H) * G // H
        scores = 0.3 * torch.einsum("bthk,bshk->bhts", q, k[:, :, own])
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        expected = torch.einsum("bhts,bshw->bthw", scores.softmax(-1), v[:, :, own])
        out = CausalAttention.apply(q, k, v, 0.3)
        direction = torch.randn_like(out)
        grads = [torch.autograd.grad((y * direction).sum(), (q, k, v)) for y in (out, expected)]
        assert worst(out, expected) < tolerance and worst_of(*grads) < tolerance
