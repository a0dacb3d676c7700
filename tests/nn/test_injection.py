"""The four injections against their formulas, and the bound on the decay A for every number a parameter can hold."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from open_mythos.nn.injection import (
    A_MAX,
    AddInjection,
    ConcatInjection,
    DiagonalInjection,
    LTIInjection,
    bounded_decay,
)
from tests import reference
from tests.models import worst, worst_of

BOUND = 0.99609375
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FINITE = (-3e38, -1e4, -88.0, -20.0, -5.6, -1.0, 0.0, 0.7, 3.0, 20.0, 88.0, 1e4, 3e38)
INJECTIONS = {"lti": (LTIInjection, "log_A", "log_dt"), "diagonal": (DiagonalInjection, "A_log", "dt_bias")}
EXPONENTS = [(kind, name) for kind, (_, *names) in INJECTIONS.items() for name in names]


def patterns(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit format, infinities among them, NaN left out."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[~x.isnan()]


def injection(kind: str, name: str, values: Tensor, other: float) -> LTIInjection | DiagonalInjection:
    """One channel per value: `name` holds them, the other parameter of the exponent holds `other`."""
    cls, *names = INJECTIONS[kind]
    module = cls(1)
    for key in names:
        x = values if key == name else torch.full_like(values, other)
        setattr(module, key, nn.Parameter(x.clone()))
    return module


def check_bound(module: LTIInjection | DiagonalInjection) -> float:
    A = module.get_A().detach()
    assert A.dtype == torch.promote_types(next(module.parameters()).dtype, torch.float32)
    assert not A.isnan().any() and (A > 0).all()
    largest = max(float(x.max()) for x in (A, *(A.to(dtype) for dtype in FLOATS)))
    assert largest <= BOUND
    return largest


def test_the_bound_is_exact_in_every_dtype() -> None:
    assert A_MAX == BOUND and all(float(torch.tensor(BOUND, dtype=dtype)) == BOUND for dtype in FLOATS)


@torch.no_grad()
def test_published_value_at_initialisation() -> None:
    for dtype in FLOATS:
        A = LTIInjection(7).to(dtype).get_A()
        assert (A == A[0]).all() and f"{float(A[0]):.6f}" == "0.367879"
        assert abs(float(A[0]) - math.exp(-1)) < 3e-8
    assert worst(DiagonalInjection(7).get_A(), torch.full((7,), math.sqrt(1 / 5))) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
@torch.no_grad()
def test_decay_is_computed_wide(dtype: torch.dtype) -> None:
    """From parameters in 16 bits too: the sum of the two exponents is not rounded to 16 bits."""
    values = torch.linspace(-3, 2, 97).to(dtype)
    for other in (0.013, -1.7):
        lti = injection("lti", "log_A", values, other)
        exponent = values.double() + lti.log_dt.double()
        assert (lti.get_A().double() - torch.exp(-torch.exp(exponent))).abs().max() < 1e-6
        diagonal = injection("diagonal", "A_log", values, other)
        exponent = values.double() + torch.log1p(torch.exp(diagonal.dt_bias.double())).log()
        assert (diagonal.get_A().double() - torch.exp(-torch.exp(exponent))).abs().max() < 1e-6


@pytest.mark.parametrize("held_in", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "name"), EXPONENTS)
@torch.no_grad()
def test_every_16_bit_pattern(kind: str, name: str, held_in: torch.dtype) -> None:
    """Each held in every dtype that can hold it, with the other parameter at finite values over the whole range."""
    values = patterns(held_in)
    assert len(values) == 2**16 - (254 if held_in is torch.bfloat16 else 2046)
    largest = [
        check_bound(injection(kind, name, values.to(dtype), other))
        for dtype in (FLOATS if held_in is torch.float16 else (torch.bfloat16, torch.float32, torch.float64))
        for other in FINITE
        if abs(other) < torch.finfo(dtype).max
    ]
    print(f"{len(values)} patterns of {held_in} as {name}, {len(largest)} ways: largest A {max(largest):.8f}")


def check_float32(kind: str, name: str, n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    largest, n_tried = 0.0, 0
    for _ in range(n // 500_000):
        bits = torch.randint(-(2**31), 2**31, (252_000,), generator=generator).to(torch.int32).view(torch.float32)
        near = torch.empty(250_000).uniform_(-30, 30, generator=generator)
        values = torch.cat((bits[~bits.isnan()], near))
        n_tried += len(values)
        for other in (0.0, -5.0, 2.0):
            largest = max(largest, check_bound(injection(kind, name, values, other)))
    print(f"{n_tried} float32 as {name}: largest A {largest:.8f}")
    # Every float32 around the place where A reaches its bound, with nothing added to it.
    edge = torch.tensor(math.log(-math.log(A_MAX))).view(torch.int32) + torch.arange(-50_000, 50_000)
    assert float(bounded_decay(edge.to(torch.int32).view(torch.float32), torch.zeros(())).max()) <= BOUND


@pytest.mark.parametrize(("kind", "name"), EXPONENTS)
@torch.no_grad()
def test_a_million_float32(kind: str, name: str) -> None:
    check_float32(kind, name, 1_000_000)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), EXPONENTS)
@torch.no_grad()
def test_ten_million_float32(kind: str, name: str) -> None:
    check_float32(kind, name, 10_000_000)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "name"), EXPONENTS)
def test_a_decay_is_a_number_for_every_pair_of_parameters(kind: str, name: str, dtype: torch.dtype) -> None:
    """Infinite ones too, and of opposite signs; what is NaN stays NaN, so that a broken run shows."""
    numbers = [-math.inf, -60000.0, -1.0, 0.0, 2.0, 60000.0, math.inf]
    for other in numbers:
        module = injection(kind, name, torch.tensor(numbers, dtype=dtype), other)
        check_bound(module)
        A = module.get_A()
        A.sum().backward()
        assert not any(p.grad is not None and p.grad.isnan().any() for p in module.parameters()), other
    assert injection(kind, name, torch.full((2,), math.nan, dtype=dtype), 0.0).get_A().isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_leads_back_from_the_bound(dtype: torch.dtype) -> None:
    """At and beyond both limits, infinities too: towards the inside it flows, outwards it is exactly zero."""
    far = [x for x in (5.6, 6.0, 20.0, 1e4, 3e38, math.inf) if x == math.inf or x < torch.finfo(dtype).max]
    for side, x in [(-1, -v) for v in far] + [(1, v) for v in far]:
        for make_loss, wants_smaller_A in ((Tensor.sum, True), (lambda A: -A.sum(), False)):
            module = injection("lti", "log_A", torch.full((3,), x, dtype=dtype), 0.0)
            make_loss(module.get_A()).backward()
            grad = module.log_A.grad
            assert not grad.isnan().any()
            leads_inside = (side < 0) == wants_smaller_A
            if leads_inside:
                # A descent step moves the parameter by -grad: up from the lower limit, down from the upper one.
                assert (grad * side > 0).all()
            else:
                assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_of_the_diagonal_injection_leads_back(dtype: torch.dtype) -> None:
    for name in ("A_log", "dt_bias"):
        for x in (-1e4, -30.0, -8.0, 30.0, 1e4):
            module = injection("diagonal", name, torch.full((3,), x, dtype=dtype), 0.0)
            (module.get_A() if x < 0 else -module.get_A()).sum().backward()
            grad = getattr(module, name).grad
            assert not grad.isnan().any() and (grad * x > 0).all(), (name, x)


@pytest.mark.parametrize("kind", INJECTIONS)
@pytest.mark.parametrize("toward", [-1.0, 1.0])
def test_adam_at_a_thousand_and_back(kind: str, toward: float) -> None:
    """A learning rate that throws every parameter to a limit and beyond; then the way back is open."""
    cls, *names = INJECTIONS[kind]
    module = cls(16)
    optimizer = torch.optim.Adam([getattr(module, name) for name in names], lr=1e3)
    for step in range(60):
        optimizer.zero_grad()
        noise = torch.randn(16) * 0.1 if step % 7 == 0 else 0.0
        ((toward + noise) * module.get_A()).sum().backward()
        optimizer.step()
        check_bound(module)
    A = module.get_A().detach()
    assert (A < 1e-6).all() if toward > 0 else (A > 0.99).all()
    optimizer = torch.optim.Adam([getattr(module, name) for name in names], lr=1e2)
    for _ in range(3000):
        optimizer.zero_grad()
        (module.get_A() - 0.5).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in (getattr(module, name) for name in names))
        if (module.get_A() - A).abs().min() > 0.1:
            break
        optimizer.step()
        check_bound(module)
    assert (module.get_A() - A).abs().min() > 0.1


def lti(m: nn.Module, h: Tensor, e: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return h + e, torch.exp(-torch.exp(m.log_A + m.log_dt)) * h + m.B * e + y


def diagonal(m: nn.Module, h: Tensor, e: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dt = torch.log1p(torch.exp(m.dt_bias))
    return torch.exp(-dt * torch.exp(m.A_log)) * h + dt * (e @ m.B.T), y


def concat(m: nn.Module, h: Tensor, e: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    D = h.shape[-1]
    return h @ m.adapter.weight[:, :D].T + e @ m.adapter.weight[:, D:].T, reference.rms_norm(y, m.norm.weight)


def add(m: nn.Module, h: Tensor, e: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return h + e, y


@pytest.mark.parametrize("T", [1, 7, 63])
@pytest.mark.parametrize(
    ("cls", "formula"),
    [(LTIInjection, lti), (DiagonalInjection, diagonal), (ConcatInjection, concat), (AddInjection, add)],
)
def test_values_and_gradients(cls: type[nn.Module], formula: Callable, T: int) -> None:
    module = cls(9)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        module = module.to(dtype)
        inputs = [torch.randn(2, T, 9, dtype=dtype, requires_grad=True) for _ in "hey"]
        h, e, y = inputs
        prepared, decay = module.prepare(e), module.get_A()
        got = (module.before(h, prepared, decay), module.after(h, prepared, y, decay))
        expected = formula(module.double(), *(x.double() for x in inputs))
        assert max(map(worst, got, expected)) < tolerance
        assert all(x.dtype == dtype for x in got)
        if dtype == torch.float64:
            leaves = [*inputs, *module.parameters()]
            weight = torch.randn(2, T, 9, dtype=dtype)
            grads = [
                torch.autograd.grad(sum((x * x * weight).sum() for x in pair), leaves, materialize_grads=True)
                for pair in (got, expected)
            ]
            assert worst_of(*grads) < 1e-12


def test_state_cannot_grow_at_the_bound() -> None:
    """With A at its bound the linear part gains at most 1 / (1 - A) = 256, however many loops."""
    module = LTIInjection(4)
    nn.init.constant_(module.log_A, -math.inf)
    h = e = torch.ones(1, 1, 4)
    with torch.no_grad():
        for _ in range(5000):
            h = module.after(h, e, torch.zeros_like(h), module.get_A())
    assert float(h.max()) < 256 * 0.1 * 1.01
