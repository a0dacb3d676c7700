"""The sides of a comparison: what a worker process can build."""

from importlib import import_module
from typing import Any


def first_of(*names: str) -> Any:
    """Import the first of these, each "MODULE:NAME", that the checkout has: an older one has other modules."""
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise ImportError(f"the checkout has none of {', '.join(names)}")
