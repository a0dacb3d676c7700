"""Loss and exact match of a model at a given number of loops."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from open_mythos.arguments import check_n_loops
from open_mythos.evaluating import evaluating
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import LoopPlan
from open_mythos.nn.linear import linear
from open_mythos.nn.numerics import no_autocast, wide
from open_mythos.train.cross_entropy import tokens_per_chunk
from open_mythos.train.data import IGNORE, Batch


@dataclass(frozen=True)
class Score:
    """loss: nats per labelled token. accuracy: share of rows with every label right.

    A row is right exactly when greedy decoding would write all its labelled tokens: both pick the likeliest token
    after the same text for as long as all were right.
    """

    loss: float
    accuracy: float

    def bits_per_byte(self, bytes_per_token: float) -> float:
        return self.loss / math.log(2) / bytes_per_token


def evaluate(model: OpenMythos, batch: Batch, n_loops: int | None = None, chunk_rows: int = 256) -> Score:
    """Score `batch` in eval mode, `chunk_rows` rows at a time; the model's mode is restored."""
    n_loops = check_n_loops(n_loops, model.cfg)
    loss = 0.0
    labels_seen = rows_right = 0
    with evaluating(model):
        for rows in (slice(i, i + chunk_rows) for i in range(0, len(batch.input_ids), chunk_rows)):
            ids, labels = batch.input_ids[rows].to(model.device), batch.labels[rows].to(model.device)
            documents = None if batch.documents is None else batch.documents[rows].to(model.device)
            # The output of a training call, whose logits are made below, for some tokens at a time.
            out = model(ids, plan=LoopPlan((n_loops,) * len(ids)), documents=documents)
            n, right = tokens_per_chunk(out.head), []
            for hidden, label in zip(out.hidden.flatten(0, 1).split(n), labels.flatten().split(n), strict=True):
                with no_autocast(hidden):
                    logits = wide(linear(hidden, out.head))
                loss += F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum").item()
                right.append((logits.argmax(-1) == label) | (label == IGNORE))
            labels_seen += (labels != IGNORE).sum().item()
            rows_right += torch.cat(right).view_as(labels).all(-1).sum().item()
    return Score(loss / labels_seen, rows_right / len(batch.input_ids))
