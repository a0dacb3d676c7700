"""What the routes share: the engine's thread, the limits, and what is told about them."""

import asyncio
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from open_mythos.engine.engine import Engine
from open_mythos.nn.halting import HALTING_RULES
from open_mythos.server.async_engine import Busy, EngineDead, Job, Wanted, Worker
from open_mythos.server.fields import EFFORTS, HARD_MAX_LOOPS
from open_mythos.server.metrics import Meters
from open_mythos.server.middleware import BUSY, Bodies
from open_mythos.server.protocol import Asked, Conversation, error
from open_mythos.tokenization.chat_template import end_of_turn
from open_mythos.tokenization.token_text import TokenTexts
from open_mythos.tokenization.tokenizer import Tokenizer

Encode = Callable[[Any], list[int]]
"""A prompt, or the messages of a chat, to ids."""
DEAD = "the engine has failed; the server ends"

COMPLETION_TOKENS, CHAT_TOKENS = 16, 512
"""New tokens of requests that give no bound; fewer where the context or the work budget leaves fewer."""


@dataclass(frozen=True)
class ServeConfig:
    """What a server is told besides its engine."""

    model: str
    """The name that requests give."""
    max_loops: int | None = None
    """The most loops of a request; None: twice the model's `max_loop_iters`. Never more than 64."""
    max_queue: int = 128
    """Answers accepted beyond those that have a row."""
    max_work: int = 2**20
    """Loop-tokens of a request: (prompt + n x max_tokens) x n_loops."""
    plain: bool = False
    """For a model that knows no turns: messages are put one behind the other, and it continues them."""
    knows_turns: bool = True
    """The model was trained on conversations; otherwise answers to chats come with a warning, unless `plain`."""
    drain_s: float = 30.0
    """How long answers in work may take once the server is told to end."""
    stuck_s: float = 60.0
    """How long a step or the encoding of a prompt may take before all is given up; at a sixth /ready says 503."""


