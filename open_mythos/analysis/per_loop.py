"""What a model says after every loop, after which one its answer stands, and what that goes with.

Shape letters: L loops, B rows, T tokens.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.tasks.task import IGNORE, Batch

CHUNK = 100
"""Rows at a time: their states of all loops are in memory together."""


def by_loop(
    model: OpenMythos,
    batch: Batch,
    loops: Sequence[int],
    read: Callable[[Tensor, Tensor], Tensor],
    rows: int = CHUNK,
) -> Tensor:
    """(loops, B, ...) what `read` makes of logits (B, T, V) and labels (B, T) after each of `loops`, on the CPU.

    A plain model has one "loop". One pass of the deepest call serves all, for its state after loop n is the last state
    of a call with n loops; not under ACT, where the output is a mean over states: each is a call of its own.

    Args:
        rows: at a time.
    """
    ids, labels = batch.input_ids.to(model.device).split(rows), batch.labels.to(model.device).split(rows)
    chunks = []
    with evaluating(model):
        for part, right in zip(ids, labels, strict=True):
            if model.recurrent is None:
                logits = iter([model(part)])
            elif model.cfg.halting == "act":
                logits = (model(part, n) for n in loops)
            else:
                hidden = model(part, max(loops), trace=True).hidden
                view = model.make_view((part.shape[0], part.shape[1]))
                logits = (model.readout(hidden[n - 1], view) for n in loops)
            chunks.append(torch.stack([read(x, right).cpu() for x in logits]))
    return torch.cat(chunks, dim=1)


def named_by_loop(model: OpenMythos, ids: Tensor, n_loops: int) -> Tensor:
    """(L, B, T) the likeliest token after every loop."""
    return by_loop(model, Batch(ids, ids), range(1, n_loops + 1), lambda logits, _: logits.argmax(-1))


def right_by_loop(model: OpenMythos, batch: Batch, n_loops: int) -> Tensor:
    """(L, B, T) bool: whether the likeliest token is the label, after every loop."""
    return by_loop(model, batch, range(1, n_loops + 1), lambda logits, labels: logits.argmax(-1) == labels)


def rows_right(right: Tensor, batch: Batch) -> np.ndarray:
    """(L, B) bool: rows with every label right, which are those that greedy decoding would write."""
    return (right | (batch.labels == IGNORE)).all(-1).numpy()


def settled(right: np.ndarray) -> np.ndarray:
    """(...) the first loop, from 1, from which on `right` (L, ...) is true to the last loop; 0 for none."""
    n_loops = len(right)
    after_last_wrong = n_loops - (~right[::-1]).argmax(axis=0)
    return np.where(right.all(axis=0), 1, np.where(right[-1], after_last_wrong + 1, 0))


def rank_correlation(a: Sequence[float], b: Sequence[float], within: Sequence[float] | None = None) -> float:
    """Spearman's correlation, equal values at their mean rank; `within` holds a third thing of few values fixed.

    Ranks are then taken less their mean at the same value of it, so that no shape of its influence is left; a straight
    line through its ranks would leave some. NaN where nothing is left of a or b.
    """
    level = np.unique(np.zeros(len(a)) if within is None else within, return_inverse=True)[1]
    ranks = [_ranks(np.asarray(values)) for values in (a, b)]
    rest = [x - (np.bincount(level, x) / np.bincount(level))[level] for x in ranks]
    norms = [np.linalg.norm(x) for x in rest]
    if min(norms) <= 1e-9 * len(level) ** 1.5:
        return float("nan")
    return float(rest[0] @ rest[1] / (norms[0] * norms[1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[place]
