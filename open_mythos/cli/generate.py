"""The command that continues a prompt."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from open_mythos.checks import PositiveInt
from open_mythos.cli.options import MAX_NEW_TOKENS, ModelOptions, SamplingOptions, chosen, read


@dataclass(kw_only=True)
class GenerateArgs(SamplingOptions, ModelOptions):
    """Continue a prompt with the model of a folder, and print the text as it comes."""

    prompt: Annotated[str, tyro.conf.Positional]
    max_new_tokens: PositiveInt = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    """Strings that end the text; the tokenizer's end token always does. The text is printed as it comes, so a stop
    string itself may be shown."""
    chat: bool = False
    """The prompt is a user's message, in the template that the recipe chat trains; only the answer is printed."""
    show_loops: bool = False
    """Colour every token by the loops it took."""
    compiled: bool = False
    """Decode with machine code made for this model: 10 to 20 s at first, then up to twice as fast. Needs a C++
    compiler on a CPU."""


def generate(rest: list[str]) -> None:
    """continue a prompt, with as many loops as you like"""
    args = read(GenerateArgs, "mythos generate", rest)
    from rich.console import Console

    from open_mythos.reports.terminal import loop_style, loop_summary, write
    from open_mythos.tokenization.chat_template import end_of_turn, render, turns_unknown
    from open_mythos.tokenization.detokenizer import TextStream

    model, tokenizer = args.load()
    if args.chat and (warning := turns_unknown(args.folder, "leave --chat out to have the prompt continued")):
        print(f"mythos generate: {warning}", file=sys.stderr)
    most = args.n_loops or model.cfg.max_loop_iters
    console, started = Console(highlight=False, soft_wrap=True), False

    def show(_: int, token: int, loops: int) -> None:
        nonlocal started
        if not started:
            # The prompt is printed with the first token, because an argument may be refused before it.
            write(console, "" if args.chat else args.prompt)
            started = True
        write(console, stream.push(token), loop_style(loops, most) if args.show_loops else "")

    prompt = render([{"role": "user", "content": args.prompt}], tokenizer, reply=True)[0] if args.chat else args.prompt
    stream = TextStream(tokenizer, tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
    end = end_of_turn(tokenizer) if args.chat else tokenizer.eos_id
    _, loops = model.generate(
        prompt,
        args.max_new_tokens,
        **chosen(args),
        stop=args.stop if end is None else (*args.stop, end),
        tokenizer=tokenizer,
        on_token=show,
        return_loops=True,
        compiled=args.compiled,
    )
    write(console, stream.flush() + "\n")
    if args.show_loops:
        console.print(loop_summary(console, loops, most))
