"""Conversations, with the loss on what the assistant says.

Shapes: B rows, T tokens.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich import progress
from rich.console import Console

from open_mythos.checks import NonNegativeInt, PositiveInt, Range, shown
from open_mythos.data.conversations import to_messages
from open_mythos.data.documents import read_values
from open_mythos.data.packing import Packing
from open_mythos.data.records import Unit
from open_mythos.data.skipped import SkipLog, Skipped
from open_mythos.data.text_files import kind_of
from open_mythos.files import sha256
from open_mythos.tasks.task import Batch, FileTask
from open_mythos.tokenization.chat_template import BadMessages, Message, check_messages, render
from open_mythos.tokenization.tokenizer import Tokenizer, open_tokenizer

Conversation = tuple[np.ndarray, np.ndarray]
"""Ids, and which of them are the assistant's."""
HELD_OUT = 0.05
LAYOUTS = "a conversation has the field messages, or conversations, or instruction and output"
RECORD_BYTES = 16 * 2**20
"""Most bytes of JSON for one conversation; a longer one is skipped."""
KINDS = {"no text in the record": "invalid JSON", "not UTF-8": "invalid JSON"}
"""How a record that is no conversation is counted, by the reason for which it is no record."""


@dataclass(frozen=True)
class Chat(FileTask):
    """Whole conversations of JSON files, in the layouts of `open_mythos.data.conversations`, as many in a row as fit.

    No conversation is cut: one that is longer than a row is skipped. What is skipped is counted by reason in a warning,
    which names the first of each file.
    Which conversations a row holds depends on `order_seed` and the row's number alone.
    """

    paths: tuple[str, ...] = ()
    """Files of JSON lines, or .json files that hold an array; either may be compressed with gzip."""
    tokenizer_from: str = "bytes"
    """"bytes", a folder or file that holds a tokenizer, or a model's name on the Hugging Face hub."""
    seq_len: PositiveInt = 512
    held_out: Annotated[float, Range(0, 0.9)] | None = None
    """Share of the conversations that is never trained on, chosen by a hash of their messages; None: 0.05, and at least
    one where two are different; 0: none, and validation reads the training conversations."""
    order_seed: NonNegativeInt = 0

    name = "chat"
    has_turns = True

    def __post_init__(self) -> None:
        if not isinstance(self.paths, tuple):
            raise TypeError(f"data.paths={shown(self.paths)} must be a list of files; use data.paths=('chat.jsonl',)")
        super().__post_init__()

    def open_tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.tokenizer_from)

    def with_tokenizer_of(self, folder: str) -> "Chat":
        return replace(self, tokenizer_from=folder)

    @cached_property
    def _parts(self) -> tuple[list[Conversation], list[Conversation]]:
        """Training and held-out conversations.

        Raises:
            ValueError, OSError: no file is named or one cannot be read, or a part has no conversation.
        """
        if not self.paths:
            raise ValueError("data.paths is empty; name files of JSON lines, as in --data.paths chat.jsonl")
        found: list[tuple[float, Conversation]] = []
        skipped = SkipLog()
        for path in self.paths:
            for place, record in _records(path):
                try:
                    if isinstance(record, Skipped):
                        raise BadMessages(KINDS.get(record.reason, record.reason), record.why or record.reason)
                    if (messages := to_messages(record)) is None:
                        fields = f"{', '.join(record):.100}" if isinstance(record, dict) else type(record).__name__
                        raise BadMessages("no messages", f"{LAYOUTS}, not {fields}")
                    messages = check_messages(messages)
                    found.append((_place(messages), self._render(messages)))
                except BadMessages as error:
                    skipped.add(Skipped(error.reason, str(error), place=place, file=path))
        reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.counts.most_common())
        table = "".join(f"\n{line}" for line in skipped.lines())
        n, share = len(found), self._share([place for place, _ in found])
        training, held_out = ([one for place, one in found if (place < share) == side] for side in (False, True))
        if not training:
            raise ValueError(
                f"data.paths={self.paths} holds no conversation to train on ({n} whole ones, skipped: "
                f"{reasons or 'none'}); add some, or use a longer data.seq_len or a smaller data.held_out{table}"
            )
        if skipped:
            warnings.warn(f"{len(skipped)} of {n + len(skipped)} conversations skipped: {reasons}{table}", stacklevel=2)
        return training, held_out or training

    def _share(self, places: list[float]) -> float:
        """The share to hold out of conversations at these places in [0, 1).

        Raises:
            ValueError: `held_out` holds out none of them.
        """
        share = HELD_OUT if self.held_out is None else self.held_out
        if not places or not share or min(places) < share:
            return share
        first, *others = sorted(set(places))
        if self.held_out is None and others:
            few = f"{len(places)} conversations are few: {places.count(first)} of them, all alike, are held out"
            warnings.warn(f"{few} for validation; --data.held-out 0 trains on all", stacklevel=2)
            return others[0]
        raise ValueError(
            f"data.held_out={share} holds out none of {len(places)} conversations; use --data.held-out 0 to train on "
            "all and validate on the same, or a larger share"
        )

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
            raise ValueError(f"data.paths: {error}") from None

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        conversations = self._parts[0]
        return self._fill([[conversations[i] for i in self._packing.row(first_row + row)] for row in range(rows)])

    def validation_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        """One conversation per row, so that a row is right when all answers in it are."""
        conversations = self._parts[1]
        return self._fill([[conversations[i]] for i in np.resize(rng.permutation(len(conversations)), rows)])

    def _fill(self, rows: list[list[Conversation]]) -> Batch:
        """Put conversations one behind the other; the rest of a row is padding without loss."""
        pad = self._tokenizer.pad_id
        ids = np.full((len(rows), self.seq_len + 1), 0 if pad is None else pad, np.int64)
        is_label = np.zeros(ids.shape, dtype=bool)
        # No conversation sees another. Padding belongs to the last, which does not see what comes behind it.
        documents = np.zeros(ids.shape, np.int64)
        for row, conversations in enumerate(rows):
            ends = np.cumsum([len(ids) for ids, _ in conversations])
            ids[row, : ends[-1]] = np.concatenate([ids for ids, _ in conversations])
            is_label[row, : ends[-1]] = np.concatenate([answer for _, answer in conversations])
            documents[row] = np.searchsorted(ends[:-1], np.arange(ids.shape[1]), side="right")
        return Batch.shifted(ids, is_label, documents)


def _records(path: str) -> Iterator[tuple[str, Any]]:
    """The records of a file, each with its place; a `Skipped` for one that is no JSON."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"data.paths: {path} is a folder, a pipe or a device; name a file of JSON lines")
    try:
        size = Path(path).stat().st_size
        unit = Unit(path, "json" if kind_of(path) == "json" else "jsonl", 0, size, size)
        console = Console(stderr=True)
        yield from progress.track(
            read_values(unit, RECORD_BYTES), f"reading {Path(path).name}", console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
    except OSError as error:
        what = f"data.paths: {path} cannot be read ({error.strerror})"
        raise ValueError(f"{what}; name a file of JSON lines") from None


def _place(messages: Sequence[Message]) -> float:
    """Where in [0, 1) a conversation falls: copies of one fall together."""
    text = json.dumps([[message["role"], message["content"]] for message in messages])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
