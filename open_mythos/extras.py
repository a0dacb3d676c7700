"""Optional packages: import one, or say what to install where it is missing."""

import re
import shlex
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires
from types import ModuleType

DISTRIBUTION = "open-mythos-rdt"


def load(module: str, extra: str, feature: str, package: str = "") -> ModuleType:
    """Import a module of an extra. A feature that needs one `package` of the extra alone names it.

    Raises:
        ImportError: its package is missing. The message names packages that an index has, so that it also serves a user
            who has a wheel of this package and no clone.
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = package or (error.name or module).partition(".")[0].replace("_", "-")
        remedy = f"run: pip install {packages(extra, package)}"
        raise ImportError(f"{feature}: the package {name} is missing; {remedy}") from error


def packages(extra: str, package: str = "") -> str:
    """Return the requirements of an extra, or one of them, as arguments of pip with the declared bounds."""
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError as error:  # a source tree that is not installed
        raise ImportError(f"{DISTRIBUTION} is not installed; run: pip install -e '.[{extra}]' in its folder") from error
    marked = re.compile(rf"^{package}.*extra == ['\"]{extra}['\"]")
    return " ".join(shlex.quote(line.partition(";")[0].strip()) for line in lines if marked.search(line))
