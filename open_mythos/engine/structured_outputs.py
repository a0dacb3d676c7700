"""Answers that match a JSON schema: which tokens may come next, by the library llguidance."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_mythos.extras import load
from open_mythos.tokenization.token_text import TokenTexts
from open_mythos.tokenization.tokenizer import Tokenizer

MAX_SCHEMA_CHARS = 2**16
"""Length of a JSON schema, at most. The library bounds the work that compiling it and each token may take."""
CACHED = 16
"""Compiled schemas in the cache."""
_LONGEST = 32
"""Bytes of a token, where a text is cut into tokens without the tokenizer."""


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, inner: Any, vocab_size: int) -> None:
        self._inner, self._vocab_size = inner, vocab_size

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next; none if the library has given up."""
        bits = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        if self._inner.is_error():
            known[:] = False
        return torch.from_numpy(known)

    def take(self, token: int) -> bool:
        """Go on by a token; whether it is one that may come."""
        return self._inner.consume_token(token)

    @property
    def done(self) -> bool:
        """Whether nothing but the end may come."""
        return self._inner.is_stopped()


class Grammars:
    """Matchers of schemas for one vocabulary. Safe to use from several threads.

    Args:
        vocab_size: of the model, which may have more ids than the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._vocabulary = lru_cache(1)(self._make_vocabulary)
        self._compiled = lru_cache(CACHED)(self._compile)

    def matcher(self, schema: str) -> Matcher:
        """A matcher at the beginning of an answer.

        Raises:
            ImportError: llguidance is not installed.
            ValueError: the schema is none, cannot be met, or is too much work.
        """
        return Matcher(self._compiled(schema).deep_copy(), self._vocab_size)

    def _compile(self, schema: str) -> Any:
        library = _library()
        if len(schema) > MAX_SCHEMA_CHARS:
            raise ValueError(f"json_schema has {len(schema)} characters, at most {MAX_SCHEMA_CHARS} are allowed")
        try:
            # One space at most: with any white space an answer could go on for ever between two values.
            grammar = library.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": " ?"})
        except ValueError as error:
            raise ValueError(f"json_schema is no object of JSON ({error!s:.100}); {_REMEDY}") from None
        inner = library.LLMatcher(self._vocabulary(), grammar, log_level=0)
        if inner.is_error() or not Matcher(inner.deep_copy(), self._vocab_size).allowed().any():
            reason = inner.get_error().splitlines() or ["nothing can match it"]
            raise ValueError(f"json_schema cannot be used ({reason[0]:.150}); {_REMEDY}")
        return inner

    def _make_vocabulary(self) -> Any:
        library = _library()
        return library.LLTokenizer(library.TokenizerWrapper(_Vocabulary(self._tokenizer)))


_REMEDY = 'use a schema such as {"type": "object", "properties": {"name": {"type": "string"}}}'


class _Vocabulary:
    """A tokenizer as llguidance takes it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = TokenTexts(tokenizer)
        self.tokens = [texts[i].raw for i in range(tokenizer.vocab_size)]
        self.special_token_ids = [i for i, raw in enumerate(self.tokens) if not raw]
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        if self.eos_token_id is None:  # an id that no model gives
            self.eos_token_id = len(self.tokens)
            self.tokens.append(b"")
            self.special_token_ids.append(self.eos_token_id)
        self._tokenizer = tokenizer
        self._of_bytes = {raw: i for i, raw in enumerate(self.tokens) if raw}

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of a text that the grammar forces. Their bytes have to be those of the text, nothing before it."""
        wanted = text.encode() if isinstance(text, str) else text
        for before in ("", "\n"):
            try:
                start = self._tokenizer.encode(before)
                ids = self._tokenizer.encode(before + wanted.decode(errors="replace"))
            except ValueError:  # no text of this vocabulary
                continue
            rest = ids[len(start) :]
            if ids[: len(start)] == start and b"".join(self.tokens[i] for i in rest) == wanted:
                return rest
        return self._longest_first(wanted)

    def _longest_first(self, wanted: bytes) -> list[int]:
        """The same from the left, the longest token first; empty if there is no token for a part."""
        ids, place = [], 0
        while place < len(wanted):
            parts = (wanted[place : place + n] for n in range(_LONGEST, 0, -1))
            part = next((part for part in parts if part in self._of_bytes), None)
            if part is None:
                return []
            ids.append(self._of_bytes[part])
            place += len(part)
        return ids


def _library() -> Any:
    return load("llguidance", "structured", "json_schema")
