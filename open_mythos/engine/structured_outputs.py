"""Answers that match a JSON schema: the library llguidance says which tokens may come next."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_mythos.extras import load
from open_mythos.tokenization.token_text import TokenTexts
from open_mythos.tokenization.tokenizer import Tokenizer

MAX_SCHEMA_CHARS = 2**16
"""The most characters of a JSON schema. The library limits the work of compiling it and of each token."""
CACHED = 16
"""Compiled schemas in the cache."""
_LONGEST = 32
"""The most bytes of a token where a text is cut into tokens without the tokenizer."""
_REMEDY = 'use a schema such as {"type": "object", "properties": {"name": {"type": "string"}}}'


class Matcher:
    """The state of one answer in its grammar."""

    def __init__(self, inner: Any, vocab_size: int) -> None:
        self._inner, self._vocab_size = inner, vocab_size

    def allowed(self) -> Tensor:
        """Return the tokens that may come next, (V,) bool; none if the library has given up."""
        bits = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        # After an error no token is allowed, which ends the request with an error.
        if self._inner.is_error():
            known[:] = False
        return torch.from_numpy(known)

    def take(self, token: int) -> bool:
        """Advance by a token; return False if the grammar does not allow it."""
        return self._inner.consume_token(token)

    @property
    def done(self) -> bool:
        """True if the answer is complete, so that nothing but the end may come."""
        return self._inner.is_stopped()


class Grammars:
    """Compiled schemas for one vocabulary. Several threads may use it.

    Args:
        vocab_size: the model's, which may have more ids than the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._vocabulary = lru_cache(1)(self._make_vocabulary)
        self._compiled = lru_cache(CACHED)(self._compile)

    def matcher(self, schema: str) -> Matcher:
        """Make the matcher of a new answer.

        Raises:
            ImportError: llguidance is not installed.
            ValueError: the schema is not valid, cannot be met, or is too much work.
        """
        return Matcher(self._compiled(schema).deep_copy(), self._vocab_size)

    def _compile(self, schema: str) -> Any:
        library = _library()
        if len(schema) > MAX_SCHEMA_CHARS:
            raise ValueError(f"json_schema has {len(schema)} characters, at most {MAX_SCHEMA_CHARS} are allowed")
        try:
            # At most one space between two values: an answer could otherwise go on with white space for ever.
            grammar = library.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": " ?"})
        except ValueError as error:
            raise ValueError(f"json_schema is no object of JSON ({error!s:.100}); {_REMEDY}") from None
        inner = library.LLMatcher(self._vocabulary(), grammar, log_level=0)
        # A schema that nothing can match allows no first token.
        if inner.is_error() or not Matcher(inner.deep_copy(), self._vocab_size).allowed().any():
            reason = inner.get_error().splitlines() or ["nothing can match it"]
            raise ValueError(f"json_schema cannot be used ({reason[0]:.150}); {_REMEDY}")
        return inner

    def _make_vocabulary(self) -> Any:
        library = _library()
        return library.LLTokenizer(library.TokenizerWrapper(_Vocabulary(self._tokenizer)))


class _Vocabulary:
    """A tokenizer in the form that llguidance takes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = TokenTexts(tokenizer)
        self.tokens = [texts[i].raw for i in range(tokenizer.vocab_size)]
        self.special_token_ids = [i for i, raw in enumerate(self.tokens) if not raw]
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        if self.eos_token_id is None:
            # The library needs an end token: an id that no model draws.
            self.eos_token_id = len(self.tokens)
            self.tokens.append(b"")
            self.special_token_ids.append(self.eos_token_id)
        self._tokenizer = tokenizer
        self._id_of = {raw: i for i, raw in enumerate(self.tokens) if raw}

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the tokens of a text that the grammar forces: exactly its bytes, without a leading space."""
        wanted = text.encode() if isinstance(text, str) else text
        # Some tokenizers put a space before the first word, so the text is tried at the start and behind a newline.
        for before in ("", "\n"):
            try:
                start = self._tokenizer.encode(before)
                ids = self._tokenizer.encode(before + wanted.decode(errors="replace"))
            except ValueError:
                # The vocabulary cannot write the text.
                continue
            rest = ids[len(start) :]
            if ids[: len(start)] == start and b"".join(self.tokens[i] for i in rest) == wanted:
                return rest
        return self._longest_first(wanted)

    def _longest_first(self, wanted: bytes) -> list[int]:
        """Return tokens for these bytes, the longest that fits at each place; none if a part has no token."""
        ids, place = [], 0
        while place < len(wanted):
            parts = (wanted[place : place + n] for n in range(_LONGEST, 0, -1))
            part = next((part for part in parts if part in self._id_of), None)
            if part is None:
                return []
            ids.append(self._id_of[part])
            place += len(part)
        return ids


def _library() -> Any:
    return load("llguidance", "structured", "json_schema")
