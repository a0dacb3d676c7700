"""The text and the bytes of single tokens, as they stand inside a text.

Decoding a token alone loses the space that SentencePiece-like vocabularies write before a word, since a text does not
begin with one; and half a character is no text at all, but it has bytes.
"""

import re
from dataclasses import dataclass

from open_mythos.tokenization.tokenizer import ByteTokenizer, Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token of SentencePiece-like vocabularies that stands for one byte."""
_TRIED = 4096
"""Tokens among which a letter or a digit is looked for; every published vocabulary has one near its beginning."""


@dataclass(frozen=True)
class TokenText:
    """Text and bytes that a token adds to a text."""

    text: str
    """With U+FFFD for a part of a character; empty for a special token."""
    raw: bytes
    name: str
    """An unambiguous name: the text, or `bytes:\\xe4` for a part of a character, or what the vocabulary calls it."""


class TokenTexts:
    """Texts of the tokens of a vocabulary by id, each decoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, TokenText] = {}
        ids = (i for i in range(min(tokenizer.vocab_size, _TRIED)) if not _BYTE.fullmatch(tokenizer.token_name(i)))
        self._before = next(([i] for i in ids if tokenizer.decode([i]).isalnum()), [])
        """A token that stands before the one that is decoded."""
        self._prefix = tokenizer.decode(self._before)

    def __getitem__(self, token: int) -> TokenText:
        if token not in self._known:
            self._known[token] = self._decode(token)
        return self._known[token]

    def _decode(self, token: int) -> TokenText:
        text = self._tokenizer.decode([*self._before, token])
        inside = text.startswith(self._prefix)
        text = text[len(self._prefix) :] if inside else self._tokenizer.decode([token])
        if not text:
            return TokenText("", b"", self._tokenizer.token_name(token))
        if "\ufffd" not in text:
            return TokenText(text, text.encode(), text)
        raw = _raw(self._tokenizer, token, text)
        return TokenText(text, raw, "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw))


def _raw(tokenizer: Tokenizer, token: int, text: str) -> bytes:
    """Return the bytes of a token whose text holds U+FFFD."""
    if isinstance(tokenizer, ByteTokenizer):
        return bytes([token])
    name = tokenizer.token_name(token)
    if byte := _BYTE.fullmatch(name):
        return bytes([int(byte[1], 16)])
    # Byte-level vocabularies write each byte as one character.
    return bytes(map(_OF_CHARACTER.__getitem__, name)) if name and _OF_CHARACTER.keys() >= set(name) else text.encode()


_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OF_CHARACTER = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}
"""The byte that each character of a byte-level vocabulary stands for, as GPT-2 has laid down.

Printable characters of Latin-1 stand for themselves; the other bytes, in order, for the characters from 256 on.
"""
