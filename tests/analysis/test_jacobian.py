"""Eigenvalues from products against those of the dense matrix."""

import math

import pytest
import torch
from torch import Tensor

from open_mythos.analysis.jacobian import arnoldi, spectrum
from open_mythos.analysis.unroll import run, unroll
from tests.models import ATTENTIONS, PARTS, random_ids, scaled, tiny

CPU = torch.device("cpu")


def dense(model: torch.nn.Module, ids: Tensor, n_loops: int) -> Tensor:
    """(T, D, T, D)"""
    hidden, e, view = unroll(model, ids, n_loops)

    def loop(h: Tensor) -> Tensor:
        return run(model, h[None], e, range(n_loops, n_loops + 1), view)[-1][0]

    with torch.enable_grad():
        return torch.autograd.functional.jacobian(loop, hidden[-1][0]).detach()


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize("part", ["default", "diagonal", "concat", "add", "no-experts", "two-layers"])
def test_radius_is_that_of_the_dense_jacobian(attn_type: str, part: str) -> None:
    cfg = tiny(attn_type=attn_type, dim=16, **PARTS[part])
    model, ids = scaled(cfg, dtype=torch.float64), random_ids(cfg, 1, 3)
    matrix = dense(model, ids, 3)
    D = cfg.dim
    whole = torch.linalg.eigvals(matrix.reshape(3 * D, 3 * D)).abs().amax().item()
    found = spectrum(model, ids, 3, n_products=3 * D, tolerance=1e-9)
    assert found.radius == pytest.approx(whole, rel=1e-6)
    blocks = [torch.linalg.eigvals(matrix[i, :, i]).abs().amax().item() for i in range(3)]
    of_tokens = [spectrum(model, ids, 3, token=i, n_products=D, tolerance=1e-9).radius for i in range(3)]
    assert of_tokens == pytest.approx(blocks, rel=1e-6)
    # Attention is causal: nothing above the diagonal blocks.
    assert max(blocks) == pytest.approx(whole, rel=1e-6)


def of_matrix(matrix: Tensor, n_products: int, tolerance: float = 1e-6) -> tuple[float, float, int]:
    found = arnoldi(lambda v: matrix @ v, len(matrix), CPU, n_products, tolerance)
    return found.radius, found.residual, found.n_products


def test_complex_pairs_are_found_before_the_whole_space_is() -> None:
    """Where plain power iteration would turn for ever."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.diag(torch.linspace(-0.5, 0.5, 200, dtype=torch.float64))
    c, s = 0.9 * math.cos(1), 0.9 * math.sin(1)
    inner[:2, :2] = torch.tensor([[c, -s], [s, c]])
    basis = torch.randn(200, 200, generator=generator, dtype=torch.float64)
    matrix = basis @ inner @ torch.linalg.inv(basis)
    radius, residual, products = of_matrix(matrix, 120)
    assert radius == pytest.approx(0.9, rel=1e-5) and residual <= 1e-6 and products < 120


def test_a_small_space_is_exact_and_zero_is_zero() -> None:
    matrix = torch.diag(torch.tensor([3.0, -5.0, 1.0], dtype=torch.float64))
    assert of_matrix(matrix, 50) == (pytest.approx(5), 0, 3)
    assert of_matrix(torch.zeros(7, 7, dtype=torch.float64), 50) == (0, 0, 1)


def test_too_few_products_say_so() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(300, 300, generator=generator, dtype=torch.float64)
    _, residual, products = of_matrix(matrix, 10)
    assert products == 10 and residual > 1e-2


def test_bad_input_is_refused() -> None:
    cfg = tiny()
    model = scaled(cfg)
    with pytest.raises(ValueError, match="2 rows"):
        spectrum(model, random_ids(cfg, 2, 3))
    with pytest.raises(ValueError, match="token=3"):
        spectrum(model, random_ids(cfg, 1, 3), token=3)
