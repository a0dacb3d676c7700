"""The commands that generate text: from a prompt, and in a conversation."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from open_mythos.checks import PositiveInt
from open_mythos.cli.options import MAX_NEW_TOKENS, ModelOptions, SamplingOptions, chosen
from open_mythos.generation.sampling_params import SamplingParams


@dataclass(kw_only=True)
class Generate(SamplingOptions, ModelOptions):
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
    compiled: bool | None = None
    """Decode with machine code made for this model, which takes tens of seconds at first and needs a C++ compiler on a
    CPU. Left out: if it has been made before."""
    draft_loops: PositiveInt | None = None
    """Draft four tokens at a time with so few loops, and verify them with all: for one prompt at fixed depth."""

    def run(self, rest: list[str]) -> None:
        """continue a prompt, with as many loops as you like"""
        from rich.console import Console

        from open_mythos.reports.terminal import loop_style, loop_summary, write
        from open_mythos.tokenization.chat_template import end_of_turn, render, turns_unknown
        from open_mythos.tokenization.detokenizer import TextStream

        model, tokenizer = self.load()
        console, most = Console(highlight=False, soft_wrap=True), self.n_loops or model.cfg.max_loop_iters
        # The prompt is printed with the first token, because an argument may be refused before it.
        prompt: Any = self.prompt
        end, unprinted = tokenizer.eos_id, [prompt]
        if self.chat:
            if warning := turns_unknown(self.folder, "leave --chat out to have the prompt continued"):
                print(f"mythos generate: {warning}", file=sys.stderr)
            prompt, unprinted = render([{"role": "user", "content": self.prompt}], tokenizer, reply=True)[0], []
            end = end_of_turn(tokenizer)
        stream = TextStream(tokenizer, prompt if self.chat else tokenizer.encode(prompt))

        def show(_: int, token: int, loops: int) -> None:
            if unprinted:
                write(console, unprinted.pop())
            write(console, stream.push(token), loop_style(loops, most) if self.show_loops else "")

        _, loops = model.generate(
            prompt,
            self.max_new_tokens,
            **chosen(self),
            stop=self.stop if end is None else (*self.stop, end),
            tokenizer=tokenizer,
            on_token=show,
            return_loops=True,
            compiled=self.compiled,
            draft_loops=self.draft_loops,
        )
        write(console, stream.flush() + "\n")
        if self.show_loops:
            console.print(loop_summary(console, loops, most))


@dataclass(kw_only=True)
class Chat(SamplingOptions, ModelOptions):
    """Talk with the model of a folder. Every token has the colour of the loops it took; /help lists what can be
    changed on the way. Reads lines from a pipe too."""

    plain: bool = False
    """For a model that was not trained on conversations: it continues your text, line after line."""
    system: str = ""
    """A system message before the conversation."""
    max_tokens: PositiveInt = 256
    """Tokens of an answer, at most."""
    kv_tokens: PositiveInt | None = None
    """Tokens of the conversation that there is memory for, at the loops in use; left out: the model's whole context,
    or what a quarter of the free memory holds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plain and self.system:
            raise ValueError(f"--system {self.system!r} and --plain are both given; give one")

    def run(self, rest: list[str]) -> None:
        """talk with a model, its tokens coloured by their loops"""
        from rich.console import Console

        from open_mythos.cli.chat_session import Session
        from open_mythos.tokenization.chat_template import end_of_turn, turns_unknown

        model, tokenizer = self.load()
        end = end_of_turn(tokenizer)
        params = SamplingParams(
            **chosen(self),
            max_tokens=self.max_tokens,
            stop=end if isinstance(end, str) and not self.plain else (),
        )
        if not self.plain and (warning := turns_unknown(self.folder, "use --plain to have your text continued")):
            print(f"mythos chat: {warning}", file=sys.stderr)
        console = Console(highlight=False, soft_wrap=True)
        session = Session(model, tokenizer, console, params, self.plain, self.system, self.kv_tokens)
        if sys.stdin.isatty():
            session.greet()
        session.run(_lines())


def _lines() -> Iterator[str]:
    """Yield the lines that are typed or piped in."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            # Ctrl-C at the prompt drops the line, as shells do.
            print()
