"""Bits per byte of whole texts at a number of loops.

    bits_per_byte(model, tokenizer, [text], n_loops=8).bits_per_byte

Every token of a text is scored once. Windows of `context` tokens advance by half of that, so at least half a window
precedes each scored token, unless the text begins nearer. A text begins after the tokenizer's end token, as the
documents of prepared data do; the texts of a list do not see each other.

Shapes: B windows, T tokens of a window, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.checks import check_int
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import check_n_loops
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.halting import HaltingRule
from open_mythos.ops.precision import at_least_float32
from open_mythos.tokenization.tokenizer import Tokenizer

LOGITS = 2**24
"""Most logits of one call, unless a single window has more: 64 MiB in float32."""
Windows = list[tuple[Tensor, int]]
"""Ids of each window, one more than the model reads, and how many of the last ones are scored."""


@dataclass(frozen=True)
class TextScore:
    """Score of one model at one number of loops, over all tokens of the texts."""

    n_loops: int
    nats: float
    n_tokens: int
    n_bytes: int
    mean_loops: float
    """Loops run per scored token: below `n_loops` where tokens exit."""

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.n_tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.n_bytes


def cut(n_tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, n_scored) of each window: the tokens it reads, and how many of its last predictions count."""
    scored = 0
    while scored < n_tokens:
        end = min(scored + (context if scored == 0 else max(1, context // 2)), n_tokens)
        yield max(0, end - context), end, end - scored
        scored = end


def windows(tokenizer: Tokenizer, texts: Sequence[str], context: int) -> Windows:
    """Cut all texts into windows, the longest first, so that those of a call are of about the same length.

    Raises:
        ValueError: the texts are empty, `context` is below 1, or the tokenizer has no end token to begin after.
    """
    check_int("context", context, 1)
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no end token, which a text begins after; use one that has")
    found: Windows = []
    for text in texts:
        ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(text)])
        found += [(ids[start : end + 1], n) for start, end, n in cut(len(ids) - 1, context)]
    if not found:
        raise ValueError("the texts are empty; give at least one character")
    return sorted(found, key=lambda window: -len(window[0]))


def bits_per_byte(
    model: OpenMythos,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    n_loops: int | None = None,
    *,
    exit: str | HaltingRule | None = None,
    exit_threshold: float | None = None,
    context: int | None = None,
    advance: Callable[[int, int, float], Any] | None = None,
) -> TextScore:
    """Score texts in eval mode; the model's mode is restored.

    Args:
        n_loops: None: the model's `max_loop_iters`.
        exit, exit_threshold: a halting rule, as in `OpenMythos.forward`.
        context: tokens of a window; None: `max_seq_len`.
        advance: called after each call of the model with the windows and tokens that it has scored, and the nats per
            token so far.

    Raises:
        TypeError, ValueError: an argument is unusable, a text is empty, or tokenizer and model do not fit.
    """
    cfg = model.cfg
    depth, rule = check_n_loops(n_loops, cfg), model.exit_rule(exit, exit_threshold)
    context = cfg.max_seq_len if context is None else context
    check_int("context", context, 1, cfg.max_seq_len, f"use context={cfg.max_seq_len} (max_seq_len) or less")
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model vocab_size={cfg.vocab_size}; use the "
            "model's own tokenizer"
        )
    todo = windows(tokenizer, texts, context)
    n_bytes = sum(len(text.encode("utf-8")) for text in texts)
    rows = max(1, LOGITS // (context * cfg.vocab_size))
    nats, n_tokens, loops_run = 0.0, 0, 0
    with evaluating(model):
        for batch in (todo[i : i + rows] for i in range(0, len(todo), rows)):
            ids, scored = (x.to(model.device) for x in _padded(batch))
            view = model.make_view((ids.shape[0], ids.shape[1] - 1))
            logits, result = model.run(ids[:, :-1], view, depth, rule)
            losses = F.cross_entropy(at_least_float32(logits[scored]), ids[:, 1:][scored], reduction="none")
            nats += losses.double().sum().item()
            n_tokens += len(losses)
            # A plain transformer has no loop and counts none; it runs its layers once.
            loops_run += result.loops[scored].sum().item() if cfg.recurrent_layers else len(losses)
            if advance is not None:
                advance(len(batch), len(losses), nats / n_tokens)
    if not math.isfinite(nats):
        raise FloatingPointError("the loss is not finite: the weights have diverged or overflow; try --dtype float32")
    return TextScore(depth, nats, n_tokens, n_bytes, loops_run / n_tokens)


def _padded(batch: Windows) -> tuple[Tensor, Tensor]:
    """Return ids (B, T + 1), padded on the right, and the predictions (B, T) that count; none of them sees padding."""
    ids = nn.utils.rnn.pad_sequence([window for window, _ in batch], batch_first=True)
    ends, counts = torch.tensor([(len(window) - 1, n) for window, n in batch])[..., None].unbind(1)
    at = torch.arange(ids.shape[1] - 1)
    return ids, (at < ends) & (at >= ends - counts)