class Refusal(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 429 else "overloaded" if status == 429 else "unavailable"
        self.status, self.body = status, error(message, param, code, kind)


class Service:
    """What the routes share.

    Args:
        make: makes the engine, once the server listens. It holds a tokenizer, and its queue is as long as `max_queue`
            and its rows together.
        max_rows: of that engine.
        key: what requests have to know; None: nothing.
    """

    def __init__(self, make: Callable[[], Engine], max_rows: int, config: ServeConfig, key: str | None = None) -> None:
        self.config, self.key, self.meters = config, key, Meters()
        self.worker = Worker(make, max_rows + config.max_queue, self.meters.event, self._fatal)
        self.max_rows, self.started_s, self.bodies = max_rows, time.time(), Bodies()
        self.draining = self.fatal = False
        self.on_fatal: Callable[[], None] = lambda: None

    @property
    def engine(self) -> Engine:
        engine = self.worker.engine
        if engine is None:
            raise Refusal(503, "the model is being loaded; try again in a few seconds")
        return engine

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None
        return tokenizer

    @cached_property
    def texts(self) -> TokenTexts:
        """Texts of single tokens."""
        return TokenTexts(self.tokenizer)

    @property
    def max_loops(self) -> int:
        if self.engine.model.recurrent is None:
            return 1
        return min(HARD_MAX_LOOPS, self.config.max_loops or 2 * self.engine.model.cfg.max_loop_iters)

    @property
    def default_loops(self) -> int:
        return min(self.max_loops, self.engine.model.cfg.max_loop_iters)

    @property
    def ready(self) -> bool:
        """Whether a request would be answered."""
        late = self.worker.stuck_s > self.config.stuck_s / 6
        return self.worker.engine is not None and not (self.fatal or self.draining or late)

    def full(self) -> bool:
        """Whether there is no place for another answer."""
        return self.worker.n_reserved >= self.worker.most and not self.draining

    async def watch(self) -> None:
        """Give up an engine that is stuck."""
        while not self.fatal:
            await asyncio.sleep(self.config.stuck_s / 60)
            if self.worker.stuck_s > self.config.stuck_s:
                self._fatal()

    def _fatal(self) -> None:
        self.fatal = True
        self.worker.fail()
        self.on_fatal()

    def n_loops(self, asked: Asked) -> int | None:
        """The most loops of a token; None for a model without a loop."""
        if self.engine.model.recurrent is None:
            if asked.n_loops is not None:
                raise Refusal(400, f"n_loops={asked.n_loops}: this model has no loop; leave n_loops out", "n_loops")
            return None
        if asked.n_loops is None:
            scale = EFFORTS[asked.effort or "medium"]
            return max(1, min(self.max_loops, math.ceil(scale * self.engine.model.cfg.max_loop_iters)))
        if asked.n_loops > self.max_loops:
            raise Refusal(
                400,
                f"n_loops={asked.n_loops} must be at most {self.max_loops}; use n_loops={self.max_loops}",
                "n_loops",
            )
        return asked.n_loops

    def check_work(self, tokens: int, n_loops: int | None, field: str) -> None:
        """Refuse what would take too long."""
        work = tokens * (n_loops or 1)
        if work > self.config.max_work:
            raise Refusal(
                400,
                f"the request's work, (prompt + n x {field}) x n_loops = {work} loop-tokens, must be at most "
                f"{self.config.max_work}; ask for fewer tokens, answers or loops",
                field,
            )

    def check_model(self, name: str) -> None:
        """Refuse a model that is not here."""
        if name != self.config.model:
            raise Refusal(
                404, f"model={name!r:.80} is not served; use {self.config.model!r}", "model", "model_not_found"
            )

    def admit(self, asked: Asked, n_prompts: int) -> int:
        """Reserve places for a request's answers, and say how many; all that costs next to nothing is checked first.

        Raises:
            Refusal: it cannot be answered, or not now.
        """
        if self.draining or self.fatal:
            raise Refusal(503, "the server is about to end; ask another one, or later")
        if asked.model:
            self.check_model(asked.model)
        n = n_prompts * asked.n_made
        self.check_work(n * (asked.most_tokens or 1), self.n_loops(asked), asked.limit_name)
        if n > self.worker.most:
            raise Refusal(
                400,
                f"{n_prompts} prompts with n={asked.n_made} are {n} answers, and the server has {self.worker.most} "
                "places (--max-rows and --max-queue together); ask for fewer at a time",
                "n" if asked.n_made > 1 else asked.said,
            )
        try:
            self.worker.reserve(n)
        except Busy:
            raise Refusal(429, BUSY) from None
        return n

    async def prepare(self, asked: Asked, prompts: list[Any], encode: Encode) -> list[Wanted]:
        """What to ask of the engine: for each prompt its answers, one behind the other.

        Raises:
            Refusal: a prompt is unusable, or there is too much to do.
        """
        is_chat, n_loops = isinstance(asked, Conversation), self.n_loops(asked)
        end = end_of_turn(self.tokenizer) if is_chat and not self.config.plain else None
        await self._check_format(asked)
        try:
            ids = await self.worker.encode(lambda: [encode(prompt) for prompt in prompts])
            most = [self._most_tokens(asked, len(each), len(ids), n_loops) for each in ids]
            work = sum(len(each) + asked.n_made * tokens for each, tokens in zip(ids, most, strict=True))
            self.check_work(work, n_loops, asked.limit_name)
            stops = [end] if isinstance(end, str) else []
            params = [asked.params(tokens, n_loops, stops) for tokens in most]
        except ValueError as fault:
            raise Refusal(400, str(fault), asked.said) from None
        places = range(asked.n_made)
        return [(each, how.of_answer(place)) for each, how in zip(ids, params, strict=True) for place in places]

    async def _check_format(self, asked: Asked) -> None:
        """Refuse a schema that cannot be used. The engine finds it compiled, and so does not wait for it."""
        name, schema = asked.format
        grammars = self.engine.grammars
        if schema is None or grammars is None:
            return
        try:
            await self.worker.encode(lambda: grammars.matcher(schema))
        except (ImportError, ValueError) as fault:
            raise Refusal(400, str(fault).replace("json_schema", name), name) from None

    async def accepted(self, job: Job, asked: Asked) -> bool:
        """Wait until the engine has taken a job on; True.

        Raises:
            Refusal: it has not.
        """
        try:
            await job.accepted
        except EngineDead:
            raise Refusal(503, DEAD) from None
        except (TypeError, ValueError) as fault:
            # The engine's name of the bound is not the one that every request gives it by.
            message = re.sub(r"\bmax_tokens\b", asked.limit_name, str(fault))
            raise Refusal(400, message, field_of(message, type(asked)) or asked.said) from None
        return True

    def _most_tokens(self, asked: Asked, n_prompt: int, n_prompts: int, n_loops: int | None) -> int:
        """The bound of the new tokens of each answer: the one that was given, or else no more than fits."""
        if asked.most_tokens is not None:
            return asked.most_tokens
        cfg, n_loops = self.engine.model.cfg, n_loops or 1
        budget = (self.config.max_work // n_loops // n_prompts - n_prompt) // asked.n_made
        room = min(cfg.max_seq_len, self.engine.n_tokens_at(n_loops)) - n_prompt
        usual = CHAT_TOKENS if isinstance(asked, Conversation) else COMPLETION_TOKENS
        return max(1, min(usual, cfg.max_output_tokens, room, budget))

    def card(self) -> dict[str, Any]:
        """The model, as the list of models has it."""
        cfg = self.engine.model.cfg
        return {
            "id": self.config.model,
            "object": "model",
            "created": int(self.started_s),
            "owned_by": "open_mythos",
            "max_loops": self.max_loops,
            "default_loops": self.default_loops,
            "context_length": cfg.max_seq_len,
        }

    def metrics(self) -> bytes:
        """What Prometheus reads."""
        now, meters = self.worker.snapshot, self.meters
        meters.tasks.set(len(asyncio.all_tasks()))
        meters.waiting.set(now.waiting)
        meters.rows.set(now.admitted)
        for state in ("used", "free", "reusable"):
            meters.pages.labels(state).set(getattr(now, f"pages_{state}"))
        return meters.text()

    def live(self) -> dict[str, Any]:
        """What the engine is doing now."""
        engine, now, rates = self.engine, self.worker.snapshot, self.meters.rates()
        block = engine.model.recurrent
        held = now.pages_used + now.pages_reusable
        return {
            "model": self.config.model,
            "max_rows": self.max_rows,
            "rows_by_loop": now.rows_by_loop,
            "looping": sum(rows for _, rows in now.rows_by_loop),
            "waiting": now.waiting,
            "admitted": now.admitted,
            "pages": {
                "used": now.pages_used,
                "free": engine.n_pages - held,
                "reusable": now.pages_reusable,
                "total": engine.n_pages,
            },
            "tokens_per_s": rates[0],
            "mean_loops": rates[1],
            "max_loops": self.max_loops,
            "default_loops": self.default_loops,
            "rules": []
            if block is None
            else [name for name in HALTING_RULES if name != "act" or block.act is not None],
            "invariant": engine.invariant,
        }


def field_of(message: str, kind: type[Asked]) -> str | None:
    """The field that a message of the engine begins with; those that name none are about what the model reads."""
    match = re.match(r"(\w+)(?:\[\w+\])?=", message)
    return match[1] if match and match[1] in kind.model_fields else None
