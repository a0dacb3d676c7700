"""Files of a user's own that add parts to the tables: `mythos --plugin FILE ...`, or an entry point of a package.

They are code, and run with the user's rights: only what the command line or an installed package names is loaded, never
what a model folder asks for.
"""

import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from open_mythos.files import FileError

FLAG, GROUP = "--plugin", "open_mythos.plugins"
_given: list[str] = []
"""Files of the command line."""


def program() -> str:
    """Name the command as this shell calls it, with the files that it was started with."""
    from open_mythos.reports import terminal

    return " ".join([terminal.program(), *(f"{FLAG} {shlex.quote(file)}" for file in _given)])


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `--plugin FILE`, wherever it stands, out of a command line; return the files and the rest.

    Raises:
        ValueError: a `--plugin` without a file.
    """
    files, rest, words = [], [], iter(args)
    for word in words:
        flag, equals, file = word.partition("=")
        if flag != FLAG:
            rest.append(word)
        elif file := file if equals else next(words, ""):
            files.append(file)
        else:
            raise ValueError("--plugin needs a file; use --plugin my_parts.py")
    return files, rest


def load(files: Sequence[str]) -> None:
    """Run the plugins of installed packages, then these files.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: a plugin raises; the message names its file and line.
    """
    _given[:] = files
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            raise FileError(f"plugin {point.name} ({point.value}): {_where(error)}; repair or uninstall it") from error
    for file in map(Path, files):
        if not file.is_file():
            raise FileNotFoundError(f"--plugin {file} does not exist; give a Python file")
        name = f"mythos_plugin_{file.stem}"
        spec = spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise FileError(f"--plugin {file} is no Python file; give one that ends in .py")
        # Under a name of its own in sys.modules its classes can be pickled, and no other module is hidden.
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise FileError(f"--plugin {_where(error, file)}") from error


def _where(error: Exception, file: Path | None = None) -> str:
    """Return file, line and text of an error: the last line in `file`, or in any file if that is not on the way."""
    if isinstance(error, SyntaxError):
        place = f"{error.filename}:{error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if file is not None and Path(frame.filename) == file.absolute()]
        place = "{0.filename}:{0.lineno}".format((own or frames)[-1])
    return f"{place}: {type(error).__name__}: {error}"
