"""Tokenizers: raw bytes, a BPE trained on a file, the symbols of a synthetic task, or a published vocabulary.

    tokenizer = BPETokenizer.train_from_text(novel(), vocab_size=2048)
    tokenizer.save(folder)
    tokenizer = load_tokenizer(folder)

`encode` adds no begin or end token; `decode` leaves special tokens out and ignores ids that no token has.
"""

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from open_mythos.checks import check_int, shown
from open_mythos.files import inside, read_json
from open_mythos.tokenization import limits
from open_mythos.tokenization.limits import MAX_ENTRIES, MAX_SYMBOLS, raise_named

HUB_FILE = "tokenizer.json"  # the format of the `tokenizers` library, with the special tokens' roles in HUB_ROLES
HUB_ROLES = "tokenizer_config.json"
OWN_FILE = "mythos_tokenizer.json"  # bytes and symbols


class Tokenizer(ABC):
    """A vocabulary: text to ids and back."""

    vocab_size: int
    """One more than the largest id; a model needs at least this many rows in its embedding."""
    bos_id: int | None
    """Id of the begin token; None, like the two below, in a vocabulary without one."""
    eos_id: int | None
    pad_id: int | None
    unknown_token: str | None = None
    """Name of the special token that stands for unknown characters."""

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of marks that are not text. The token for unknown characters is text."""
        return frozenset(i for i in (self.bos_id, self.eos_id, self.pad_id) if i is not None)

    def normalize(self, text: str) -> str:
        """Return the text that is split into tokens: `text` after the normalizer, such as lower case."""
        return text

    def token_name(self, token_id: int) -> str:
        """Return what the vocabulary calls a token; empty if it has no name, or there is no token of that id."""
        return {self.bos_id: "<bos>", self.eos_id: "<eos>", self.pad_id: "<pad>"}.get(token_id, "")

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str: ...

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the file that `load_tokenizer(folder)` reads; the folder is made if it is absent."""


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, then <bos>, <eos> and <pad>. Bytes that are not UTF-8 decode to U+FFFD."""

    vocab_size = 259
    bos_id, eos_id, pad_id = 256, 257, 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        _write(folder, OWN_FILE, {"type": "bytes"})


class SymbolTokenizer(Tokenizer):
    """A fixed list of symbols; a symbol's id is its place in the list.

    Text is read from the left, the longest symbol first; white space between symbols means nothing.

    Args:
        symbols: different, non-empty strings without white space.
        bos, eos, pad: which of the symbols are the special tokens.
        separator: put between symbols when ids become text; " " where symbols have several characters.
    """

    def __init__(
        self,
        symbols: Sequence[str],
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        separator: str = "",
    ) -> None:
        counts = Counter(symbols)
        bad = [s for s in symbols if not s or re.search(r"\s", s) or counts[s] > 1]
        if bad or not symbols:
            raise ValueError(
                f"symbols={(bad or list(symbols))!r:.100} must be different and without white space; rename them"
            )
        if len(symbols) > MAX_SYMBOLS or max(map(len, symbols)) > MAX_SYMBOLS or not isinstance(separator, str):
            raise ValueError(
                f"symbols: {len(symbols)} with separator={shown(separator)} must be at most {MAX_SYMBOLS} of at most "
                f"{MAX_SYMBOLS} characters, and a string; use fewer and shorter ones"
            )
        self.symbols = list(symbols)
        self.separator = separator
        self._roles = {"bos": bos, "eos": eos, "pad": pad}
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        for role, symbol in self._roles.items():
            if symbol is not None and symbol not in self._ids:
                raise ValueError(f"{role}={symbol!r} must be one of the symbols; add it to them")
        self.vocab_size = len(self.symbols)
        self.bos_id, self.eos_id, self.pad_id = (self._ids.get(name) for name in (bos, eos, pad))
        longest_first = sorted(self.symbols, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) + r"|\s+|.", re.DOTALL)

    def encode(self, text: str) -> list[int]:
        """Return the ids of the symbols in `text`.

        Raises:
            ValueError: part of the text is no symbol.
        """
        ids = []
        for match in self._pattern.finditer(text):
            if match[0] in self._ids:
                ids.append(self._ids[match[0]])
            elif not match[0].isspace():
                where = f"{match[0]!r} at position {match.start()} of {text!r:.60}"
                raise ValueError(f"{where} starts no symbol; use {' '.join(self.symbols):.200}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        texts = (self.symbols[i] for i in ids if 0 <= i < self.vocab_size and i not in self.special_ids)
        return self.separator.join(texts)

    def save(self, folder: str | Path) -> None:
        fields = {"symbols": self.symbols, "separator": self.separator, **self._roles}
        _write(folder, OWN_FILE, {"type": "symbols", **fields})


class BPETokenizer(Tokenizer):
    """A vocabulary of the `tokenizers` library. Special tokens written out in a text become their ids.

    Args:
        backend: the library's tokenizer.
        bos, eos, pad: names of the special tokens; one that the vocabulary lacks has the id None.
        growth: the most characters that the normalizer may make of one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None = "<bos>",
        eos: str | None = "<eos>",
        pad: str | None = "<pad>",
        growth: int = 1,
    ) -> None:
        self.backend = backend
        self._growth = growth
        self._roles = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        # Not the number of tokens: published vocabularies have gaps below their special tokens.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_id, self.pad_id = (None if n is None else backend.token_to_id(n) for n in (bos, eos, pad))

    @staticmethod
    def train_from_text(text: str, vocab_size: int) -> "BPETokenizer":
        """Train a byte-level BPE with <bos>, <eos> and <pad> as ids 0 to 2; other text comes back exactly.

        Args:
            text: what to train on; short or repetitive text gives fewer tokens than requested.
            vocab_size: at least 259 (256 bytes and three special tokens).
        """
        return BPETokenizer.train([text], vocab_size)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Train as `train_from_text` does, on an iterable of texts that is consumed once."""
        check_int("vocab_size", vocab_size, ByteTokenizer.vocab_size, MAX_ENTRIES, "use vocab_size=4096")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = ["<bos>", "<eos>", "<pad>"]
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(iter(texts), trainer)
        return BPETokenizer(backend)

    @staticmethod
    def load(path: str | Path) -> "BPETokenizer":
        """Read a `tokenizer.json`, and the special tokens' names from the `tokenizer_config.json` beside it, if any."""
        return BPETokenizer(**_read(Path(path)))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the begin, end and padding tokens and of every added token of the library's kind "special".

        The token for unknown characters counts only if it is also one of the three: a text that holds a rare character
        has not written a special token out.
        """
        return super().special_ids | {i for i in self._added if i != self._unknown_id}

    @cached_property
    def unknown_token(self) -> str | None:
        return None if self._unknown_id is None else self._added.get(self._unknown_id)

    def token_name(self, token_id: int) -> str:
        return self.backend.id_to_token(token_id) or ""

    @cached_property
    def _added(self) -> dict[int, str]:
        return {i: token.content for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _unknown_id(self) -> int | None:
        model = self.backend.model
        if isinstance(model, models.Unigram):  # the one kind whose object does not say
            return json.loads(self.backend.to_str())["model"]["unk_id"]
        return None if model.unk_token is None else self.backend.token_to_id(model.unk_token)

    def normalize(self, text: str) -> str:
        return text if self.backend.normalizer is None else self.backend.normalizer.normalize_str(text)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            ValueError: the vocabulary cannot encode it, or its normalizer makes it far longer.
        """
        try:
            if self._growth > limits.MAX_GROWTH:
                limits.check_growth(self.backend.normalizer, text, self._growth)
            # `encode` of one text keeps all other threads from running, for a second per megabyte.
            return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except BaseException as error:
            raise_named(error, "the tokenizer cannot encode this text; use another tokenizer or text")

    def decode(self, ids: Sequence[int]) -> str:
        try:
            return self.backend.decode(list(ids), skip_special_tokens=True)
        except BaseException as error:
            raise_named(error, "the tokenizer cannot decode these ids; use another tokenizer")

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`; transformers' AutoTokenizer reads them too."""
        _write(folder, HUB_ROLES, {"tokenizer_class": "PreTrainedTokenizerFast", **self._roles})
        self.backend.save(str(Path(folder) / HUB_FILE))


class MythosTokenizer(BPETokenizer):
    """A published vocabulary, by default the one of the 0.5.0 training script.

    Args:
        model_id: a folder with `tokenizer.json`, such a file, or the name of a model on the Hugging Face hub.

    Raises:
        OSError: the name is no local path and the hub does not give the file.
    """

    def __init__(self, model_id: str = "openai/gpt-oss-20b") -> None:
        path = Path(model_id)
        if path.is_dir():
            path = inside(path, HUB_FILE)
        super().__init__(**_read(path if path.exists() else _download(model_id)))


def n_bytes(tokenizer: Tokenizer, token_id: int) -> int:
    """Return the bytes of UTF-8 that a token adds to a text which begins with it; none if it is special."""
    text = tokenizer.decode([token_id])
    if "\ufffd" not in text:
        return len(text.encode())
    # Part of a character. Byte-level vocabularies write each byte as a character, others one byte as <0x..>.
    name = tokenizer.token_name(token_id)
    return 1 if name.startswith("<0x") else max(1, len(name))


def open_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that a name stands for: "bytes", a folder, a `tokenizer.json`, or a model of the hub."""
    if name == "bytes":
        return ByteTokenizer()
    return load_tokenizer(name) if Path(name).is_dir() else MythosTokenizer(name)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer that was saved in a folder, such as a model folder.

    Raises:
        FileNotFoundError: the folder holds no tokenizer.
        ValueError: the file is none that this version writes.
    """
    folder = Path(folder)
    hub, own = inside(folder, HUB_FILE), inside(folder, OWN_FILE)
    if hub.exists():
        inside(folder, HUB_ROLES)
        return BPETokenizer.load(hub)
    if not own.exists():
        raise FileNotFoundError(
            f"{folder} holds neither {HUB_FILE} nor {OWN_FILE}; save one there with tokenizer.save({str(folder)!r})"
        )
    try:
        match read_json(own, 2**20):
            case {"type": "bytes"}:
                return ByteTokenizer()
            case {"type": "symbols", "symbols": symbols, **rest}:
                return SymbolTokenizer(symbols, **rest)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{own} cannot be read ({error!s:.200}); save the tokenizer again") from error
    raise ValueError(f"{own} has no type 'bytes' or 'symbols'; save the tokenizer again")


def _write(folder: str | Path, name: str, value: dict[str, object]) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _read(path: Path) -> dict[str, Any]:
    """Return the arguments of BPETokenizer from a file and the `tokenizer_config.json` beside it."""
    text, growth = limits.read_checked(path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        raise_named(error, f"{path} is no {HUB_FILE} of the tokenizers library; save it again")
    # Files may ask that every text be cut or filled up to a length, of any size; ids are those of the text alone.
    backend.no_truncation()
    backend.no_padding()
    return {"backend": backend, "growth": growth, **limits.read_roles(path.with_name(HUB_ROLES))}


def _download(model_id: str) -> Path:
    """Return a local copy of a hub model's tokenizer, with its special tokens' names beside it if the model has any."""
    # `tokenizers` depends on huggingface_hub, so it is there; it is slow to import and needed here only.
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        # Asked once: a download tries for half a minute to reach a hub that cannot be reached.
        if not isinstance(try_to_load_from_cache(model_id, HUB_FILE), str):
            get_hf_file_metadata(hf_hub_url(model_id, HUB_FILE))
        path = Path(hf_hub_download(model_id, HUB_FILE))
        with suppress(RemoteEntryNotFoundError):
            hf_hub_download(model_id, HUB_ROLES)
        return path
    except Exception as error:  # of the hub, or of whatever library carries its requests
        raise OSError(
            f"tokenizer {model_id!r} is no local path and the Hugging Face hub does not give its {HUB_FILE}; check the "
            "name and the connection, or pass a folder that holds the file"
        ) from error
