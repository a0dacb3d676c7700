"""The server: OpenAI's routes in front of an engine."""

import asyncio
import math
import re
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from open_mythos.chat import end_of_turn, render
from open_mythos.nn.halting import EXIT_THRESHOLDS
from open_mythos.serve.answers import DONE, Answer, Shape, sse, usage
from open_mythos.serve.engine import Engine
from open_mythos.serve.gate import Gate
from open_mythos.serve.meters import Meters
from open_mythos.serve.page import playground
from open_mythos.serve.protocol import HARD_MAX_LOOPS, Asked, ChatRequest, CompletionRequest, error, refused
from open_mythos.serve.worker import Busy, EngineDead, Job, Worker
from open_mythos.tokenizer import Tokenizer

T = TypeVar("T")

Encode = Callable[[Any], list[int]]
DEAD = "the engine has failed; the server ends"
NAN = "the logits are NaN: the weights have diverged or overflow; serve earlier weights, or float32"
REASONS = {404: "invalid", 429: "busy", 500: "failed", 503: "not ready"}
"""Of refusals, by status, for the count."""

COMPLETION_TOKENS, CHAT_TOKENS = 16, 512
"""`max_tokens` of requests that name none; a chat gets less where the context or the work budget leaves less."""


@dataclass(frozen=True)
class ServeConfig:
    """What a server is told besides its engine."""

    model: str
    """The name that requests give."""
    max_loops: int | None = None
    """The most loops of a request; None: the model's `max_loop_iters`. Never more than 64."""
    max_queue: int = 128
    """Answers accepted beyond those that have a row."""
    max_work: int = 2**20
    """Loop-tokens of a request: (prompt + n x max_tokens) x n_loops."""
    plain: bool = False
    """For a model that knows no turns: messages are put one behind the other, and it continues them."""
    drain_s: float = 30.0
    """How long answers in work may take once the server is told to end."""
    stuck_s: float = 60.0
    """How long a step may take before the engine is given up; at a sixth of it /ready says 503."""


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
        self.max_rows, self.started_s = max_rows, time.time()
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

    @property
    def max_loops(self) -> int:
        return min(HARD_MAX_LOOPS, self.config.max_loops or self.engine.model.cfg.max_loop_iters)

    @property
    def default_loops(self) -> int:
        return min(self.max_loops, self.engine.model.cfg.max_loop_iters)

    @property
    def ready(self) -> bool:
        """Whether a request would be answered."""
        late = self.worker.stuck_s > self.config.stuck_s / 6
        return self.worker.engine is not None and not (self.fatal or self.draining or late)

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
            scale = {"low": 0.5, "medium": 1, "high": 2, None: 1}[asked.reasoning_effort]
            return max(1, min(self.max_loops, math.ceil(scale * self.engine.model.cfg.max_loop_iters)))
        if asked.n_loops > self.max_loops:
            raise Refusal(
                400,
                f"n_loops={asked.n_loops} must be at most {self.max_loops}; use n_loops={self.max_loops}",
                "n_loops",
            )
        return asked.n_loops

    def check_work(self, tokens: int, n_loops: int | None) -> None:
        """Refuse what would take too long."""
        work = tokens * (n_loops or 1)
        if work > self.config.max_work:
            raise Refusal(
                400,
                f"the request's work, (prompt + n x max_tokens) x n_loops = {work} loop-tokens, must be at most "
                f"{self.config.max_work}; ask for fewer tokens, answers or loops",
                "max_tokens",
            )

    def check_model(self, name: str) -> None:
        """Refuse a model that is not here."""
        if name != self.config.model:
            raise Refusal(
                404, f"model={name!r:.80} is not served; use {self.config.model!r}", "model", "model_not_found"
            )

    async def ask(self, asked: Asked, prompts: list[Any], encode: Encode) -> tuple[Job, list[int]]:
        """Put a request to the engine.

        Returns:
            The job, and the tokens of each prompt.

        Raises:
            Refusal: it cannot be answered, or not now; nothing has been done.
        """
        if self.draining or self.fatal:
            raise Refusal(503, "the server is about to end; ask another one, or later")
        if asked.model:
            self.check_model(asked.model)
        is_chat, n_loops, n = isinstance(asked, ChatRequest), self.n_loops(asked), len(prompts) * asked.n
        given = asked.max_completion_tokens or asked.max_tokens if isinstance(asked, ChatRequest) else asked.max_tokens
        self.check_work(n * (given or 1), n_loops)
        end = end_of_turn(self.tokenizer) if is_chat and not self.config.plain else None
        try:
            self.worker.reserve(n)
        except Busy:
            raise Refusal(429, f"{self.worker.most} answers are in work or waiting; try again later") from None
        try:
            ids = await self.worker.encode(lambda: [encode(prompt) for prompt in prompts])
            max_tokens = given or (self._room(len(ids[0]), asked.n, n_loops) if is_chat else COMPLETION_TOKENS)
            self.check_work(sum(len(each) + asked.n * max_tokens for each in ids), n_loops)
            stops = [end] if isinstance(end, str) else []
            params = [asked.params(max_tokens, n_loops, stops, place) for place in range(asked.n)]
        except BaseException as fault:
            self.worker.give_back(n)
            if isinstance(fault, ValueError):
                raise Refusal(400, str(fault), "messages" if is_chat else "prompt") from None
            raise
        try:
            return await self.worker.submit([(each, how) for each in ids for how in params]), [len(i) for i in ids]
        except EngineDead:
            raise Refusal(503, DEAD) from None
        except (TypeError, ValueError) as fault:
            raise Refusal(400, str(fault), field_of(fault, "messages" if is_chat else "prompt")) from None

    def _room(self, n_prompt: int, n: int, n_loops: int | None) -> int:
        """`max_tokens` of a chat that names none."""
        cfg = self.engine.model.cfg
        budget = (self.config.max_work // (n_loops or 1) - n_prompt) // n
        return max(1, min(CHAT_TOKENS, cfg.max_output_tokens, cfg.max_seq_len - n_prompt, budget))

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
            "rules": ["fixed", *(["act"] if block is not None and block.act is not None else []), *EXIT_THRESHOLDS],
            "invariant": engine.invariant,
        }


