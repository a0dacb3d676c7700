"""Checks of values that a caller gives: each message names the field, its value, what is allowed and the remedy.

A wrong type is a TypeError, a value out of range a ValueError. A bool is no number, and 2.0 is no int.
Messages name a field and its value as Python has them, `n_loops=0`; `as_typed` turns them into what a command takes.
"""

import dataclasses
import difflib
import math
import re
import reprlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

VALUE = r"""'[^']*'|"[^"]*"|\([^)]*\)|\[[^\]]*\]|[^\s;,'"]*[^\s;,'".):]"""
"""Pattern of a value in a message: quoted, a tuple or list, or one word without the punctuation behind it."""

MAX_INT = 2**63 - 1
"""Largest integer of a tensor or an array."""


MOST_NAMED = 30
"""Fields that a message lists at most."""


class _Short(reprlib.Repr):
    """Writes a value for a message, cut to a line; the work does not grow with the size of the value."""

    maxstring = maxlong = maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write an integer of more than 4,300 digits.
        n_digits = int(x.bit_length() * math.log10(2)) + 1
        return repr(x) if n_digits <= self.maxlong else f"(an integer of about {n_digits} digits)"

    def repr_float(self, x: float, level: int) -> str:
        return repr(x)


shown = _Short().repr


def printable(text: str) -> str:
    """Return the text with escapes for what a terminal would act on: names of files and fields may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def check_int(name: str, value: object, low: int, high: int = MAX_INT, remedy: str = "") -> None:
    """Refuse anything but an int in [low, high]; without a `remedy` the message names the nearest allowed int."""
    if type(value) is not int:
        allowed = f"at least {low}" if high == MAX_INT else f"between {low} and {high}"
        raise TypeError(
            f"{name}={shown(value)} must be int, not {type(value).__name__}; "
            f"{remedy or f'use an int that is {allowed}'}"
        )
    if value < low or value > high:
        allowed = f"at least {low}" if high == MAX_INT > value else f"between {low} and {high}"
        nearest = f"use {name}={low if value < low else high}"
        raise ValueError(f"{name}={shown(value)} must be {allowed}; {remedy or nearest}")


def check_number(
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    remedy: str = "",
) -> None:
    """Refuse anything but a finite number in [low, high]; `above` excludes low itself, `below` high itself."""
    allowed = f"a finite number {'above' if above else 'of at least'} {low:g}"
    if high < math.inf:
        allowed += f" and {'below' if below else 'at most'} {high:g}"
    remedy = remedy or "use a number inside that range"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={shown(value)} must be {allowed}, not {type(value).__name__}; {remedy}")
    # NaN fails every comparison.
    inside = (low < value if above else low <= value) and (value < high if below else value <= high)
    # An int may lie beyond every float, where arithmetic with it fails much later.
    if not inside or value > sys.float_info.max:
        raise ValueError(f"{name}={shown(value)} must be {allowed}; {remedy}")


def check_bool(name: str, value: object) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)} must be bool, not {type(value).__name__}; use True or False")


def check_text(name: str, value: object, remedy: str = "give a name") -> None:
    """Refuse anything but a string that is not empty and has no NUL, which paths and names must not contain."""
    if not isinstance(value, str):
        raise TypeError(f"{name}={shown(value)} must be str, not {type(value).__name__}; give it as text in quotes")
    if not value or "\0" in value:
        raise ValueError(f"{name}={shown(value)} must be text that is not empty and without NUL; {remedy}")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse anything but one of the strings `allowed`; the remedy is the nearest of them."""
    choices = ", ".join(map(repr, allowed))
    if not isinstance(value, str):
        raise TypeError(
            f"{name}={shown(value)} must be one of {choices}, not {type(value).__name__}; use {name}={allowed[0]!r}"
        )
    if value not in allowed:
        near = difflib.get_close_matches(value[:80].lower(), allowed, n=1, cutoff=0.4) or allowed
        raise ValueError(f"{name}={shown(value)} must be one of {choices}; use {name}={near[0]!r}")


