"""The command `mythos`. Each command imports what it needs when it runs, so that --help and refusals come at once."""

import os
import platform
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

from open_mythos.checks import as_typed, did_you_mean
from open_mythos.cli import plugins
from open_mythos.cli.analyze import AnalyzeArgs, analyze
from open_mythos.cli.chat import ChatArgs, chat
from open_mythos.cli.costs import InfoArgs, PlanArgs, info, plan
from open_mythos.cli.data import (
    FetchCorpusArgs,
    PrepareDataArgs,
    TrainTokenizerArgs,
    fetch_corpus,
    prepare_data,
    train_tokenizer,
)
from open_mythos.cli.evaluate import EvalArgs, evaluate
from open_mythos.cli.exp import ExpArgs, exp
from open_mythos.cli.generate import GenerateArgs, generate
from open_mythos.cli.options import flags
from open_mythos.cli.serve import ServeArgs, serve
from open_mythos.cli.train import DemoArgs, RunOptions, TrainArgs, demo, train
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
    def plain(message: Warning | str, category: type, filename: str, lineno: int, line: str | None = None) -> str:
        return f"mythos {command}: {message}\n"

    warnings.formatwarning = plain  # ty: ignore[invalid-assignment]
    try:
        plugins.load(files)
        COMMANDS[command].run(rest)
        sys.stdout.flush()
    except BrokenPipeError:
        # For example `| head`. The text still buffered would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (TypeError, ValueError, OSError, ImportError, FloatingPointError) as error:
        message = str(error)
        if not isinstance(error, FileError):
            message = as_typed(message, _flags(COMMANDS[command].options))
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


class Command(NamedTuple):
    """A command and its options."""

    run: Callable[[list[str]], None]
    """Runs the command; its docstring is the line of `mythos --help`."""
    options: type


COMMANDS = {
    "demo": Command(demo, DemoArgs),
    "fetch-corpus": Command(fetch_corpus, FetchCorpusArgs),
    "prepare-data": Command(prepare_data, PrepareDataArgs),
    "train-tokenizer": Command(train_tokenizer, TrainTokenizerArgs),
    "plan": Command(plan, PlanArgs),
    "train": Command(train, TrainArgs),
    "generate": Command(generate, GenerateArgs),
    "chat": Command(chat, ChatArgs),
    "serve": Command(serve, ServeArgs),
    "eval": Command(evaluate, EvalArgs),
    "analyze": Command(analyze, AnalyzeArgs),
    "exp": Command(exp, ExpArgs),
    "info": Command(info, InfoArgs),
}
