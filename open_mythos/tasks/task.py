"""What a task is: a source of batches that are a pure function of (seed, step).

    batch = task.batch(stream(seed, step, Purpose.DATA), rows=64)

A task has no hidden state: its position is the step, so a run resumes by asking for the next step.
Shape letters: B rows, T tokens, L loops.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from open_mythos.checks import check_section
from open_mythos.tokenization.tokenizer import SymbolTokenizer, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100
"""Label of a position without loss, the default of torch's cross_entropy."""
PAD_SYMBOL, END_SYMBOL = "<pad>", "$"
"""Symbols that stand for padding and for the end of an answer, in tasks that have them."""


@dataclass(frozen=True)
class Batch:
    """Rows to train or evaluate on.

    input_ids: (B, T) int64.
    labels: (B, T) int64; `labels[b, t]` is the token to predict at position t (already shifted), or IGNORE. (L, B, T)
    where every loop has labels of its own.
    documents: (B, T) int64, the number of each token's document in its row, where attention stops at their ends.
    """

    input_ids: "Tensor"
    labels: "Tensor"
    documents: "Tensor | None" = None

    @classmethod
    def of(cls, ids: np.ndarray, labels: np.ndarray, documents: np.ndarray | None = None) -> "Batch":
        """Make a batch of arrays of integers."""
        return cls(to_tensor(ids), to_tensor(labels), None if documents is None else to_tensor(documents))

    @staticmethod
    def shifted(ids: np.ndarray, is_label: np.ndarray | None = None, documents: np.ndarray | None = None) -> "Batch":
        """Make a batch of rows of T + 1 tokens, in which each token is to be predicted from those before it.

        Args:
            ids: (B, T + 1).
            is_label: (B, T + 1), False for tokens that need not be predicted; None: all are.
            documents: (B, T + 1).
        """
        labels = ids if is_label is None else np.where(is_label, ids, IGNORE)
        return Batch.of(ids[:, :-1], labels[:, 1:], None if documents is None else documents[:, :-1])

    def take(self, rows: "slice | Tensor") -> "Batch":
        """Return some of the rows; by an index, copies of them."""
        documents = None if self.documents is None else self.documents[rows]
        return Batch(self.input_ids[rows], self.labels[..., rows, :], documents)


@dataclass(frozen=True)
class Task:
    """Base class of all tasks; a task is also the section `data` of a run's configuration.

    A task of your own is a frozen dataclass with `name`, `symbols`, `seq_len` and `batch`; docs/training.md has one.
    """

    name: ClassVar[str]
    on_disk: ClassVar[bool] = False
    """True where data has to be prepared before it can be read. A row then depends on its number and not on `rng`."""
    has_turns: ClassVar[bool] = False
    """True for conversations: a trained model's folder then gets the chat template."""

    # For type checkers only: a dataclass would take properties of its base for the defaults of its fields.
    if TYPE_CHECKING:

        @property
        def symbols(self) -> Sequence[str]:
            """Texts of the tokens, each at its id; PAD_SYMBOL and END_SYMBOL have their roles where they occur."""
            ...

        @property
        def seq_len(self) -> int:
            """Tokens in a row."""
            ...

    def __post_init__(self) -> None:
        check_section(self, "data.")

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the model must have at least."""
        return len(self.symbols)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of validation text per token, for bits per byte; None where bytes mean nothing."""
        return None

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        """Draw `rows` rows to train on; everything random comes from `rng`.

        Args:
            depths: (rows,) loops that each row is going to run, for tasks whose questions depend on them.
            first_row: number of rows of the run before these, which is the position of a task that reads a file.
        """
        raise NotImplementedError

    def validation_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        """Draw `rows` rows to validate on: held-out data of a file, fresh draws of a synthetic task."""
        return self.batch(rng, rows)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer between a user's text and the task's ids."""
        pad, end = (symbol if symbol in self.symbols else None for symbol in (PAD_SYMBOL, END_SYMBOL))
        return SymbolTokenizer(list(self.symbols), pad=pad, eos=end)

    def check_losses(self, per_loop: bool) -> None:
        """Raise ValueError where the task's labels do not fit losses after every loop, or a loss after the last."""

    def with_tokenizer_of(self, folder: str) -> "Task":
        """Return the task for a run that begins with the model of a folder, whose tokenizer it should use."""
        return self

    def digests(self) -> dict[str, str]:
        """Return a digest of the contents behind each field that names files: a resumed run refuses other contents."""
        return {}

    def resume(self, digests: Mapping[str, str], tokenizer: Tokenizer) -> None:
        """Take over what a checkpoint recorded, where reading or making it again could give something else."""

    def verify(self, rank: int, size: int, report: Callable[[str], None]) -> None:
        """Compare the files with the digests that they were written with: of `size` processes, each its share.

        Args:
            report: called with a line now and then when this takes long.

        Raises:
            ValueError: a file is damaged; the message names it.
        """


class FileTask(Task):
    """Base class of tasks that read text, with a tokenizer that is opened once."""

    on_disk = True

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self.open_tokenizer()

    def open_tokenizer(self) -> Tokenizer:
        """Open or make the tokenizer of the text."""
        raise NotImplementedError

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def _replace_cached(self, name: str, value: Any) -> None:
        """Set a `cached_property`: it looks into `__dict__`, which a frozen dataclass leaves open."""
        self.__dict__[name] = value


def example(batch: Batch, tokenizer: Tokenizer) -> tuple[str, str, int]:
    """Return the first row of `batch` as a user would ask it: prompt, right answer and number of the answer's tokens.

    Where the row itself holds the answer, behind the first labelled position, the prompt is what stands before it:
    `12+34=` of addition. Elsewhere, as in khop and parity, the whole row is the prompt and the answer is one token.
    """
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    asked = [place for place, label in enumerate(labels) if label != IGNORE]
    first, last = asked[0], asked[-1]
    answer = [labels[place] for place in asked]
    if ids[first + 1 : last + 1] != answer[:-1] or asked != list(range(first, last + 1)):
        first, answer = last, answer[-1:]
    return tokenizer.decode(ids[: first + 1]), tokenizer.decode(answer), len(answer)


def to_tensor(ids: np.ndarray) -> "Tensor":
    """Return an int64 tensor of an integer array."""
    # Imported here so that a configuration, and with it a command line, can be checked without torch.
    import torch

    return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64))
