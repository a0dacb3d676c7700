"""The chunked cross-entropy against F.cross_entropy of full logits: values, gradients and what it leaves in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos.model import OpenMythos
from open_mythos.nn.depth import LoopPlan
from open_mythos.tasks.task import IGNORE
from open_mythos.train.cross_entropy import CHUNK_BYTES, linear_cross_entropy, tokens_per_chunk
from open_mythos.train.losses import LossConfig, total_loss
from tests.models import random_ids, scaled, tiny, worst

SIZES = [(1, 1, 1, 2), (3, 7, 5, 11), (2, 63, 32, 257)]
"""(rows, tokens, D, V)"""


def sample(rows: int, tokens: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, tokens, width, generator=generator, dtype=torch.float64)
    head = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (rows, tokens), generator=generator)
    labels[torch.rand(rows, tokens, generator=generator) < 0.3] = IGNORE
    labels[-1, -1] = vocab - 1
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), labels


def reference(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE)


def loss_and_gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    # A weight, so that the gradient that comes in is not 1.
    return loss.detach(), *torch.autograd.grad(3.5 * loss, inputs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 13])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_equals_cross_entropy_of_full_logits(
    size: tuple[int, int, int, int], chunk_tokens: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    hidden, head, labels = sample(*size, dtype)
    got = loss_and_gradients(linear_cross_entropy(hidden, head, labels, chunk_tokens), hidden, head)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    expected = loss_and_gradients(reference(*exact, labels), *exact)
    assert got[0].dtype == torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in got[1:]] == [dtype, dtype]
    for a, b in zip(got, expected, strict=True):
        assert worst(a, b) < tolerance


@pytest.mark.parametrize("chunk_tokens", [1, 13])
def test_bfloat16_is_as_near_as_with_full_logits(chunk_tokens: int) -> None:
    hidden, head, labels = sample(2, 63, 32, 257, torch.bfloat16)
    got = loss_and_gradients(linear_cross_entropy(hidden, head, labels, chunk_tokens), hidden, head)
    full = loss_and_gradients(reference(hidden, head, labels), hidden, head)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    expected = loss_and_gradients(reference(*exact, labels), *exact)
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for a, b, c in zip(got, full, expected, strict=True):
        assert (a - c).norm() <= 1.05 * (b - c).norm()


def test_large_logits_do_not_overflow() -> None:
    """The likeliest token's logit is 1,000 above the label's: its probability underflows, its logarithm does not."""
    hidden = torch.eye(2, requires_grad=True)
    head = torch.tensor([[1e3, 0], [0, 1e3], [0, 0]], requires_grad=True)
    labels = torch.tensor([2, 0])
    loss, *gradients = loss_and_gradients(linear_cross_entropy(hidden, head, labels, 1), hidden, head)
    assert loss == 1000
    assert all(torch.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_nothing_but_ignored_labels(chunk_tokens: int | None) -> None:
    """What F.cross_entropy does: the loss is 0 / 0, the gradient zero."""
    hidden, head, labels = sample(2, 3, 4, 5, torch.float32)
    loss, *gradients = loss_and_gradients(
        linear_cross_entropy(hidden, head, labels.fill_(IGNORE), chunk_tokens), hidden, head
    )
    assert loss.isnan()
    assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_only_the_gradients_asked_for(frozen: str) -> None:
    hidden, head, labels = sample(3, 7, 5, 11, torch.float64)
    expected = torch.autograd.grad(reference(hidden, head, labels), (hidden, head))
    hidden.requires_grad_(frozen == "head")
    head.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(hidden, head, labels, 4)
    assert loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    loss.backward()
    for x, gradient in zip((hidden, head), expected, strict=True):
        assert (x.grad is None) != x.requires_grad
        assert x.grad is None or worst(x.grad, gradient) < 1e-12


def test_backward_can_be_repeated() -> None:
    """The first call uses its gradients up; a second one, through a kept graph, makes them anew."""
    hidden, head, labels = sample(3, 7, 5, 11, torch.float64)
    loss = linear_cross_entropy(hidden, head, labels, 4)
    once = [x.clone() for x in torch.autograd.grad(loss, (hidden, head), retain_graph=True)]
    again = torch.autograd.grad(2 * loss, (hidden, head))
    for a, b in zip(again, once, strict=True):
        assert worst(a, 2 * b) < 1e-12


def test_small_vocabularies_take_one_chunk() -> None:
    """So the shipped recipes run F.cross_entropy itself, and lose nothing."""
    assert tokens_per_chunk(torch.empty(14, 256, device="meta")) > 128 * 20
    assert tokens_per_chunk(torch.empty(259, 128, device="meta")) > 16 * 128
    assert tokens_per_chunk(torch.empty(8192, 64, device="meta")) * 8192 * 4 == CHUNK_BYTES
    assert tokens_per_chunk(torch.empty(131072, 512, device="meta")) == 512


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("chunk_tokens", [8, 128])
def test_no_tensor_is_larger_than_a_chunk_of_logits(chunk_tokens: int) -> None:
    rows, tokens, width, vocab = 4, 100, 4, 300
    hidden, head, labels = sample(rows, tokens, width, vocab, torch.float32)
    with Largest() as chunked:
        linear_cross_entropy(hidden, head, labels, chunk_tokens).backward()
    assert chunked.elements == max(chunk_tokens, width) * vocab
    with Largest() as plain:
        reference(hidden, head, labels).backward()
    assert plain.elements == rows * tokens * vocab


def test_a_training_step_makes_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one with a loss after every loop; both equal the loss on the logits, which are there when asked for."""
    monkeypatch.setattr("open_mythos.train.cross_entropy.CHUNK_BYTES", 1)
    cfg = tiny(vocab_size=1000, halting="none")
    model = scaled(cfg, dtype=torch.float64).train()
    ids, labels = random_ids(cfg, 4, 30), random_ids(cfg, 4, 30, seed=1)
    labels[:, :3] = IGNORE
    for per_loop in (False, True):
        with Largest() as step:
            out = model(ids, plan=LoopPlan((3,) * 4), trace=per_loop)
            loss, _ = total_loss(out, labels, LossConfig(per_loop=per_loop))
            got = loss_and_gradients(loss, *model.parameters())
        assert step.elements == cfg.vocab_size * cfg.dim < ids.numel() * cfg.vocab_size
        out = model(ids, plan=LoopPlan((3,) * 4), trace=per_loop)
        logits = out.loop_logits if per_loop else out.logits
        assert logits.shape == ((3, 4, 30, 1000) if per_loop else (4, 30, 1000))
        assert (out.loop_logits is None) == (not per_loop) and out.logits is out.logits
        loss = F.cross_entropy(logits.flatten(0, -2), labels.expand(logits.shape[:-1]).flatten(), ignore_index=IGNORE)
        for a, b in zip(got, loss_and_gradients(loss, *model.parameters()), strict=True):
            assert worst(a, b) < 1e-12


