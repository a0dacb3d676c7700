"""The command `mythos`. Each command imports what it needs when it runs, so that --help answers at once."""

import sys
import warnings

from open_mythos.cli.analyze import analyze
from open_mythos.cli.chat import chat
from open_mythos.cli.data import fetch_corpus, prepare_data, train_tokenizer
from open_mythos.cli.exp import exp
from open_mythos.cli.plan import plan
from open_mythos.cli.serve import serve
from open_mythos.cli.train import demo, train
from open_mythos.cli.use import evaluate, generate, info


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 when something has to be given differently."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        print(f"mythos: {command!r} is no command\n\n{_usage()}", file=sys.stderr)
        return 2

    # A user has no use for the line of code that a warning comes from.
    def plain(message: Warning | str, category: type, filename: str, lineno: int, line: str | None = None) -> str:
        return f"mythos {command}: {message}\n"

    warnings.formatwarning = plain  # ty: ignore[invalid-assignment]
    try:
        COMMANDS[command](rest)
    except (TypeError, ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"mythos {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _usage() -> str:
    lines = [f"  {name:17s}{(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items()]
    return "\n".join(
        ["usage: mythos COMMAND [options]", "", *lines, "", "mythos COMMAND --help tells the options of a command."]
    )


COMMANDS = {
    "demo": demo,
    "fetch-corpus": fetch_corpus,
    "prepare-data": prepare_data,
    "train-tokenizer": train_tokenizer,
    "plan": plan,
    "train": train,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "eval": evaluate,
    "analyze": analyze,
    "exp": exp,
    "info": info,
}
