"""Experiments, one file each: a question, a protocol, raw numbers, a figure and a report, by one command."""

NAMES: tuple[str, ...] = (
    "addition",
    "khop",
    "parity",
    "brackets",
    "verify",
    "exits",
    "loop_roles",
    "adaptive",
    "small_text",
)
"""The experiments, in the order of `mythos exp list`."""
