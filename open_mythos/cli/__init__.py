"""The command `mythos`. Each command imports what it needs when it runs, so that --help and refusals come at once."""

import os
import platform
import sys
import warnings
from importlib.metadata import version
from typing import Any

from open_mythos.checks import as_typed, did_you_mean, printable
from open_mythos.cli import plugins
from open_mythos.cli.analyze import Analyze, Eval
from open_mythos.cli.costs import Info, Plan
from open_mythos.cli.data import FetchCorpus, PrepareData, TrainTokenizer
from open_mythos.cli.exp import Exp
from open_mythos.cli.generate import Chat, Generate
from open_mythos.cli.options import flags, read
from open_mythos.cli.quantize import Quantize
from open_mythos.cli.serve import Serve
from open_mythos.cli.train import Demo, RunOptions, Train, read_run
from open_mythos.extras import DISTRIBUTION
from open_mythos.files import FileError

EXIT_BROKEN_PIPE = 1
"""Exit status when nobody reads the output any more, the same as rich's."""


def main(args: list[str] | None = None) -> int:
    """Run one command and return the exit status: 0, or 2 if the user has to change something."""
    try:
        files, args = plugins.split(sys.argv[1:] if args is None else args)
    except ValueError as error:
        print(f"mythos: {error}", file=sys.stderr)
        return 2
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        print(f"mythos {version(DISTRIBUTION)}, torch {version('torch')}, Python {platform.python_version()}")
        return 0
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        near = did_you_mean(command, list(COMMANDS)) or f"\n\n{_usage()}"
        print(f"mythos: {command!r} is no command{near}", file=sys.stderr)
        return 2

    # The line of code that a warning comes from is of no use to a user.
    warnings.formatwarning = lambda message, *_: f"mythos {command}: {message}\n"  # ty: ignore[invalid-assignment]
    try:
        plugins.load(files)
        if issubclass(COMMANDS[command], RunOptions):
            args, *run = read_run(COMMANDS[command], f"mythos {command}", rest)
            args.run(rest, *run)
        else:
            read(COMMANDS[command], f"mythos {command}", rest).run(rest)
        sys.stdout.flush()
    except BrokenPipeError:
        # For example `| head`. The text still buffered would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (TypeError, ValueError, OSError, ImportError, FloatingPointError) as error:
        message = str(error)
        if not isinstance(error, FileError):
            message = as_typed(message, _flags(COMMANDS[command]))
        for word in rest:
            # What was typed is shown without what a terminal would act on, such as a line break in a folder's name.
            message = message if word.isprintable() else message.replace(word, printable(word))
        print(f"mythos {command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _flags(options: type) -> dict[str, str]:
    """Return the flags of a command, with those of a run's configuration where it takes them."""
    if not issubclass(options, RunOptions):
        return flags(options)
    from open_mythos.train.config import TrainConfig

    return flags(TrainConfig) | flags(options) | {"recipe": ""}


def _usage() -> str:
    lines = [f"  {name:17s}{(command.run.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "mythos COMMAND --help lists the options of a command, mythos --version the version.",
        "mythos --plugin FILE COMMAND ... first runs a Python file with parts of your own: docs/extending.md.",
    ]
    return "\n".join(["usage: mythos [--plugin FILE] COMMAND [options]", "", *lines])


COMMANDS: dict[str, Any] = {
    "demo": Demo,
    "fetch-corpus": FetchCorpus,
    "prepare-data": PrepareData,
    "train-tokenizer": TrainTokenizer,
    "plan": Plan,
    "train": Train,
    "generate": Generate,
    "chat": Chat,
    "serve": Serve,
    "eval": Eval,
    "analyze": Analyze,
    "exp": Exp,
    "info": Info,
    "quantize": Quantize,
}
"""Commands: a class with the options, whose `run` runs the command; its docstring is the line of `mythos --help`."""
