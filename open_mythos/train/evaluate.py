"""Loss and exact match of a model at a given number of loops."""

import math
from dataclasses import dataclass

from open_mythos.evaluating import evaluating
from open_mythos.model import OpenMythos
from open_mythos.train.data import IGNORE, Batch
from open_mythos.train.losses import cross_entropy


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
    loss = rows_right = labels_seen = 0.0
    with evaluating(model):
        for ids, labels in zip(batch.input_ids.split(chunk_rows), batch.labels.split(chunk_rows), strict=True):
            ids, labels = ids.to(model.device), labels.to(model.device)
            logits = model(ids, n_loops=n_loops)
            n_labels = (labels != IGNORE).sum().item()
            loss += cross_entropy(logits, labels).item() * n_labels
            labels_seen += n_labels
            rows_right += ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(-1).sum().item()
    return Score(loss / labels_seen, rows_right / len(batch.input_ids))
