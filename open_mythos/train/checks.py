"""Checks of configuration fields; each message names the field, its value, what is allowed and the remedy."""

import math
from collections.abc import Sequence


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse anything but an int (bool is none) in [low, high]."""
    if type(value) is not int or value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"from {low} to {high}"
        nearest = low if type(value) is not int or value < low else high
        raise ValueError(f"{name}={value!r} must be an integer {allowed}; use {name}={nearest}")


def check_number(name: str, value: object, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Refuse anything but a finite number in [low, high], or in (low, high] with `above`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < low or value > high or (above and value == low):
        bound = f"above {low:g}" if above else f"at least {low:g}"
        upper = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name}={value!r} must be a finite number {bound}{upper}; set {name} inside that range")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value outside `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}; use {name}={allowed[0]}")
