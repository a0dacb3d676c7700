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

from open_mythos.accounting import kv_bytes_per_token, n_layers
from open_mythos.checks import as_typed, check_int
from open_mythos.engine.engine import MEMORY_SHARE, Engine, EngineConfig, cache_bytes
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import check_n_loops
from open_mythos.reports.terminal import loop_legend, loop_style, write
from open_mythos.tokenization.chat_template import end_of_turn, render
from open_mythos.tokenization.tokenizer import Tokenizer

N = TypeVar("N", int, float)

FEWEST_TOKENS = 64
"""Tokens of a conversation, fewer of which are not worth having."""
TYPED = {
    "n_loops": "/loops",
    "max_tokens": "/max",
    "temperature": "/temperature",
    "exit": "/rule",
    "exit_threshold": "THRESHOLD",
}
"""What a user types for a field that a message names."""


class Session:
    """A conversation with a model, kept as the ids that it has read and written: so the next turn finds them computed.

    Args:
        params: for every answer, until a command changes them. A seed is that of the first answer; the next one has the
            next seed.
        plain: for a model that knows no turns: each line is put behind the text so far, which the model continues.
        system: what precedes a conversation, unless `plain`.
        kv_tokens: tokens of a conversation that there is memory for; None: a whole context, or what fits into a share
            of the free memory.
    """

    def __init__(
        self,
        model: OpenMythos,
        tokenizer: Tokenizer,
        console: Console,
        params: SamplingParams,
        plain: bool = False,
        system: str = "",
        kv_tokens: int | None = None,
    ) -> None:
        check_int("max_tokens", params.max_tokens, 1, 2**31)
        self._model, self._tokenizer, self._console = model, tokenizer, console
        self._n_tokens = min(kv_tokens or model.cfg.max_seq_len, model.cfg.max_seq_len)
        self._is_given = kv_tokens is not None
        self._engine: Engine | None = None
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
                self._note(as_typed(str(error), TYPED))

    def greet(self) -> None:
        """Say what the colours mean and where help is."""
        self._console.print(loop_legend(self._most), Text("   /help lists the commands", "dim"))

    @property
    def _most(self) -> int:
        return self._params.n_loops or self._model.cfg.max_loop_iters

    def _note(self, text: str) -> None:
        self._console.print(Text(text, "dim"))

    def _answer(self, line: str) -> None:
        cfg, ids = self._model.cfg, self._ids + self._turn(line)
        engine, n_tokens = self._with_room()
        if len(ids) >= n_tokens:
            raise ValueError(
                f"the {len(ids)} tokens so far fill the conversation, which has room for {n_tokens} at {self._most} "
                "loops; /reset begins again"
            )
        most = min(self._params.max_tokens, n_tokens - len(ids), cfg.max_output_tokens)
        seed = None if self._params.seed is None else self._params.seed + self._n_answers
        began = time.perf_counter()
        request = engine.add(ids, replace(self._params, max_tokens=most, seed=seed))
        with _interrupts() as pressed:
            while engine.busy:
                for event in engine.step():
                    write(self._console, event.text, loop_style(event.loops, self._most))
                if pressed.is_set():
                    engine.cancel(request)
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

    def _with_room(self) -> tuple[Engine, int]:
        """An engine, and the tokens of a conversation that it has room for at the loops that a token may take now.

        The engine is made anew where more loops need more memory than it has; it then has to read the conversation
        again.
        """
        if self._engine is None or self._engine.n_tokens_at(self._most) < self._n_tokens:
            self._engine = None
            # There are no neighbours, and one row without padding is 1.4 times as fast (docs/results/engine.md).
            config = EngineConfig(max_rows=1, kv_tokens=self._room(), batch_invariant=False)
            self._engine = Engine(self._model, self._tokenizer, config)
        return self._engine, min(self._n_tokens, self._engine.n_tokens_at(self._most))

    def _room(self) -> int:
        """The `kv_tokens` of an engine for a conversation at the loops that a token may take now."""
        cfg, n_tokens = self._model.cfg, self._n_tokens
        each = kv_bytes_per_token(cfg, self._most, self._model.dtype.itemsize)
        share = cache_bytes(self._model.device)
        fits = int(share / MEMORY_SHARE if self._is_given else share) // each
        if fits < (n_tokens if self._is_given else min(n_tokens, FEWEST_TOKENS)):
            raise ValueError(
                f"n_loops={self._most} takes {each:,} bytes of keys and values for each token, and there is memory for "
                f"{fits:,} tokens of a conversation; use fewer loops"
            )
        # An engine counts its memory in tokens at the model's own loops.
        page = EngineConfig.page_tokens
        n_pages = -(-min(n_tokens, fits) // page) * n_layers(cfg, self._most)
        return -(-n_pages // n_layers(cfg, cfg.max_loop_iters)) * page

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
        check_n_loops(value, self._model.cfg)
        self._params = replace(self._params, n_loops=value)

    def _rule(self, name: str = "", threshold: str = "") -> None:
        """/rule NAME [THRESHOLD]: when a token leaves the loop: fixed, act, latent_diff, second_difference, kl"""
        limit = _number(float, threshold) if threshold else None
        self._model.exit_rule(name or None, limit)
        self._params = replace(self._params, exit=name or None, exit_threshold=limit)

    def _temperature(self, value: str) -> None:
        """/temperature T: 0 takes the best token, 1 draws from the model's own distribution"""
        self._params = replace(self._params, temperature=_number(float, value))

    def _max(self, n_tokens: str) -> None:
        """/max N: the most tokens of an answer"""
        value = _number(int, n_tokens)
        check_int("max_tokens", value, 1, 2**31)
        self._params = replace(self._params, max_tokens=value)

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
