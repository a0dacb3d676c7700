"""Which operands a matrix product hands to the library that computes it."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos.ops import routes
from open_mythos.ops.linear import linear, prefers_compiled_sum


class _Weights(TorchDispatchMode):
    """Collects the weights that oneDNN is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not routes.HAS_ONEDNN, reason="no oneDNN with AVX-512")
def test_onednn_gets_no_weight_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "table", lambda n_threads: [[True] * len(routes.ROWS)] * len(routes.WEIGHTS))
    # A slice of a wider tensor, as the latent of mla is: the gradient of the weight takes it for a weight itself.
    torch.manual_seed(0)
    x, weight = torch.randn(160, 160, requires_grad=True), torch.randn(160, 256, requires_grad=True)
    sliced, gaps = x[:, :128], weight[:, :128]
    with _Weights() as weights:
        y = linear(sliced, gaps)
        y.backward(y.detach())
    assert len(weights.seen) == 3
    assert all(w.is_contiguous() or w.T.is_contiguous() for w in weights.seen)
    assert x.grad is not None
    torch.testing.assert_close(y, sliced @ gaps.T)
    torch.testing.assert_close(x.grad[:, :128], y.detach() @ gaps.detach())


def test_products_of_nothing() -> None:
    """A process whose experts got no token multiplies empty tensors, also for the gradient of the weights."""
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.zeros(4, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert weight.grad is not None and not weight.grad.any()
    with torch.no_grad():
        assert linear(torch.zeros(3, 0), torch.zeros(4, 0)).shape == (3, 4)


@pytest.mark.parametrize(("is_slow", "dtype", "most"), [(True, 32, 8), (False, 32, 2), (False, 16, 8)])
def test_compiled_sums_are_for_few_rows(monkeypatch: pytest.MonkeyPatch, is_slow: bool, dtype: int, most: int) -> None:
    """For fewer of them where the library is fast; never outside of a compiler, nor with gradients."""
    monkeypatch.setattr("open_mythos.ops.linear.prefers_onednn", lambda n_rows, size: is_slow)
    x = torch.ones(12, 3, dtype=torch.float32 if dtype == 32 else torch.bfloat16)
    with torch.no_grad():
        assert not prefers_compiled_sum(x[:1])
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert [n for n in range(1, 13) if prefers_compiled_sum(x[:n])] == list(range(1, most + 1))
    assert not prefers_compiled_sum(x[:1])