def field_of(fault: Exception, otherwise: str) -> str:
    """The field that a message of the engine begins with."""
    match = re.match(r"(\w+)=", str(fault))
    return match[1] if match and match[1] in ChatRequest.model_fields else otherwise


class EventStream(Response):
    """Server-sent events as they come; they are closed when the client has gone."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(None, 200, {"cache-control": "no-store"}, "text/event-stream")
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            async with aclosing(self.events):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for data in self.events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        await unless_gone(receive, write())


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What the work gives; None, and it is cancelled, when the client goes."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def answer(service: Service, request: Request, asked: Asked, prompts: list[Any], encode: Encode) -> Response:
    """Answer a request of either kind, at once or as a stream."""
    job, n_prompt = await service.ask(asked, prompts, encode)
    is_chat = isinstance(asked, ChatRequest)
    shape = Shape(service.config.model, service.tokenizer, is_chat, asked.n_best, asked.return_loops)
    if asked.stream:
        return EventStream(pieces(service.worker, job, shape, asked, n_prompt))
    answers = [Answer() for _ in job.wanted]

    async def collect() -> Response:
        async for place, event in service.worker.events(job):
            answers[place].add(event)
        if any(each.finish_reason == "error" for each in answers):
            raise Refusal(500, NAN)
        return JSONResponse(shape.whole(answers, usage(n_prompt, answers)))

    try:
        return await unless_gone(request.receive, collect()) or Response(status_code=499)
    finally:
        service.worker.cancel(job)


async def pieces(worker: Worker, job: Job, shape: Shape, asked: Asked, n_prompt: list[int]) -> AsyncGenerator[bytes]:
    """The events of a stream."""
    answers = [Answer() for _ in job.wanted]
    every_token = asked.return_loops or asked.n_best is not None
    try:
        for place in range(len(answers)):
            if opening := shape.opening(place):
                yield sse(opening)
        async for place, event in worker.events(job):
            offset = len(answers[place].text)
            answers[place].add(event)
            if event.finish_reason == "error":
                yield sse(error(NAN, kind="server_error"))
                return
            if event.text or every_token or event.finish_reason is not None:
                yield sse(shape.piece(place, event, offset))
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield sse(shape.closing(usage(n_prompt, answers)))
        yield DONE
    except EngineDead:
        yield sse(error(DEAD, kind="server_error"))
    finally:
        worker.cancel(job)


def make_app(service: Service) -> FastAPI:
    """The application; its lifespan starts the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        service.worker.start()
        watching = asyncio.create_task(service.watch())
        yield
        watching.cancel()

    # Documents made by a program load their looks from elsewhere; the schema is a route like any other.
    app = FastAPI(title="open_mythos", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, service.key, service.meters.refused)

    @app.get("/")
    async def page() -> Response:
        body, headers = playground()
        return Response(body, headers=headers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/engine")
    async def engine() -> dict[str, Any]:
        return service.live()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        service.check_model(model)
        return service.card()

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        tokenizer = service.tokenizer
        return await answer(
            service, request, body, body.prompt, lambda p: tokenizer.encode(p) if isinstance(p, str) else p
        )

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        messages = [message.turn() for message in body.messages]
        tokenizer = service.tokenizer

        def encode(messages: list[dict[str, str]]) -> list[int]:
            if service.config.plain:
                return tokenizer.encode("\n".join(message["content"] for message in messages))
            return render(messages, tokenizer, reply=True)[0]

        return await answer(service, request, body, [messages], encode)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        service.meters.refused(REASONS.get(refusal.status, "invalid"))
        headers = {"retry-after": "1"} if refusal.status in (429, 503) else None
        return JSONResponse(refusal.body, refusal.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, fault: RequestValidationError) -> Response:
        service.meters.refused("invalid")
        return JSONResponse(refused(list(fault.errors())), 400)

    @app.exception_handler(HTTPException)
    async def other(_: Request, fault: HTTPException) -> Response:
        service.meters.refused("invalid")
        return JSONResponse(error(str(fault.detail)), fault.status_code, fault.headers)

    return app
