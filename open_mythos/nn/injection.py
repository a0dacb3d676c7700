"""How the prelude's output e enters every loop: u = before(h, e), y = core(u), h' = after(h, e, y).

| name     | before                          | after                              | source                      |
|----------|---------------------------------|------------------------------------|-----------------------------|
| lti      | h + e (normalised by the block) | A*h + B*e + y, A diagonal in (0,1) | OpenMythos                  |
| diagonal | A*h + dt*(B e), B a matrix      | y                                  | Parcae, arXiv 2604.12946    |
| concat   | W [h; e]                        | RMSNorm(y)                         | Huginn, arXiv 2502.05171    |
| linear   | W [h; e]                        | y                                  | Huginn's released model     |
| add      | h + e                           | y                                  | ablation                    |
| none     | h                               | y                                  | Ouro, arXiv 2510.25741      |

Two results serve all loops of a call: `prepare(e)`, which takes the place of e in both functions, and `get_A()`, the
decay that both receive.

Shapes: h, e, y and u are (B, T, D).
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import INJECTIONS, MythosConfig
from open_mythos.nn.layer_costs import Execution, InjectionCosts, saved_bytes
from open_mythos.nn.norm import RMSNorm
from open_mythos.ops.linear import Linear, linear
from open_mythos.ops.precision import as_dtype, at_least_float32

A_MAX = 1 - 2**-8
"""Largest decay. It is exact in bf16, fp16 and float32, so no cast can round it up to one."""

# The margin of 1e-4 (4e-7 in A) keeps the rounding of two exponentials below A_MAX in every kernel and dtype.
_LOW = math.log(-math.log(A_MAX)) + 1e-4
_HIGH = math.log(16.0)


class _Bounded(torch.autograd.Function):
    """Limits x to [_LOW, _HIGH]. At a limit only the gradient that leads back inside passes, so a channel can return.

    Written out because clamp drops both directions, and clamp-and-detach arithmetic is inf - inf at infinity.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(_LOW, _HIGH)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        (x,), (grad,) = ctx.saved_tensors, grads  # ty: ignore[missing-attribute]
        # A descent step moves x by -grad, so at the lower limit a positive gradient leads out.
        leads_out = ((x <= _LOW) & (grad > 0)) | ((x >= _HIGH) & (grad < 0))
        return grad.masked_fill(leads_out, 0)


def bounded_decay(a: Tensor, b: Tensor) -> Tensor:
    """Return A = exp(-exp(a + b)) in (1e-7, A_MAX], in at least float32; opposite infinities add up to 0."""
    a, b = at_least_float32(a), at_least_float32(b)
    exponent = (a + b).masked_fill(a.isinf() & (a == -b), 0)
    return torch.exp(-torch.exp(_Bounded.apply(exponent)))


class Injection(nn.Module):
    """Base class of injections, with the defaults of one without parameters: the block works on h + e.

    Made from the width D. An injection may also have a static `costs(dim)`; without it its costs are measured.
    """

    normalises_input = False
    """True if the block's input passes an RMSNorm of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def get_A(self) -> Tensor | None:
        """Return the decay of each channel (D,), in at least float32; None where there is none."""
        return None

    def prepare(self, e: Tensor) -> Tensor:
        """Return what takes the place of e in every loop of a call."""
        return e

    def before(self, h: Tensor, e: Tensor, decay: Any) -> Tensor:
        """Return the block's input u."""
        return h + e

    def after(self, h: Tensor, e: Tensor, y: Tensor, decay: Any) -> Tensor:
        """Return the next state, from the block's output y."""
        return y


class LTIInjection(Injection):
    """h' = A*h + B*e + y with A = exp(-exp(log_A + log_dt)) per channel; A = exp(-1) at initialisation."""

    normalises_input = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.log_A = nn.Parameter(torch.empty(dim))
        self.log_dt = nn.Parameter(torch.empty(1))
        self.B = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.log_A)
        nn.init.zeros_(self.log_dt)
        nn.init.constant_(self.B, 0.1)

    def get_A(self) -> Tensor:
        """Return the decay of each channel, (D,), in at least float32 and at most 0.99609375."""
        return bounded_decay(self.log_A, self.log_dt)

    @staticmethod
    def costs(dim: int) -> InjectionCosts:
        """Return the counts of log_A, log_dt, B and the norm's gain, and the bytes saved for their gradients."""

        def saved(execution: Execution) -> float:
            # The state, and what the norm of the block's input reads.
            return execution.state_bytes * dim + execution.state_bytes * dim + execution.state_bytes

        return InjectionCosts(
            vectors=3 * dim + 1, saved_once=lambda execution: execution.state_bytes * dim, saved=saved
        )

    def after(self, h: Tensor, e: Tensor, y: Tensor, decay: Any) -> Tensor:
        kept = torch.addcmul(at_least_float32(y), decay, at_least_float32(h))
        return as_dtype(torch.addcmul(kept, at_least_float32(self.B), at_least_float32(e)), h.dtype)


