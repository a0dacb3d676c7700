"""After which loop an answer stands, and what that goes with.

Shape letters: L loops, B rows, T tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from open_mythos.evaluating import evaluating
from open_mythos.model import OpenMythos
from open_mythos.train.data import IGNORE, Batch

CHUNK = 100
"""Rows at a time: their states of all loops are in memory together."""


def named_by_loop(model: OpenMythos, ids: Tensor, n_loops: int) -> Tensor:
    """(L, B, T) the likeliest token after every loop, on the CPU; a plain model has one "loop".

    One pass of the deepest call serves all: its state after loop n is the last state of a call with n loops. Not so
    under ACT, whose output is a sum of states: there each number of loops is a call, cut off at it.
    """
    chunks = []
    with evaluating(model):
        for part in ids.to(model.device).split(CHUNK):
            if model.recurrent is None:
                chunks.append(model(part).argmax(-1)[None].cpu())
                continue
            if model.cfg.halting == "act":
                named = [model(part, n).argmax(-1) for n in range(1, n_loops + 1)]
            else:
                hidden = model(part, n_loops=n_loops, trace=True).hidden
                view = model.make_view((part.shape[0], part.shape[1]))
                named = [model.readout(h, view).argmax(-1) for h in hidden]
            chunks.append(torch.stack(named).cpu())
    return torch.cat(chunks, dim=1)


def right_by_loop(model: OpenMythos, batch: Batch, n_loops: int) -> Tensor:
    """(L, B, T) bool: whether the likeliest token is the label, after every loop; a plain model has one "loop"."""
    return named_by_loop(model, batch.input_ids, n_loops) == batch.labels


def rows_right(right: Tensor, batch: Batch) -> np.ndarray:
    """(L, B) bool: rows with every label right, which are those that greedy decoding would write."""
    return (right | (batch.labels == IGNORE)).all(-1).numpy()


def settled(right: np.ndarray) -> np.ndarray:
    """(B,) the first loop, from 1, from which on a row of `right` (L, B) is right to the last loop; 0 for none."""
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
    if min(norms) < 1e-9 * len(level) ** 1.5:
        return float("nan")
    return float(rest[0] @ rest[1] / (norms[0] * norms[1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[place]
