"""Limits on `tokenizer.json`, which is a small program that runs on every prompt.

Its normalizer, pre-tokenizer and decoder are lists of steps that rewrite text. A file from elsewhere could make one
character as long as memory, or hold a pattern that never ends. It is therefore checked before the library builds it:
the number and length of its entries, the number of its steps, how far these may make a text grow, and its patterns,
which a short-lived process tries (`pattern_probe.py`). The growth that Unicode allows is measured on each text.
"""

import base64
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from open_mythos.checks import MAX_INT, check_int, shown
from open_mythos.files import blamed_on, parse_json, read_json, read_text

MAX_FILE_BYTES = 2**26
"""The largest published files have about 34 MB."""
MAX_ENTRIES = 2**19
"""Tokens of a vocabulary, and half of its merges. The largest published ones have about 262,000 and 515,000."""
MAX_ADDED = 2**16
MAX_COLONS, MAX_COMMAS = MAX_ENTRIES + 8 * MAX_ADDED, 5 * MAX_ENTRIES + 8 * MAX_ADDED
"""In a file with these: an added token has seven fields, a merge is a list of two."""
MAX_ID = 2**20
MAX_SYMBOLS = 1024
"""Symbols of a task's own vocabulary, and characters of one: at each place of a text all of them are tried."""
MAX_TOKEN_CHARS = 1024
MAX_STEPS = 64
MAX_PATTERN_CHARS = 2**14
MAX_REWRITING = 16
"""How many times as long the steps Replace and Prepend together may make a text."""
MAX_UNICODE = 2**16
"""The same for the other steps: a bound by their kind, far above what they do to any text."""
MAX_GROWTH, FREE_CHARS = 8, 2**16
"""Normalised text may have 8 times the characters of the text, and 65,536 more."""
PROBED_CHARS = 2**20

GROWTH = {
    "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "BertNormalizer": 4, "Metaspace": 2,
    "ByteLevel": 5,  # a character of four bytes becomes four, and a space may be put before them
}  # fmt: skip
"""The most characters that a step makes of one."""
NEVER_EMPTY = re.compile(r"(\\.|[^\\\[\](){}.*+?|^$]|\[[^\[\]&]+\])(\+|\{[1-9]\d*(,\d*)?\})?")
"""Patterns of one character or class, repeated at least once: these match nothing empty."""


def read_checked(path: Path) -> tuple[str, int]:
    """Return the text of a `tokenizer.json` within the limits, and how long its normalizer may make a character.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object, or goes beyond a limit.
    """
    text = read_text(path, MAX_FILE_BYTES)
    # Counted before the file is parsed, which takes seconds for millions of entries.
    if text.count(":") > MAX_COLONS or text.count(",") > MAX_COMMAS:
        raise ValueError(
            f"{path} has more than {MAX_ENTRIES} tokens, {2 * MAX_ENTRIES} merges or {MAX_ADDED} added tokens; use a "
            "smaller vocabulary"
        )
    try:
        if not isinstance(values := parse_json(text, "it"), dict):
            raise ValueError("it holds no object; save it again")
    except ValueError as error:
        raise ValueError(f"{path} is no tokenizer.json of the tokenizers library: {error}") from error
    growth, patterns = dict[str, int](), list[Any]()
    with blamed_on(path):
        _check_entries(values)
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            steps = list(_steps(values.get(part), part))
            rewriting, unicode = math.prod(map(_rewriting, steps)), math.prod(map(_unicode, steps))
            growth[part] = rewriting * unicode
            if rewriting > MAX_REWRITING or unicode > (MAX_UNICODE if part == "normalizer" else MAX_REWRITING):
                raise ValueError(
                    f"{part} can make a text more than {MAX_REWRITING} times as long "
                    f"(about {min(growth[part], MAX_INT):.3g} times); remove steps from it"
                )
            patterns += [each.get("Regex") for step in steps if isinstance(each := step.get("pattern"), dict)]
        for step in _steps(values.get("post_processor"), "post_processor"):
            pieces = single if isinstance(single := step.get("single"), list) else []
            if sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces) > 1:
                raise ValueError("post_processor repeats the text; name the sequence once in its template")
        _try_patterns(tuple(dict.fromkeys(each for each in patterns if isinstance(each, str))))
    return text, growth["normalizer"]


def read_roles(path: Path) -> dict[str, str | None]:
    """Return the special tokens of a `tokenizer_config.json` as arguments of BPETokenizer, or {} without the file."""
    if not path.exists():
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object; save the tokenizer again")
    named = {role: config.get(f"{role}_token") for role in ("bos", "eos", "pad")}
    roles = {role: token.get("content") if isinstance(token, dict) else token for role, token in named.items()}
    for role, name in roles.items():
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{path} has {role}_token={shown(name)}, which must be a string; save the tokenizer again")
    return roles