class DiagonalInjection(Injection):
    """The block works on A*h + dt*(B e): A = exp(-dt * exp(A_log)) and dt = softplus(dt_bias) per channel, B a matrix.

    Initialised to A = sqrt(1/5) and B the identity. Source: Prairie et al. 2026, arXiv 2604.12946.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.A_log = nn.Parameter(torch.empty(dim))
        self.dt_bias = nn.Parameter(torch.empty(dim))
        self.B = nn.Parameter(torch.empty(dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        dt = -math.log(math.sqrt(1 / 5))
        nn.init.zeros_(self.A_log)
        nn.init.constant_(self.dt_bias, math.log(math.expm1(dt)))
        with torch.no_grad():
            # Not nn.init.eye_, which on the meta device imports a computer algebra system: see NoDraws.
            self.B.zero_().fill_diagonal_(1)

    def get_A(self) -> Tensor:
        """Return the decay of each channel, (D,), in at least float32 and at most 0.99609375."""
        bias = at_least_float32(self.dt_bias)
        # log(softplus(x)) tends to x, where softplus itself underflows to log 0.
        log_dt = torch.where(bias < -20, bias, F.softplus(bias.clamp(min=-20)).log())
        return bounded_decay(log_dt, self.A_log)

    @staticmethod
    def costs(dim: int) -> InjectionCosts:
        """Return the counts of B, A_log and dt_bias, and the bytes saved for their gradients."""
        return InjectionCosts(
            prepared=dim * dim,
            vectors=2 * dim,
            saved_once=lambda execution: 2 * execution.value_bytes * dim,
            saved=lambda execution: execution.state_bytes * dim,
        )

    def prepare(self, e: Tensor) -> Tensor:
        return F.softplus(at_least_float32(self.dt_bias)) * linear(e, self.B)

    def before(self, h: Tensor, e: Tensor, decay: Any) -> Tensor:
        return as_dtype(torch.addcmul(at_least_float32(e), decay, at_least_float32(h)), h.dtype)


class LinearInjection(Injection):
    """The block works on W [h; e]. Source: Geiping et al. 2025, arXiv 2502.05171, as released."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.adapter = Linear(2 * dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.adapter.weight, std=math.sqrt(2 / (5 * self.adapter.out_features)))

    @staticmethod
    def costs(dim: int) -> InjectionCosts:
        """Return the counts of the adapter's halves, and the bytes of the state saved for their gradients."""
        return InjectionCosts(
            prepared=dim * dim,
            per_loop=dim * dim,
            saved_once=lambda execution: execution.value_bytes * dim,
            saved=lambda execution: execution.value_bytes * dim,
            narrows=True,
        )

    def prepare(self, e: Tensor) -> Tensor:
        return linear(e, self.adapter.weight[:, e.shape[-1] :])

    def before(self, h: Tensor, e: Tensor, decay: Any) -> Tensor:
        return linear(h, self.adapter.weight[:, : h.shape[-1]]) + e


class ConcatInjection(LinearInjection):
    """The block works on W [h; e], and its output is normalised. Source: Geiping et al. 2025, arXiv 2502.05171."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.norm = RMSNorm(dim)

    @staticmethod
    def costs(dim: int) -> InjectionCosts:
        """Return the adapter's costs, the count of the norm, and the bytes of what it reads."""
        adapter = LinearInjection.costs(dim)

        def saved(execution: Execution) -> float:
            return adapter.saved(execution) + execution.value_bytes * dim + execution.state_bytes

        return dataclasses.replace(adapter, vectors=dim, saved=saved)

    def after(self, h: Tensor, e: Tensor, y: Tensor, decay: Any) -> Tensor:
        return self.norm(y)


class AddInjection(Injection):
    """The block works on h + e: the plainest injection, without parameters."""

    @staticmethod
    def costs(dim: int) -> InjectionCosts:
        return InjectionCosts()


class NoInjection(AddInjection):
    """The block works on the state alone. Source: Zhu et al. 2025, arXiv 2510.25741."""

    def before(self, h: Tensor, e: Tensor, decay: Any) -> Tensor:
        return h

    @staticmethod
    def costs(dim: int) -> InjectionCosts:
        return InjectionCosts()


INJECTIONS.update(lti=LTIInjection, diagonal=DiagonalInjection, concat=ConcatInjection, add=AddInjection)
INJECTIONS.update(linear=LinearInjection, none=NoInjection)


def injection_costs(cfg: MythosConfig) -> InjectionCosts:
    """Return the costs of the injection; one that states none is built without values, and autograd says what it saves.

    Its matrices then count as used in every loop, and the state as one of the residual stream's dtype.
    """
    kind, D = INJECTIONS[cfg.injection], cfg.dim
    if "costs" in vars(kind):
        return kind.costs(D)
    with torch.device("meta"):
        parameters = list(kind(D).parameters())

    def run(injection: nn.Module, h: Tensor) -> Tensor:
        assert isinstance(injection, Injection)
        e, decay = torch.empty_like(h, requires_grad=True), injection.get_A()
        return injection.after(h, e, injection.before(h, e, decay), decay)

    def saved(execution: Execution) -> float:
        # So many tokens that what does not depend on them no longer counts.
        wide = dataclasses.replace(execution, value_bytes=execution.state_bytes)
        return saved_bytes(lambda: kind(D), run, (1, 1024, D), wide) / 1024

    return InjectionCosts(
        per_loop=sum(p.numel() for p in parameters if p.ndim > 1),
        vectors=sum(p.numel() for p in parameters if p.ndim < 2),
        saved_once=lambda execution: execution.state_bytes * D,
        saved=saved,
    )
