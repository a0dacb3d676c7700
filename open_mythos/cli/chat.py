"""The command that talks."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from open_mythos.cli.use import Exit
from open_mythos.device import Device, Dtype, setup_device


@dataclass
class ChatArgs:
    """Talk with the model of a folder. Every token has the colour of the loops it took; /help lists what can be
    changed on the way. Reads lines from a pipe too."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the model and its tokenizer, such as RUN/final."""
    plain: bool = False
    """For a model that was not trained on conversations: it continues your text, line after line."""
    system: str = ""
    """A system message before the conversation."""
    max_tokens: int = 256
    """Tokens of an answer, at most."""
    n_loops: int | None = None
    """Loops per token; left out: the model's max_loop_iters."""
    exit: Exit | None = None
    """Rule that lets a token leave the loop early; left out: the model's own."""
    exit_threshold: float | None = None
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 50
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    device: Device = "auto"
    dtype: Dtype = "float32"
    threads: int | None = None


def chat(rest: list[str]) -> None:
    """talk with a model, its tokens coloured by their loops"""
    args = tyro.cli(ChatArgs, prog="mythos chat", args=rest)
    if args.plain and args.system:
        raise ValueError(f"--system {args.system!r} and --plain are both given; give one")
    setup_device(args.device, args.threads)
    from rich.console import Console

    from open_mythos.chat import end_of_turn
    from open_mythos.serve.engine import EngineConfig
    from open_mythos.serve.llm import LLM
    from open_mythos.serve.params import SamplingParams
    from open_mythos.serve.session import Session

    # There are no neighbours, and one row without padding is 1.4 times as fast (docs/results/engine.md).
    config = EngineConfig(max_rows=1, batch_invariant=False)
    llm = LLM(args.folder, device=args.device, dtype=args.dtype, config=config)
    assert llm.tokenizer is not None  # a folder's model comes with its own
    end = end_of_turn(llm.tokenizer)
    params = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        max_tokens=args.max_tokens,
        seed=args.seed,
        stop=end if isinstance(end, str) and not args.plain else (),
        n_loops=args.n_loops,
        exit=args.exit,
        exit_threshold=args.exit_threshold,
    )
    console = Console(highlight=False, soft_wrap=True)
    session = Session(llm.engine, llm.tokenizer, console, params, args.plain, args.system)
    if sys.stdin.isatty():
        session.greet()
    session.run(_lines())


def _lines() -> Iterator[str]:
    """What is typed or piped in, line by line."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            # Ctrl-C at the prompt drops the line, as shells do.
            print()