@dataclasses.dataclass(frozen=True)
class Range:
    """Values that a number may have, as the type of a field declares them: `lr: Annotated[float, Range(0)]`."""

    low: float = 0
    high: float = math.inf
    above: bool = False
    below: bool = False


NonNegativeInt = Annotated[int, Range(0)]
PositiveInt = Annotated[int, Range(1)]
NonNegativeFloat = Annotated[float, Range(0)]
PositiveFloat = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1, below=True)]


def check_section(section: Any, prefix: str = "") -> None:
    """Refuse a dataclass with a value outside of its field's type: bool, Literal, or a number with a `Range`.

    None passes where the type has it. Texts, tuples and sections are left to whoever knows what they hold.
    """
    for field, (kind, limits, is_optional) in _field_types(type(section)).items():
        value, name = getattr(section, field), f"{prefix}{field}"
        if value is None and is_optional:
            continue
        if kind is bool:
            check_bool(name, value)
        elif get_origin(kind) is Literal:
            check_choice(name, value, get_args(kind))
        elif kind is int and limits is not None:
            check_int(name, value, int(limits.low), MAX_INT if limits.high == math.inf else int(limits.high))
        elif kind is float and limits is not None:
            check_number(name, value, limits.low, limits.high, above=limits.above, below=limits.below)


@cache
def _field_types(cls: Any) -> dict[str, tuple[Any, Range | None, bool]]:
    """Return for each field of a dataclass its type without None, its `Range`, and whether it may be None."""
    hints, found = get_type_hints(cls, include_extras=True), {}
    for field in dataclasses.fields(cls):
        hint, limits = hints[field.name], None
        is_optional = get_origin(hint) is not Literal and type(None) in get_args(hint)
        if is_optional:
            [hint] = [each for each in get_args(hint) if each is not type(None)][:1]
        if get_origin(hint) is Annotated:
            hint, limits = get_args(hint)[0], next((m for m in hint.__metadata__ if isinstance(m, Range)), None)
        found[field.name] = (hint, limits, is_optional)
    return found


def check_field(name: object, fields: Sequence[str], section: str = "") -> None:
    """Refuse a name that is none of `fields`; `section` is their prefix, such as "optim."."""
    if name not in fields:
        near = difflib.get_close_matches(name[:80], fields, n=1) if isinstance(name, str) else []
        more = f" and {len(fields) - MOST_NAMED} more" if len(fields) > MOST_NAMED else ""
        known = f"the fields are {', '.join(fields[:MOST_NAMED])}{more}"
        remedy = f"did you mean {section + near[0]!r}?" if near else known
        raise ValueError(
            f"{shown(f'{section}{name}' if isinstance(name, str) else name)} is no field of the configuration; {remedy}"
        )


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown word: the nearest known word, or nothing."""
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def as_typed(message: str, flag_of: Mapping[str, str]) -> str:
    """Write fields and values in a message as the command line has them: --n-loops 0 for n_loops=0.

    A field of a section is known without the section's name too, if no other has that name.
    """
    ends = [field.rpartition(".")[2] for field in flag_of]
    known = {end: flag for end, flag in zip(ends, flag_of.values(), strict=True) if ends.count(end) == 1} | dict(
        flag_of
    )
    names = "|".join(sorted((re.escape(name) for name in known), key=len, reverse=True))
    if not names:
        return message

    def with_value(match: re.Match) -> str:
        flag, value = known[match[1]], match[2]
        if flag and value.lower() in ("true", "false"):
            return flag if value.lower() == "true" else f"--no-{flag[2:]}"
        if value[0] in "([":
            words = [word.strip(" '\"") for word in value[1:-1].split(",")]
            value = " ".join(shlex.quote(word) for word in words if word)
        elif value[0] in "'\"":
            value = shlex.quote(value[1:-1])
        return f"{flag} {value}".strip()

    message = re.sub(rf"(?<![\w.-])({names})=({VALUE})", with_value, message)
    # Without a value only what cannot be an English word.
    return re.sub(
        rf"(?<![\w./-])({names})(?![\w./=-])",
        lambda match: known[match[1]] if {"_", "."} & set(match[1]) and known[match[1]] else match[0],
        message,
    )
