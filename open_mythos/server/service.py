"""State that the routes share: the engine in its thread, the limits of requests, and the views of what it does."""

import asyncio
import math
import re
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

from open_mythos.engine.engine import Engine
from open_mythos.nn.halting import HALTING_RULES
from open_mythos.server.async_engine import AsyncEngine, EncodedPrompt, Submission
from open_mythos.server.config import HARD_MAX_LOOPS, ServeConfig
from open_mythos.server.fields import EFFORTS
from open_mythos.server.metrics import PAGE_STATES, Metrics
from open_mythos.server.middleware import BodyMemory
from open_mythos.server.protocol import BaseRequest, CompletionRequest, Conversation, Refusal
from open_mythos.tokenization.chat_template import end_of_turn
from open_mythos.tokenization.token_text import TokenTexts
from open_mythos.tokenization.tokenizer import Tokenizer


class Service:
    """State that the routes share.

    Args:
        make: builds the engine, once the server listens. The engine has a tokenizer, `max_rows` rows, and a queue as
            long as `max_rows` and `max_queue` together.
        key: the secret that requests have to send; None: none is needed.
        knows_turns: the model was trained on conversations; otherwise its answers to chats come with a warning.
    """

    def __init__(
        self, make: Callable[[], Engine], config: ServeConfig, key: str | None = None, knows_turns: bool = True
    ) -> None:
        self.config, self.key, self.knows_turns, self.metrics = config, key, knows_turns, Metrics()
        self.async_engine = AsyncEngine(make, config.max_rows + config.max_queue, self.metrics.count, self._fail)
        self.started_s, self.body_memory = time.time(), BodyMemory()
        self.draining = self.fatal = False
        self.on_fatal: Callable[[], None] = lambda: None

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            Refusal: it is still being built.
        """
        if self.async_engine.engine is None:
            raise Refusal(503, "the model is being loaded; try again in a few seconds")
        return self.async_engine.engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The engine's tokenizer."""
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None
        return tokenizer

    @cached_property
    def texts(self) -> TokenTexts:
        """Texts of single tokens."""
        return TokenTexts(self.tokenizer)

    @property
    def max_loops(self) -> int:
        """Loops of a request, at most."""
        if self.engine.model.recurrent is None:
            return 1
        return min(HARD_MAX_LOOPS, self.config.max_loops or 2 * self.engine.model.cfg.max_loop_iters)

    @property
    def is_ready(self) -> bool:
        """True if a request would be answered."""
        late = self.async_engine.stuck_s > self.config.stuck_s / 6
        return self.async_engine.engine is not None and not (self.fatal or self.draining or late)

    def is_full(self) -> bool:
        """Tell whether there is no place for another answer."""
        return self.async_engine.n_taken >= self.async_engine.n_places and not self.draining

    async def watch(self) -> None:
        """Give up an engine that is stuck."""
        while not self.fatal:
            await asyncio.sleep(self.config.stuck_s / 60)
            if self.async_engine.stuck_s > self.config.stuck_s:
                self._fail()

    def _fail(self) -> None:
        self.fatal = True
        self.async_engine.fail()
        self.on_fatal()

    async def submit(self, asked: BaseRequest) -> Submission:
        """Give a request to the engine, and return once the engine has accepted it.

        Raises:
            Refusal: the request cannot be answered, or not now.
        """
        if self.draining or self.fatal:
            raise Refusal(503, "the server is about to end; ask another one, or later")
        if asked.model:
            self.check_model(asked.model)
        n_prompts = len(asked.prompt) if isinstance(asked, CompletionRequest) else 1
        n, n_places = n_prompts * asked.n_made, self.async_engine.n_places
        n_loops = self._n_loops(asked)
        self._check_work(n * (asked.at(asked.limit_name) or 1), n_loops, asked.limit_name)
        if n > n_places:
            places = f"the server has {n_places} places (--max-rows and --max-queue together); ask for fewer at a time"
            message = f"{n_prompts} prompts with n={asked.n_made} are {n} answers, and {places}"
            raise Refusal(400, message, "n" if asked.n_made > 1 else asked.prompt_field)
        try:
            return await self.async_engine.submit(n, lambda: self._encode(asked, n_loops))
        except (ImportError, TypeError, ValueError) as fault:
            # The engine has its own names of two fields, and a message that begins with no field is about the prompt.
            names = {"max_tokens": asked.limit_name, "json_schema": asked.format_field}
            found = re.match(r"json_schema\b|\w+(?=(\[\w+\])?=)", str(fault))
            param = names.get(found[0], found[0]) if found else asked.prompt_field
            is_field = param.partition(".")[0] in type(asked).model_fields
            message = re.sub(r"\b(max_tokens|json_schema)\b", lambda name: names[name[0]], str(fault))
            raise Refusal(400, message, param if is_field else asked.prompt_field) from None

    def _encode(self, asked: BaseRequest, n_loops: int | None) -> list[EncodedPrompt]:
        """Encode a request, in the encoder's thread: for each prompt its answers, one after the other."""
        if asked.json_schema is not None and self.engine.grammars is not None:
            self.engine.grammars.matcher(asked.json_schema)  # the engine finds it compiled, and does not wait for it
        ids = asked.encode(self.tokenizer, self.config.plain)
        end = end_of_turn(self.tokenizer) if isinstance(asked, Conversation) and not self.config.plain else None
        bounds = [self._max_new_tokens(asked, len(each), len(ids), n_loops) for each in ids]
        work = sum(len(each) + asked.n_made * bound for each, bound in zip(ids, bounds, strict=True))
        self._check_work(work, n_loops, asked.limit_name)
        params = [asked.params(bound, n_loops, [end] if isinstance(end, str) else []) for bound in bounds]
        return [(each, how.of_answer(i)) for each, how in zip(ids, params, strict=True) for i in range(asked.n_made)]

    def _max_new_tokens(self, asked: BaseRequest, n_prompt: int, n_prompts: int, n_loops: int | None) -> int:
        """Return the request's own bound, or else the default as far as it fits."""
        if (given := asked.at(asked.limit_name)) is not None:
            return given
        cfg, n_loops = self.engine.model.cfg, n_loops or 1
        budget = (self.config.max_work // n_loops // n_prompts - n_prompt) // asked.n_made
        room = min(cfg.max_seq_len, self.engine.n_tokens_at(n_loops)) - n_prompt
        return max(1, min(asked.default_tokens, cfg.max_output_tokens, room, budget))

    def _n_loops(self, asked: BaseRequest) -> int | None:
        """Return the most loops of a token; None for a model without a loop."""
        n_loops, most = asked.n_loops, self.max_loops
        if self.engine.model.recurrent is None:
            if n_loops is not None:
                raise Refusal(400, f"n_loops={n_loops}: this model has no loop; leave n_loops out", "n_loops")
            return None
        if n_loops is None:
            scale = EFFORTS[asked.at(asked.effort_field) or "medium"]
            return max(1, min(most, math.ceil(scale * self.engine.model.cfg.max_loop_iters)))
        if n_loops > most:
            raise Refusal(400, f"n_loops={n_loops} must be at most {most}; use n_loops={most}", "n_loops")
        return n_loops

    def _check_work(self, tokens: int, n_loops: int | None, field: str) -> None:
        """Refuse a request that would take too long."""
        work, most = tokens * (n_loops or 1), self.config.max_work
        if work > most:
            formula = f"(prompt + n x {field}) x n_loops = {work} loop-tokens"
            remedy = "ask for fewer tokens, answers or loops"
            raise Refusal(400, f"the request's work, {formula}, must be at most {most}; {remedy}", field)

    def check_model(self, name: str) -> None:
        """Refuse a model that is not served."""
        if name != self.config.name:
            raise Refusal(
                404, f"model={name!r:.80} is not served; use {self.config.name!r}", "model", "model_not_found"
            )

    def card(self) -> dict[str, Any]:
        """Describe the model, as the list of models has it."""
        return {
            "id": self.config.name,
            "object": "model",
            "created": int(self.started_s),
            "owned_by": "open_mythos",
            **self._depths(),
            "context_length": self.engine.model.cfg.max_seq_len,
        }

    def _depths(self) -> dict[str, int]:
        most = self.max_loops
        return {"max_loops": most, "default_loops": min(most, self.engine.model.cfg.max_loop_iters)}

    def live(self) -> dict[str, Any]:
        """Describe what the engine is doing now."""
        engine, counts, rates = self.engine, self.async_engine.counts, self.metrics.rates()
        block, rows_by_loop = engine.model.recurrent, self.async_engine.rows_by_loop
        own = (None, engine.model.cfg.halting)
        rules = [] if block is None else [name for name, rule in HALTING_RULES.items() if rule.halting in own]
        return {
            "model": self.config.name,
            "max_rows": self.config.max_rows,
            "rows_by_loop": rows_by_loop,
            "looping": sum(rows for _, rows in rows_by_loop),
            "waiting": counts["waiting"],
            "admitted": counts["admitted"],
            "pages": {**{state: counts[f"pages_{state}"] for state in PAGE_STATES}, "total": engine.n_pages},
            "tokens_per_s": rates[0],
            "mean_loops": rates[1],
            **self._depths(),
            "rules": rules,
            "invariant": engine.invariant,
        }
