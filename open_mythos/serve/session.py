"""A conversation in a terminal: lines in, answers out as they come, each token in the colour of its loops."""

import inspect
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from open_mythos.arguments import check_n_loops
from open_mythos.chat import end_of_turn, render
from open_mythos.serve.engine import Engine
from open_mythos.serve.params import SamplingParams
from open_mythos.terminal import loop_legend, loop_style, write
from open_mythos.tokenizer import Tokenizer

N = TypeVar("N", int, float)


class Session:
    """A conversation with a model, kept as the ids that it has read and written: so the next turn finds them computed.

    Args:
        engine: of this session alone.
        params: for every answer, until a command changes them. A seed is that of the first answer; the next one has the
            next seed.
        plain: for a model that knows no turns: each line is put behind the text so far, which the model continues.
        system: what precedes a conversation, unless `plain`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        console: Console,
        params: SamplingParams,
        plain: bool = False,
        system: str = "",
    ) -> None:
        self._engine, self._tokenizer, self._console = engine, tokenizer, console
        self._params, self._plain, self._system = params, plain, system
        self._ids: list[int] = []
        self._n_answers = 0
        self._commands: dict[str, Callable[..., None]] = {
            "/loops": self._loops,
            "/rule": self._rule,
            "/temperature": self._temperature,
            "/max": self._max,
            "/reset": self._reset,
            "/help": self._help,
        }

    def run(self, lines: Iterable[str]) -> None:
        """Answer or obey each line, until they end or one is /quit.

        Raises:
            FloatingPointError: the logits became NaN.
        """
        for line in lines:
            if line.strip() == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._obey(*line.split())
                elif line.strip() or (self._plain and self._ids):
                    self._answer(line)
            # What was typed has to be given differently; the conversation is as it was.
            except (TypeError, ValueError) as error:
                self._note(str(error))

    def greet(self) -> None:
        """Say what the colours mean and where help is."""
        self._console.print(loop_legend(self._most), Text("   /help lists the commands", "dim"))

    @property
    def _most(self) -> int:
        return self._params.n_loops or self._engine.model.cfg.max_loop_iters

    def _note(self, text: str) -> None:
        self._console.print(Text(text, "dim"))

    def _answer(self, line: str) -> None:
        cfg = self._engine.model.cfg
        ids = self._ids + self._turn(line)
        room = cfg.max_seq_len - len(ids)
        if room < 1:
            raise ValueError(f"the {len(ids)} tokens so far fill max_seq_len={cfg.max_seq_len}; /reset begins again")
        most = min(self._params.max_tokens, room, cfg.max_output_tokens)
        seed = None if self._params.seed is None else self._params.seed + self._n_answers
        began = time.perf_counter()
        request = self._engine.add(ids, replace(self._params, max_tokens=most, seed=seed))
        with _interrupts() as pressed:
            while self._engine.busy:
                for event in self._engine.step():
                    write(self._console, event.text, loop_style(event.loops, self._most))
                if pressed.is_set():
                    self._engine.cancel(request)
        seconds = time.perf_counter() - began
        write(self._console, "\n")
        if request.finish_reason == "error":
            raise FloatingPointError(
                "the logits are NaN: the weights have diverged or overflow; use earlier weights, or float32"
            )
        self._ids, self._n_answers = ids + request.token_ids, self._n_answers + 1
        # A turn that was cut off is over all the same.
        if not self._plain and request.finish_reason != "stop":
            end = end_of_turn(self._tokenizer)
            self._ids += self._tokenizer.encode(end) if isinstance(end, str) else [end]
        n = len(request.token_ids)
        self._note(
            f"{n} tokens, {sum(request.loops) / max(1, n):.2f} loops each, {n / seconds:.1f} tokens/s, "
            f"{request.n_cached} of {len(ids)} prompt tokens reused"
            + {"length": f", cut off at {most}", "abort": ", cancelled"}.get(request.finish_reason or "", "")
        )

    def _turn(self, line: str) -> list[int]:
        if self._plain:
            return self._tokenizer.encode(line)
        first = [{"role": "system", "content": self._system}] if self._system and not self._ids else []
        return render([*first, {"role": "user", "content": line}], self._tokenizer, reply=True)[0]

    def _obey(self, name: str, *values: str) -> None:
        if name not in self._commands:
            raise ValueError(f"{name} is no command; use one of {', '.join(self._commands)}, /quit")
        command = self._commands[name]
        try:
            inspect.signature(command).bind(*values)
        except TypeError:
            raise ValueError(f"{' '.join([name, *values])} does not fit; {command.__doc__}") from None
        command(*values)

    def _loops(self, n_loops: str = "") -> None:
        """/loops N: the most loops of a token; without N the model's own"""
        value = _number(int, n_loops) if n_loops else None
        check_n_loops(value, self._engine.model.cfg)
        self._params = replace(self._params, n_loops=value)

    def _rule(self, name: str = "", threshold: str = "") -> None:
        """/rule NAME [THRESHOLD]: when a token leaves the loop: fixed, act, latent_diff, second_difference, kl"""
        limit = _number(float, threshold) if threshold else None
        self._engine.model.exit_rule(name or None, limit)
        self._params = replace(self._params, exit=name or None, exit_threshold=limit)

    def _temperature(self, value: str) -> None:
        """/temperature T: 0 takes the best token, 1 draws from the model's own distribution"""
        self._params = replace(self._params, temperature=_number(float, value))

    def _max(self, n_tokens: str) -> None:
        """/max N: the most tokens of an answer"""
        self._params = replace(self._params, max_tokens=_number(int, n_tokens))

    def _reset(self) -> None:
        """/reset: forget the conversation"""
        self._ids = []

    def _help(self) -> None:
        """/help: this list"""
        for command in self._commands.values():
            self._note(command.__doc__ or "")
        self._note("/quit, or Ctrl-D: leave. Ctrl-C cancels an answer; twice, it leaves.")


def _number(kind: Callable[[str], N], text: str) -> N:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is no {'whole number' if kind is int else 'number'}; use 1") from None


@contextmanager
def _interrupts() -> Generator[threading.Event]:
    """Set when Ctrl-C is pressed, so that a step is done in full; pressed again, it is a KeyboardInterrupt."""
    pressed = threading.Event()

    def press(number: int, frame: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