def check_growth(normalizer: Any, text: str, growth: int) -> None:
    """Refuse a text that the library's normalizer makes much longer.

    It is normalised a piece at a time, so that this needs little memory whatever the text.
    """
    n, most = max(1, PROBED_CHARS // growth), MAX_GROWTH * len(text) + FREE_CHARS
    n_chars = 0
    for at in range(0, len(text), n):
        n_chars += len(normalizer.normalize_str(text[at : at + n]))
        if n_chars > most:
            raise ValueError(
                f"a text of {len(text)} characters becomes longer than {most} when the tokenizer normalises it; "
                f"shorten it, or leave out its rare characters"
            )


def raise_named(error: BaseException, what: str) -> NoReturn:
    """Raise what the tokenizers library raised, its panics included, as a ValueError that begins with `what`."""
    # A panic of the library is a BaseException, and its class cannot be imported.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    raise ValueError(f"{what} ({error!s:.200})") from error


def _check_entries(values: dict[str, Any]) -> None:
    model = model if isinstance(model := values.get("model"), dict) else {}
    vocab, added = model.get("vocab"), values.get("added_tokens")
    entries = vocab if isinstance(vocab, dict | list) else []
    limits = (("model.vocab", MAX_ENTRIES), ("model.merges", 2 * MAX_ENTRIES), ("added_tokens", MAX_ADDED))
    for (name, most), each in zip(limits, (vocab, model.get("merges"), added), strict=True):
        if isinstance(each, dict | list) and len(each) > most:
            raise ValueError(f"{name} has {len(each)} entries, and may have {most}; use a smaller vocabulary")
    tokens = [each[0] if isinstance(each, list) and each else each for each in entries]
    added = [each for each in added if isinstance(each, dict)] if isinstance(added, list) else []
    for name, texts in (("model.vocab", tokens), ("added_tokens", [each.get("content") for each in added])):
        longest = max((token for token in texts if isinstance(token, str)), key=len, default="")
        if len(longest) > MAX_TOKEN_CHARS:
            raise ValueError(
                f"{name} has a token of {len(longest)} characters, {shown(longest)}; it may have {MAX_TOKEN_CHARS}"
            )
    ids = list(entries.values()) if isinstance(entries, dict) else []
    if ids or added:
        largest = max((i for i in (*ids, *(each.get("id") for each in added)) if isinstance(i, int)), default=0)
        check_int("the largest id of a token", largest, 0, MAX_ID)
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if isinstance(affix := model.get(name), str) and len(affix) > MAX_TOKEN_CHARS // 16:
            raise ValueError(f"model.{name}={shown(affix)} may have {MAX_TOKEN_CHARS // 16} characters; shorten it")
    # WordPiece tries every part of a word: its work grows with the cube of this.
    check_int("model.max_input_chars_per_word", model.get("max_input_chars_per_word", 100), 0, 256)


def _steps(part: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer, pre-tokenizer or decoder, those of nested sequences included."""
    waiting, n = [part], 0
    while waiting:
        step = waiting.pop()
        if not isinstance(step, dict):
            continue
        n += 1
        if n > MAX_STEPS:
            raise ValueError(f"{name} has more than {MAX_STEPS} steps; remove some")
        yield step
        waiting += [each for value in step.values() if isinstance(value, list) for each in value]


def _rewriting(step: dict[str, Any]) -> int:
    """Return how many times as long Replace or Prepend may make a text."""
    if isinstance(text := step.get("prepend"), str):
        return 1 + len(text)  # before each piece of text between special tokens
    pattern, content = step.get("pattern"), step.get("content")
    if not isinstance(pattern, dict) or not isinstance(content, str):
        return 1
    if isinstance(fixed := pattern.get("String"), str):
        return max(1, math.ceil(len(content) / max(1, len(fixed))))
    never_empty = NEVER_EMPTY.fullmatch(str(pattern.get("Regex")))
    return max(1, len(content)) if never_empty else 1 + len(content)


def _unicode(step: dict[str, Any]) -> int:
    """Return the most characters that any other step makes of one."""
    if not isinstance(charsmap := step.get("precompiled_charsmap"), str):
        return GROWTH.get(str(step.get("type")), 1)
    # The size of a trie, the trie, and the strings that it points into, each with a NUL behind it.
    blob = base64.b64decode(charsmap)
    return max(1, *map(len, blob[4 + int.from_bytes(blob[:4], "little") :].split(b"\0")))


@lru_cache(maxsize=64)
def _try_patterns(patterns: tuple[str, ...]) -> None:
    """Refuse patterns that are long, or fail or take long or much memory on short texts."""
    if not patterns:
        return
    if (n := max(map(len, patterns))) > MAX_PATTERN_CHARS:
        raise ValueError(f"a pattern has {n} characters, and may have {MAX_PATTERN_CHARS}; shorten it")
    command = [sys.executable, "-P", str(Path(__file__).with_name("pattern_probe.py"))]
    done = subprocess.run(command, input=json.dumps(patterns), capture_output=True, text=True, check=False)
    if done.returncode:
        slow = done.returncode == -signal.SIGPROF
        reason = "takes too long on a short text" if slow else (done.stdout.strip() or "needs too much memory")
        raise ValueError(f"a pattern {reason:.300}; the patterns are {shown(patterns)}: simplify them")