@pytest.mark.parametrize("chunk_tokens", [None, 16])
def test_autocast_at_the_forward_pass_decides_the_dtype(
    chunk_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's product runs in bf16 even where the loss is taken outside, and the softmax in float32."""
    monkeypatch.setattr("open_mythos.train.losses.linear_cross_entropy", in_chunks(chunk_tokens))
    cfg = tiny(halting="none", n_experts=0)
    model: OpenMythos = scaled(cfg).train()
    ids, labels = random_ids(cfg, 4, 30), random_ids(cfg, 4, 30, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, plan=LoopPlan((2,) * 4))
        logits = model.head(out.hidden)
    assert out.hidden.dtype == out.logits.dtype == torch.bfloat16
    assert torch.equal(out.logits, logits)
    loss, _ = total_loss(out, labels, LossConfig())
    got = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
    expected_loss = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
    expected = torch.autograd.grad(expected_loss, [*model.parameters()])
    assert loss.dtype == torch.float32
    assert worst(loss, expected_loss) < 1e-6
    # Both gradients passed through the same bf16 products, in another order where there are chunks.
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert worst(a, b) < (2e-2 if chunk_tokens else 1e-6)


def in_chunks(chunk_tokens: int | None):
    return lambda hidden, head, labels: linear_cross_entropy(hidden, head, labels, chunk_tokens)
