"""Loss and exact match of a model at a given number of loops."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from open_mythos.model import OpenMythos
from open_mythos.nn.depth import LoopPlan, check_n_loops
from open_mythos.nn.eval_mode import evaluating
from open_mythos.ops.linear import linear
from open_mythos.ops.precision import at_least_float32, no_autocast
from open_mythos.tasks.task import IGNORE, Batch
from open_mythos.train.cross_entropy import tokens_per_chunk


@dataclass(frozen=True)
class Score:
    """Sums over what was scored.

    A row is right exactly when greedy decoding would write all its labelled tokens: both pick the likeliest token
    after the same text for as long as all were right.
    """

    nats: float
    n_labels: float
    n_right: float
    n_rows: float
    """Rows with a label."""

    @property
    def loss(self) -> float:
        """Nats per labelled token."""
        return self.nats / self.n_labels

    @property
    def accuracy(self) -> float:
        """Share of rows with every label right."""
        return self.n_right / self.n_rows

    def bits_per_byte(self, bytes_per_token: float) -> float:
        return self.loss / math.log(2) / bytes_per_token


def evaluate(model: OpenMythos, batch: Batch, n_loops: int | None = None, chunk_rows: int = 256) -> Score:
    """Score `batch` in eval mode, `chunk_rows` rows at a time; the model's mode is restored."""
    n_loops = check_n_loops(n_loops, model.cfg)
    nats = 0.0
    n_labels = n_right = n_rows = 0
    with evaluating(model):
        for rows in (slice(i, i + chunk_rows) for i in range(0, len(batch.input_ids), chunk_rows)):
            ids, labels = batch.input_ids[rows].to(model.device), batch.labels[rows].to(model.device)
            documents = None if batch.documents is None else batch.documents[rows].to(model.device)
            # The output of a training call, whose logits are made below, for some tokens at a time.
            out = model(ids, plan=LoopPlan((n_loops,) * len(ids)), documents=documents)
            n, right = tokens_per_chunk(out.head), []
            for hidden, label in zip(out.hidden.flatten(0, 1).split(n), labels.flatten().split(n), strict=True):
                with no_autocast(hidden):
                    logits = at_least_float32(linear(hidden, out.head))
                nats += F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum").item()
                right.append((logits.argmax(-1) == label) | (label == IGNORE))
            labelled = (labels != IGNORE).any(-1)
            n_labels += (labels != IGNORE).sum().item()
            n_right += (torch.cat(right).view_as(labels).all(-1) & labelled).sum().item()
            n_rows += labelled.sum().item()
    return Score(nats, n_labels, n_right, n_rows)


def rows_of_rank(batch: Batch, rank: int, size: int) -> Batch:
    """Return one process's share of some rows. All get equally many, for they have to make the same calls."""
    n = len(batch.input_ids)
    index = torch.arange(rank, -(-n // size) * size, size)
    rows = batch.take(index % n)
    rows.labels[..., index >= n, :] = IGNORE
    return rows


def spectral_radius(model: OpenMythos) -> float | None:
    """Return the spectral radius of the linear map of the recurrent state, or None if the model has no such map.

    The map is the diagonal A in h' = A*h + ..., so this is its largest entry; the block's contribution is not included.
    There is none without a recurrent part, or with an injection without decay (`add`, `concat`). With sharded weights
    every process has to call this.
    """
    injection = None if model.recurrent is None else model.recurrent.injection
    decay = None if injection is None else injection.get_A()
    if decay is None:
        return None
    return (decay.full_tensor() if isinstance(decay, DTensor) else decay).max().item()
