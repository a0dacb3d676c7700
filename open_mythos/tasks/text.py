"""Text as bytes or as tokens of its own BPE. The last part of the file is held out, by construction.

The tokenizer is made from the training part alone, so nothing of the held-out part reaches the model.
"""

import hashlib
import io
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from open_mythos.assets import novel
from open_mythos.checks import PositiveInt, Range
from open_mythos.data.text_files import DAMAGE, Unreadable, convert_command, explain, open_utf8
from open_mythos.tasks.task import Batch, FileTask
from open_mythos.tokenization.limits import MAX_ENTRIES
from open_mythos.tokenization.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer


@dataclass(frozen=True)
class Text(FileTask):
    """Windows of `seq_len` tokens at uniformly random places of a text file."""

    path: str | None = None
    """File to read; None is the novel that ships with the package."""
    kind: Literal["bytes", "bpe"] = "bytes"
    bpe_vocab_size: Annotated[int, Range(ByteTokenizer.vocab_size, MAX_ENTRIES)] = 1024
    """Tokens of the BPE; kind="bpe" only."""
    seq_len: PositiveInt = 128
    held_out: Annotated[float, Range(0, 0.9, above=True)] = 0.1
    """Share of the characters, from the end, that is never trained on."""

    name = "text"
    on_disk = False

    @property
    def vocab_size(self) -> int:
        return self.bpe_vocab_size if self.kind == "bpe" else ByteTokenizer.vocab_size

    @cached_property
    def _parts(self) -> tuple[str, str]:
        """Read training text and held-out text."""
        text = novel() if self.path is None else read_text(Path(self.path))
        cut = int(len(text) * (1 - self.held_out))
        return text[:cut], text[cut:]

    def digests(self) -> dict[str, str]:
        return {"data.path": hashlib.sha256("".join(self._parts).encode()).hexdigest()}

    def resume(self, digests: Mapping[str, str], tokenizer: Tokenizer) -> None:
        # Another version of the `tokenizers` library could train another one, whose ids the weights do not know.
        self._replace_cached("_tokenizer", tokenizer)

    def open_tokenizer(self) -> BPETokenizer | ByteTokenizer:
        if self.kind == "bytes":
            return ByteTokenizer()
        return BPETokenizer.train_from_text(self._parts[0], self.bpe_vocab_size)

    @cached_property
    def _tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Encode both parts, each of which has to be long enough for one window.

        Raises:
            ValueError: a part is shorter than a window.
        """
        train, held_out = (np.array(self._tokenizer.encode(part), dtype=np.int32) for part in self._parts)
        shortest = min(len(train), len(held_out))
        if shortest <= self.seq_len:
            raise ValueError(
                f"data.seq_len={self.seq_len} must be below the {shortest} tokens of the shorter part of the text; "
                "use a shorter window, a longer text or a larger data.held_out"
            )
        return train, held_out

    @property
    def bytes_per_token(self) -> float:
        return len(self._parts[1].encode()) / len(self._tokens[1])

    def batch(self, rng: np.random.Generator, rows: int, depths: np.ndarray | None = None, first_row: int = 0) -> Batch:
        return self._windows(self._tokens[0], rng, rows)

    def validation_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        return self._windows(self._tokens[1], rng, rows)

    def _windows(self, tokens: np.ndarray, rng: np.random.Generator, rows: int) -> Batch:
        starts = rng.integers(0, len(tokens) - self.seq_len, size=rows)
        return Batch.shifted(tokens[starts[:, None] + np.arange(self.seq_len + 1)])


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in what its byte order mark says; it may be compressed with gzip.

    Raises:
        ValueError: the file is absent, a folder or no text; the message says what to do.
    """
    if path.is_dir():
        folder = shlex.quote(str(path))
        raise ValueError(
            f"data.path={path} is a folder, and the task text reads one file; prepare the folder for small-text:\n"
            f"mythos train-tokenizer {folder} --vocab-size 2048 --out data/bpe\n"
            f"mythos prepare-data {folder} --tokenizer data/bpe --cut paragraphs --out data/own\n"
            "mythos train small-text --data.paths data/own --out runs/own"
        )
    if path.exists() and not path.is_file():
        raise ValueError(f"data.path={path} is a pipe or a device; use the path of a text file")
    try:
        with io.TextIOWrapper(open_utf8(str(path)), encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.path={path} is not UTF-8 at byte {error.start}; convert it first: {convert_command(str(path))}"
        ) from None
    except (Unreadable, *DAMAGE) as error:
        skipped = explain(error, str(path))
        raise ValueError(f"data.path={path} is {skipped.reason} ({skipped.why}); {skipped.remedy}") from None
    except OSError as error:
        raise ValueError(f"data.path: {error}; use the path of a text file") from None
