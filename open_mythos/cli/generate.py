"""The command that continues a prompt."""

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from open_mythos.checks import PositiveInt
from open_mythos.cli.options import MAX_NEW_TOKENS, ModelOptions, SamplingOptions, chosen


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
    compiled: bool = False
    """Decode with machine code made for this model: 10 to 20 s at first, then up to twice as fast. Needs a C++
    compiler on a CPU."""

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
        )
        write(console, stream.flush() + "\n")
        if self.show_loops:
            console.print(loop_summary(console, loops, most))
