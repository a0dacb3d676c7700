"""Cross-entropy of a linear head without the logits of all tokens at once.

With a large vocabulary the logits of N tokens and their gradient are the largest tensors of a training step: 2 N V
numbers, against N D for one activation. Here they exist for one chunk of tokens at a time.

Shapes: N tokens, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.linear import is_traced, linear, outer
from open_mythos.ops.precision import at_least_float32, no_autocast
from open_mythos.tasks.task import IGNORE

CHUNK_BYTES = 2**24
"""Room for the float32 logits of a chunk."""


def linear_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Return the mean negative log-likelihood, in nats over the labelled positions, of the logits `hidden @ head^T`.

    Where one chunk holds all tokens this is `F.cross_entropy`. Otherwise the gradients are made chunk by chunk in the
    forward pass, and there is no second derivative.

    Args:
        hidden: (..., D), what the head reads.
        head: (V, D), in the dtype of `hidden`, which is that of the products; the softmax takes at least float32.
        labels: (...) int64, IGNORE where there is no loss.
        chunk_tokens: tokens of a chunk; None: see `tokens_per_chunk`.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    n = chunk_tokens or tokens_per_chunk(head)
    if n >= len(labels) or is_traced():
        with no_autocast(hidden):
            return F.cross_entropy(at_least_float32(linear(hidden, head)), labels, ignore_index=IGNORE)
    return _Chunked.apply(hidden, head, labels, n)


def tokens_per_chunk(head: Tensor) -> int:
    """Return as many tokens as `CHUNK_BYTES` has room for, and at least D.

    The logits of D tokens are as large as the gradient of the head, which is there anyway; with far fewer, reading and
    writing that gradient for every chunk would cost as much as the products.
    """
    return max(head.shape[1], CHUNK_BYTES // (4 * head.shape[0]))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(hidden, head, labels)
        ctx.n, ctx.n_labels = n, (labels != IGNORE).sum()
        loss, *ctx.grads = _sums(hidden, head, labels, n, *ctx.needs_input_grad[:2])
        return loss / ctx.n_labels

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, labels = ctx.saved_tensors
        # The first call scales the gradients in place; another one, after retain_graph, makes them anew.
        grads = ctx.grads or _sums(hidden, head, labels, ctx.n, *ctx.needs_input_grad[:2])[1:]
        ctx.grads = None
        # Without any label the loss is 0 / 0 and the gradient zero, as in F.cross_entropy.
        scale = grad_loss / ctx.n_labels.clamp(min=1)
        grad_hidden, grad_head = (None if grad is None else grad.mul_(scale) for grad in grads)
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None


def _sums(
    hidden: Tensor, head: Tensor, labels: Tensor, n: int, need_hidden: bool, need_head: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the sum of the tokens' losses and its gradients: by `hidden`, and by `head` in at least float32."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_zeros((), dtype=dtype)
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_head = torch.zeros_like(head, dtype=dtype) if need_head else None
    with no_autocast(hidden):
        for start in range(0, len(labels), n):
            x, label = hidden[start : start + n], labels[start : start + n, None]
            labelled = label != IGNORE
            label = label.where(labelled, 0)
            log_p = at_least_float32(linear(x, head)).log_softmax(-1)
            loss -= log_p.gather(1, label).where(labelled, 0).sum()
            if grad_hidden is None and grad_head is None:
                continue
            # By the logits: the probabilities, less one at the label. In place, in the memory of their logarithms.
            grad = log_p.exp_().scatter_add_(1, label, -torch.ones_like(label, dtype=dtype)).to(x.dtype)
            del log_p
            if grad_hidden is not None:
                grad_hidden[start : start + n] = linear(grad, head.T).where(labelled, 0)
            if grad_head is not None:
                grad_head += outer(grad, x.where(labelled, 0))
            del grad  # before the next chunk's logits
    return loss, grad_hidden, grad_head
