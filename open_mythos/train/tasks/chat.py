"""Conversations, with the loss on what the assistant says.

Shapes: B rows, T tokens.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from rich import progress

from open_mythos.chat import BadMessages, Message, check_messages, render
from open_mythos.checks import check_int, check_number, shown
from open_mythos.data.packing import Packing
from open_mythos.data.prepare import open_tokenizer
from open_mythos.files import sha256
from open_mythos.tokenizer import Tokenizer
from open_mythos.train.data import IGNORE, Batch, to_tensor

Conversation = tuple[np.ndarray, np.ndarray]
"""Ids, and which of them are the assistant's."""


@dataclass(frozen=True)
class Chat:
    """Whole conversations of JSON lines {"messages": [{"role": ..., "content": ...}, ...]}, as many in a row as fit.

    No conversation is cut: one that is longer than a row is skipped. What is skipped is counted by reason in a warning.
    Which conversations a row holds depends on `order_seed` and the row's number alone.
    """

    paths: tuple[str, ...] = ()
    """Files of JSON lines."""
    tokenizer_from: str = "bytes"
    """"bytes", a folder or file that holds a tokenizer, or a model's name on the Hugging Face hub."""
    seq_len: int = 512
    held_out: float = 0.05
    """Share of the conversations that is never trained on, chosen by a hash of their messages; 0: none, and validation
    reads the training conversations."""
    order_seed: int = 0

    name: ClassVar[str] = "chat"
    on_disk: ClassVar[bool] = True
    bytes_per_token: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not isinstance(self.paths, tuple):
            raise TypeError(f"data.paths={shown(self.paths)} must be a list of files; use data.paths=('chat.jsonl',)")
        check_int("data.seq_len", self.seq_len, 1)
        check_number("data.held_out", self.held_out, 0, 0.9)
        check_int("data.order_seed", self.order_seed, 0, 2**63 - 1)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.tokenizer_from)

    @cached_property
    def _parts(self) -> tuple[list[Conversation], list[Conversation]]:
        """Training and held-out conversations.

        Raises:
            ValueError, OSError: no file is named or one cannot be read, or a part has no conversation.
        """
        if not self.paths:
            raise ValueError("data.paths is empty; name files of JSON lines, as in --data.paths chat.jsonl")
        parts: tuple[list[Conversation], list[Conversation]] = ([], [])
        skipped: Counter[str] = Counter()
        for path in self.paths:
            for record in _records(Path(path)):
                try:
                    messages = _messages(record)
                    conversation = self._render(messages)
                except BadMessages as error:
                    skipped[error.reason] += 1
                else:
                    parts[_place(messages) < self.held_out].append(conversation)
        told = ", ".join(f"{n} {reason}" for reason, n in skipped.most_common())
        n = len(parts[0]) + len(parts[1])
        if not parts[0]:
            raise ValueError(
                f"data.paths={self.paths} holds no conversation to train on ({n} whole ones, skipped: {told or 'none'}"
                "); add some, or use a longer data.seq_len or a smaller data.held_out"
            )
        if self.held_out and not parts[1]:
            raise ValueError(
                f"data.held_out={self.held_out} holds out none of {n} conversations; use a larger share, or "
                "data.held_out=0 to validate on those that are trained on"
            )
        if skipped:
            warnings.warn(f"{skipped.total()} of {n + skipped.total()} conversations skipped: {told}", stacklevel=2)
        return parts if self.held_out else (parts[0], parts[0])

    def _render(self, messages: Sequence[Message]) -> Conversation:
        ids, answer = render(messages, self._tokenizer)
        if not any(answer):
            raise BadMessages("no assistant turn", "a conversation without an answer teaches nothing")
        if len(ids) > self.seq_len + 1:
            raise BadMessages("too long", f"{len(ids)} tokens are more than data.seq_len={self.seq_len}")
        return np.array(ids, np.int32), np.array(answer)

    @cached_property
    def _packing(self) -> Packing:
        lengths = np.array([len(ids) for ids, _ in self._parts[0]])
        return Packing(lengths, self.seq_len + 1, (self.order_seed,))

    def digests(self) -> dict[str, str]:
        try:
            return {f"data.paths[{i}]": sha256(Path(path)) for i, path in enumerate(self.paths)}
        except OSError as error:
            raise _unreadable(error.filename, error) from None

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        conversations = self._parts[0]
        return self._fill([[conversations[i] for i in self._packing.row(first_row + row)] for row in range(rows)])

    def validation_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        """One conversation per row, so that a row is right when all answers in it are."""
        conversations = self._parts[1]
        return self._fill([[conversations[i]] for i in np.resize(rng.permutation(len(conversations)), rows)])

    def _fill(self, rows: list[list[Conversation]]) -> Batch:
        """Conversations one behind the other; what is left of a row is padding without loss."""
        pad = self._tokenizer.pad_id
        ids = np.full((len(rows), self.seq_len + 1), 0 if pad is None else pad, np.int64)
        labels = np.full(ids.shape, IGNORE, np.int64)
        # No conversation sees another. Padding belongs to the last, which does not see what comes behind it.
        documents = np.zeros(ids.shape, np.int64)
        for row, conversations in enumerate(rows):
            joined = np.concatenate([ids for ids, _ in conversations])
            answer = np.concatenate([answer for _, answer in conversations])
            ids[row, : len(joined)] = joined
            labels[row, : len(joined)] = np.where(answer, joined, IGNORE)
            ends = np.cumsum([len(ids) for ids, _ in conversations])
            documents[row] = np.searchsorted(ends[:-1], np.arange(ids.shape[1]), side="right")
        return Batch(to_tensor(ids[:, :-1]), to_tensor(labels[:, 1:]), to_tensor(documents[:, :-1]))

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer


def _records(path: Path) -> Iterator[bytes]:
    """The lines of a file that are not empty."""
    if path.exists() and not path.is_file():
        raise ValueError(f"data.paths: {path} is a folder, a pipe or a device; name a file of JSON lines")
    try:
        with progress.open(path, "rb", description=f"reading {path.name}", transient=True) as file:
            yield from (line for line in file if line.strip())
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path | str, error: OSError) -> ValueError:
    return ValueError(f"data.paths: {path} cannot be read ({error.strerror}); name a file of JSON lines")


def _messages(record: bytes) -> Sequence[Message]:
    try:
        values = json.loads(record)
    except (ValueError, RecursionError):
        raise BadMessages("invalid JSON", "a line must be one JSON object") from None
    return check_messages(values.get("messages") if isinstance(values, dict) else None)


def _place(messages: Sequence[Message]) -> float:
    """Where in [0, 1) a conversation falls: copies of one fall together."""
    text = json.dumps([[message["role"], message["content"]] for message in messages])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
