"""The command that talks."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from open_mythos.checks import PositiveInt
from open_mythos.cli.options import ModelOptions, SamplingOptions, chosen
from open_mythos.generation.sampling_params import SamplingParams


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
