"""Checks of values that a caller gives: each message names the field, its value, what is allowed and the remedy.

A wrong type is a TypeError, a value out of range a ValueError. A bool is no number, and 2.0 is no int.
"""

import difflib
import math
import sys
from collections.abc import Sequence


def check_int(name: str, value: object, low: int, high: int | None = None, remedy: str = "") -> None:
    """Refuse anything but an int in [low, high]; the remedy, unless given, is the nearest int that is."""
    allowed = f"at least {low}" if high is None else f"between {low} and {high}"
    if type(value) is not int:
        raise TypeError(
            f"{name}={value!r} must be int, not {type(value).__name__}; {remedy or f'use an int that is {allowed}'}"
        )
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value} must be {allowed}; {remedy or f'use {name}={low if value < low else high}'}")


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
    """Refuse anything but a finite number in [low, high]; `above` leaves out low itself, and `below` high."""
    allowed = f"a finite number {'above' if above else 'of at least'} {low:g}"
    if high < math.inf:
        allowed += f" and {'below' if below else 'at most'} {high:g}"
    remedy = remedy or f"set {name} inside that range"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} must be {allowed}, not {type(value).__name__}; {remedy}")
    # NaN fails every comparison.
    inside = (low < value if above else low <= value) and (value < high if below else value <= high)
    # An int may lie beyond every float, where arithmetic with it fails much later.
    if not inside or value > sys.float_info.max:
        raise ValueError(f"{name}={value!s:.40} must be {allowed}; {remedy}")


def check_bool(name: str, value: object) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be bool, not {type(value).__name__}; use True or False")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse anything but one of the strings `allowed`; the remedy is the nearest of them."""
    choices = ", ".join(map(repr, allowed))
    if not isinstance(value, str):
        raise TypeError(
            f"{name}={value!r} must be one of {choices}, not {type(value).__name__}; use {name}={allowed[0]!r}"
        )
    if value not in allowed:
        near = difflib.get_close_matches(value.lower(), allowed, n=1, cutoff=0.4) or allowed
        raise ValueError(f"{name}={value!r} must be one of {choices}; use {name}={near[0]!r}")


def check_field(name: object, fields: Sequence[str], section: str = "") -> None:
    """Refuse a name that is none of `fields`; `section` is what stands before them, such as "optim."."""
    if name not in fields:
        near = difflib.get_close_matches(str(name), fields, n=1)
        remedy = f"did you mean {section + near[0]!r}?" if near else f"the fields are {', '.join(fields)}"
        raise ValueError(f"{f'{section}{name}'!r} is no field of the configuration; {remedy}")
