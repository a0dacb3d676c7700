"""What a task stream gives the trainer: batches that are a pure function of (seed, step).

    batch = task.batch(stream(seed, step, Purpose.DATA), rows=64)

A stream has no hidden state: its position is the step, so resuming it is asking for the next step.
Shape letters: B rows, T tokens, L loops.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from open_mythos.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100  # label of a position without loss, the default of torch's cross_entropy


@dataclass(frozen=True)
class Batch:
    """Rows to train or evaluate on.

    input_ids: (B, T) int64.
    labels: (B, T) int64; `labels[b, t]` is the token to predict at position t (already shifted), or IGNORE. With labels
    of their own for every loop, (L, B, T).
    documents: (B, T) int64, the number of each token's document in its row, where attention is to stop at their ends.
    """

    input_ids: "Tensor"
    labels: "Tensor"
    documents: "Tensor | None" = None

    def take(self, rows: "slice | Tensor") -> "Batch":
        """Some of the rows; by an index, copies of them."""
        documents = None if self.documents is None else self.documents[rows]
        return Batch(self.input_ids[rows], self.labels[..., rows, :], documents)


class Task(Protocol):
    """A source of batches, which is also its section of the configuration."""

    name: ClassVar[str]
    on_disk: ClassVar[bool]
    """Whether the data has to be prepared before it can be read. A row then depends on its number, and not on `rng`."""

    @property
    def vocab_size(self) -> int:
        """Tokens the model must at least have."""
        ...

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        ...

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of validation text per token, for bits per byte; None where bytes mean nothing."""
        ...

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        """Draw `rows` rows to train on; everything random comes from `rng`.

        Args:
            depths: (rows,) loops that each row is going to run; a task may fit its questions to them.
            first_row: rows of the run before these. A task that goes through a file reads its place off it.
        """
        ...

    def validation_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        """Draw `rows` rows to validate on: held out where the data is a file, fresh draws of a synthetic task."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer between a user's text and this task's ids."""
        ...


def example(batch: Batch, tokenizer: Tokenizer) -> tuple[str, str, int]:
    """The first row of `batch` as a user would ask it: the prompt, the right answer, and the tokens of the answer.

    Where the row itself holds the answer, behind the place that is first asked, the prompt is what stands before it:
    `12+34=` of addition. Else the whole row is the prompt and the answer is a token that the row does not hold, as of
    khop and parity.
    """
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    asked = [place for place, label in enumerate(labels) if label != IGNORE]
    first, last = asked[0], asked[-1]
    answer = [labels[place] for place in asked]
    if ids[first + 1 : last + 1] != answer[:-1] or asked != list(range(first, last + 1)):
        first, answer = last, answer[-1:]
    return tokenizer.decode(ids[: first + 1]), tokenizer.decode(answer), len(answer)


def to_tensor(ids: np.ndarray) -> "Tensor":
    """int64 tensor of an integer array."""
    # Imported here so that a configuration, and with it a command line, can be checked without torch.
    import torch

    return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64))
