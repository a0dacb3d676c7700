"""A conversation in a terminal: lines in, answers out as they come, each token in the colour of its loops."""

import signal
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest

from rich.console import Console
from rich.text import Text

from open_mythos.accounting import kv_bytes_per_token, n_layers
from open_mythos.checks import as_typed, check_int
from open_mythos.config import HALTING_RULES
from open_mythos.engine.engine import MEMORY_SHARE, Engine, EngineConfig, cache_bytes
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import check_n_loops
from open_mythos.reports.terminal import loop_legend, loop_style, write
from open_mythos.tokenization.chat_template import end_of_turn, render
from open_mythos.tokenization.tokenizer import Tokenizer

FEWEST_TOKENS = 64
"""Tokens of the shortest conversation that is worth having."""
COMMANDS: dict[str, tuple[dict[str, type], int, str]] = {
    "/loops": ({"n_loops": int}, 0, "/loops N: the most loops of a token; without N the model's own"),
    "/rule": (
        {"exit": str, "exit_threshold": float},
        0,
        f"/rule NAME [THRESHOLD]: when a token leaves the loop: {', '.join(HALTING_RULES)}",
    ),
    "/temperature": (
        {"temperature": float},
        1,
        "/temperature T: 0 takes the best token, 1 draws as the model says",
    ),
    "/max": ({"max_tokens": int}, 1, "/max N: the most tokens of an answer"),
    "/reset": ({}, 0, "/reset: forget the conversation"),
    "/help": ({}, 0, "/help: this list"),
}
"""Commands: the sampling parameters that they change, with types, the fewest values, and the line of /help."""
TYPED = {next(iter(fields)): name for name, (fields, _, _) in COMMANDS.items() if fields}
TYPED["exit_threshold"] = "THRESHOLD"
"""What a user types for a field that a message names."""


