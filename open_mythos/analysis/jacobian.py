"""How the next loop stretches small changes of the state: the largest eigenvalues of its Jacobian.

The products are those of the transpose with a vector (reverse mode), which has the same eigenvalues. Attention is
causal, so the Jacobian over a whole prompt is block-triangular: its eigenvalues are those of every token's own block.

Shapes: T tokens, D width, n = D for one token and T * D for all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.section import Section, Subject, numbers
from open_mythos.analysis.unroll import run, unroll
from open_mythos.checks import check_int
from open_mythos.config import MAX_LOOPS
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.reports.document import Table


@dataclass(frozen=True)
class Spectrum:
    """The outermost eigenvalues that were found."""

    radius: float  # the largest magnitude
    eigenvalues: Tensor  # (k,) complex128, largest magnitude first, k at most 10
    residual: float  # |J^T v - w v| / |w| of the first, |v| = 1: how far it is from an eigenvalue of a matrix nearby
    n_products: int


def spectrum(
    model: OpenMythos,
    input_ids: Tensor,
    n_loops: int | None = None,
    token: int | None = None,
    n_products: int = 120,
    tolerance: float = 1e-3,
) -> Spectrum:
    """Find the outermost eigenvalues of d h_L+1 / d h_L at the state that `n_loops` loops reach.

    Args:
        input_ids: (1, T).
        token: the only token whose state changes; None: all of them.
        n_products: the most products with the Jacobian; fewer if the residual is below `tolerance` before.

    Raises:
        ValueError: several prompts, or no such token.
    """
    if input_ids.ndim == 2 and len(input_ids) != 1:
        raise ValueError(f"input_ids has {len(input_ids)} rows; give one prompt at a time, input_ids[:1]")
    states = unroll(model, input_ids, n_loops, deepest=MAX_LOOPS - 1)
    if token is not None:
        check_int("token", token, 0, input_ids.shape[1] - 1)
    part = slice(None) if token is None else slice(token, token + 1)
    last, index = states.hidden[-1], len(states.hidden) - 1
    with evaluating(model), torch.enable_grad():
        x = last[:, part].detach().requires_grad_()
        h = x if token is None else torch.cat([last[:, :token], x, last[:, token + 1 :]], dim=1)
        y = run(model, h, states.e, range(index, index + 1), states.view)[-1][:, part]

        def product(v: Tensor) -> Tensor:
            (out,) = torch.autograd.grad(y, x, v.view_as(y).to(y.dtype), retain_graph=True)
            return out.flatten().to(v.dtype)

        return arnoldi(product, x.numel(), x.device, n_products, tolerance)


def arnoldi(
    product: Callable[[Tensor], Tensor], n: int, device: torch.device, n_products: int, tolerance: float
) -> Spectrum:
    """Find the outermost eigenvalues of a linear map of (n,) to (n,), in the space of a random vector and its images.

    Unlike plain power iteration this finds complex pairs. Source: Saad, Numerical Methods for Large Eigenvalue
    Problems, chapter 6.
    """
    m = min(n, n_products)
    dtype = torch.float64 if n <= 2**16 else torch.float32
    basis = torch.zeros(m + 1, n, dtype=dtype, device=device)
    start = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device, dtype)
    basis[0] = start / start.norm()
    hessenberg = torch.zeros(m + 1, m, dtype=torch.float64)
    for k in range(1, m + 1):
        w = product(basis[k - 1])
        size = w.norm()
        # Orthogonalise twice: once leaves a rest as large as rounding times what was taken away.
        for _ in range(2):
            shares = basis[:k] @ w
            w = w - shares @ basis[:k]
            hessenberg[:k, k - 1] += shares.double().cpu()
        rest = w.norm()
        hessenberg[k, k - 1] = rest.item()
        # The basis is closed when it holds all that the map makes of the start vector.
        closed = k == n or bool(rest <= 1e-10 * size)
        if closed or k == m or k % 10 == 0:
            values, vectors = torch.linalg.eig(hessenberg[:k, :k])
            order = values.abs().argsort(descending=True)
            values = values[order]
            last = vectors[-1, order[0]].abs().item() / vectors[:, order[0]].norm().item()
            radius = values[0].abs().item()
            residual = 0.0 if closed else rest.item() * last / max(radius, 1e-30)
            if residual <= tolerance or k == m:
                break
        basis[k] = w / rest
    return Spectrum(radius, values[:10], residual, k)


def section(subject: Subject) -> Section:
    """List spectra for the first prompt as a whole and for up to four of its tokens."""
    ids = subject.input_ids[:1]
    positions = subject.where[0].nonzero()[:, 0].tolist()
    tokens = sorted({positions[round(i * (len(positions) - 1) / 3)] for i in range(4)})
    record, rows, radii = [], [], []
    for n in sorted({subject.n_loops, subject.n_beyond}):
        for token in (None, *tokens):
            found = spectrum(subject.model, ids, n, token)
            record.append({"loops": n, "token": token} | numbers(found))
            name = "all tokens" if token is None else f"token {token}, {subject.text(int(ids[0, token]))}"
            first, residual = f"{complex(found.eigenvalues[0]):.3f}", f"{found.residual:.0e}"
            rows.append([str(n), name, f"{found.radius:.4f}", first, residual, str(found.n_products)])
            if token is None:
                radii.append(f"{found.radius:.3f} after {n} loops")
    finding = "The spectral radius of the next loop's Jacobian over the whole first prompt is " + " and ".join(radii)
    head = ["loops before", "state that changes", "radius", "largest eigenvalue", "residual", "products"]
    return Section("Spectral radius of the loop", finding + ".", {"spectra": record}, [Table(head, rows)])
