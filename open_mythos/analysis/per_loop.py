"""Answers after every loop, and the loop after which an answer no longer changes.

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
"""Rows of one call: their states of all loops are in memory together."""


def by_loop(
    model: OpenMythos,
    batch: Batch,
    loops: Sequence[int],
    read: Callable[[Tensor, Tensor], Tensor],
    rows: int = CHUNK,
) -> Tensor:
    """Apply `read` to logits (B, T, V) and labels (B, T) after each of `loops`: (loops, B, ...), on the CPU.

    A plain model has one "loop". One pass of the deepest call serves all, because its state after loop n is the last
    state of a call with n loops. Under ACT, where the output is a mean over states, each is a call of its own.
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
    """Return the most likely token after every loop, (L, B, T)."""
    return by_loop(model, Batch(ids, ids), range(1, n_loops + 1), lambda logits, _: logits.argmax(-1))


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return whether the most likely token of logits (B, T, V) is the label, (B, T) bool."""
    return logits.argmax(-1) == labels


def right_by_loop(model: OpenMythos, batch: Batch, n_loops: int) -> Tensor:
    """Return whether the most likely token is the label after every loop, (L, B, T) bool."""
    return by_loop(model, batch, range(1, n_loops + 1), is_right)


def rows_right(right: Tensor, batch: Batch) -> np.ndarray:
    """Return the rows (L, B) bool with every label right, which are those that greedy decoding would write."""
    return (right | (batch.labels == IGNORE)).all(-1).numpy()


def settled(right: np.ndarray) -> np.ndarray:
    """Return the first loop, from 1, from which on `right` (L, ...) is true to the last loop; 0 for none."""
    n_loops = len(right)
    after_last_wrong = n_loops - (~right[::-1]).argmax(axis=0)
    return np.where(right.all(axis=0), 1, np.where(right[-1], after_last_wrong + 1, 0))