@dataclass
class Session:
    """A conversation with a model, stored as the ids of all turns: the engine finds them computed at the next turn."""

    model: OpenMythos
    tokenizer: Tokenizer
    console: Console
    params: SamplingParams
    """Parameters of every answer, until a command changes them. The seed is that of the first answer; each further
    answer has the next seed."""
    plain: bool = False
    """True for a model that knows no turns: each line is appended to the text so far, which the model continues."""
    system: str = ""
    """System message before the conversation, unless `plain`."""
    kv_tokens: int | None = None
    """Tokens of a conversation that there is memory for; None: a whole context, or what fits into a share of the free
    memory."""

    def __post_init__(self) -> None:
        check_int("max_tokens", self.params.max_tokens, 1, 2**31)
        self._n_tokens = min(self.kv_tokens or self.model.cfg.max_seq_len, self.model.cfg.max_seq_len)
        self._engine: Engine | None = None
        self._ids: list[int] = []
        self._n_answers = 0

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
                elif line.strip() or (self.plain and self._ids):
                    self._answer(line)
            # The line has to be typed differently; the conversation has not changed.
            except (TypeError, ValueError) as error:
                self._note(as_typed(str(error), TYPED))

    def greet(self) -> None:
        """Print the meaning of the colours and the command for help."""
        self.console.print(loop_legend(self._most), Text("   /help lists the commands", "dim"))

    @property
    def _most(self) -> int:
        return self.params.n_loops or self.model.cfg.max_loop_iters

    def _note(self, text: str) -> None:
        self.console.print(Text(text, "dim"))

    def _answer(self, line: str) -> None:
        cfg, ids = self.model.cfg, self._ids + self._turn(line)
        engine, n_tokens = self._with_room()
        if len(ids) >= n_tokens:
            raise ValueError(
                f"the {len(ids)} tokens so far fill the conversation, which has room for {n_tokens} at {self._most} "
                "loops; /reset begins again"
            )
        most = min(self.params.max_tokens, n_tokens - len(ids), cfg.max_output_tokens)
        seed = None if self.params.seed is None else self.params.seed + self._n_answers
        began = time.perf_counter()
        request = engine.add(ids, replace(self.params, max_tokens=most, seed=seed))
        with _interrupts() as pressed:
            while engine.busy:
                for event in engine.step():
                    write(self.console, event.text, loop_style(event.loops, self._most))
                if pressed.is_set():
                    engine.cancel(request)
        seconds = time.perf_counter() - began
        write(self.console, "\n")
        if request.finish_reason == "error":
            raise FloatingPointError(
                "the logits are NaN: the weights have diverged or overflow; use earlier weights, or float32"
            )
        self._ids, self._n_answers = ids + request.token_ids, self._n_answers + 1
        # A turn that was cut off ends here all the same.
        if not self.plain and request.finish_reason != "stop":
            end = end_of_turn(self.tokenizer)
            self._ids += self.tokenizer.encode(end) if isinstance(end, str) else [end]
        n = len(request.token_ids)
        self._note(
            f"{n} tokens, {sum(request.loops) / max(1, n):.2f} loops each, {n / seconds:.1f} tokens/s, "
            f"{request.n_cached} of {len(ids)} prompt tokens reused"
            + {"length": f", cut off at {most}", "abort": ", cancelled"}.get(request.finish_reason or "", "")
        )

    def _with_room(self) -> tuple[Engine, int]:
        """Return an engine, and the tokens of a conversation that it has room for at the current number of loops.

        Where more loops need more memory than the engine has, a new engine takes its place, and computes the
        conversation again.
        """
        if self._engine is None or self._engine.n_tokens_at(self._most) < self._n_tokens:
            self._engine = None
            # One row without padding is 1.4 times as fast (docs/results/engine.md), and there are no other requests.
            config = EngineConfig(max_rows=1, kv_tokens=self._room(), batch_invariant=False)
            self._engine = Engine(self.model, self.tokenizer, config)
        return self._engine, min(self._n_tokens, self._engine.n_tokens_at(self._most))

    def _room(self) -> int:
        """Return the `kv_tokens` of an engine for a conversation at the current number of loops."""
        cfg, n_tokens = self.model.cfg, self._n_tokens
        each = kv_bytes_per_token(cfg, self._most, self.model.dtype.itemsize)
        share = cache_bytes(self.model.device)
        fits = int(share / MEMORY_SHARE if self.kv_tokens is not None else share) // each
        if fits < (n_tokens if self.kv_tokens is not None else min(n_tokens, FEWEST_TOKENS)):
            raise ValueError(
                f"n_loops={self._most} takes {each:,} bytes of keys and values for each token, and there is memory for "
                f"{fits:,} tokens of a conversation; use fewer loops"
            )
        # An engine counts its memory in tokens at the model's own loops.
        page = EngineConfig.page_tokens
        n_pages = -(-min(n_tokens, fits) // page) * n_layers(cfg, self._most)
        return -(-n_pages // n_layers(cfg, cfg.max_loop_iters)) * page

    def _turn(self, line: str) -> list[int]:
        if self.plain:
            return self.tokenizer.encode(line)
        first = [{"role": "system", "content": self.system}] if self.system and not self._ids else []
        return render([*first, {"role": "user", "content": line}], self.tokenizer, reply=True)[0]

    def _obey(self, name: str, *values: str) -> None:
        if name not in COMMANDS:
            raise ValueError(f"{name} is no command; use one of {', '.join(COMMANDS)}, /quit")
        fields, fewest, text = COMMANDS[name]
        if not fewest <= len(values) <= len(fields):
            raise ValueError(f"{' '.join([name, *values])} does not fit; {text}")
        if name == "/reset":
            self._ids = []
        elif name == "/help":
            for *_, text in COMMANDS.values():
                self._note(text)
            self._note("/quit, or Ctrl-D: leave. Ctrl-C cancels an answer; twice, it leaves.")
        else:
            pairs = zip_longest(fields.items(), values)
            given = {field: None if value is None else _parse(kind, value) for (field, kind), value in pairs}
            params = replace(self.params, **given)
            check_n_loops(params.n_loops, self.model.cfg)
            self.model.exit_rule(params.exit, params.exit_threshold)
            check_int("max_tokens", params.max_tokens, 1, 2**31)
            self.params = params


def _parse(kind: type, text: str) -> object:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is no {'whole number' if kind is int else 'number'}; use 1") from None


@contextmanager
def _interrupts() -> Generator[threading.Event]:
    """Yield an event that Ctrl-C sets, so that the current step ends first; pressed again, it is KeyboardInterrupt."""
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
