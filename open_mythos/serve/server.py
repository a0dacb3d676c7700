"""The server: OpenAI's routes in front of an engine."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from open_mythos.chat import join, render
from open_mythos.serve.answers import DONE, Answer, Shape, sse, usage
from open_mythos.serve.gate import RETRY_S, Gate
from open_mythos.serve.page import playground
from open_mythos.serve.protocol import Asked, ChatRequest, CompletionRequest, error, refused
from open_mythos.serve.service import DEAD, Encode, Refusal, Service
from open_mythos.serve.worker import EngineDead, Job, Worker

T = TypeVar("T")
NAN = "the logits are NaN: the weights have diverged or overflow; serve earlier weights, or float32"
REASONS = {404: "invalid", 429: "busy", 500: "failed", 503: "not ready"}
"""Of refusals, by status, for the count."""

WARNING = "x-mythos-warning"
"""The header of an answer that may not be what was wanted."""
NO_TURNS = "this model was not trained on conversations, so its answers may make no sense; ask /v1/completions"
GONE = 499
"""The status of an answer that nobody reads."""


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
    worker, job = service.worker, None
    # At once, so that of many requests that come together those without a place are refused before they are read.
    n = service.admit(asked, len(prompts))
    try:
        wanted = await unless_gone(request.receive, service.prepare(asked, prompts, encode))
        if wanted is None:
            return Response(status_code=GONE)
        job = worker.submit(wanted)
    finally:
        if job is None:
            worker.give_back(n)
    if not await unless_gone(request.receive, service.accepted(job, asked.said)):
        worker.cancel(job)
        return Response(status_code=GONE)
    n_prompt = [len(ids) for ids, _ in wanted[:: asked.n]]
    is_chat = isinstance(asked, ChatRequest)
    shape = Shape(service.config.model, service.tokenizer, is_chat, asked.n_best, asked.return_loops)
    if asked.stream:
        return EventStream(pieces(worker, job, shape, asked, n_prompt))
    answers = [Answer() for _ in job.wanted]

    async def collect() -> Response:
        try:
            async for place, event in worker.events(job):
                answers[place].add(event)
        except EngineDead:
            raise Refusal(503, DEAD) from None
        if any(each.finish_reason == "error" for each in answers):
            raise Refusal(500, NAN)
        return JSONResponse(shape.whole(answers, usage(n_prompt, answers)))

    try:
        return await unless_gone(request.receive, collect()) or Response(status_code=GONE)
    finally:
        worker.cancel(job)


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


def warned(service: Service, response: Response) -> Response:
    """The answer to a chat, with a warning if the model knows no turns."""
    if not (service.config.knows_turns or service.config.plain):
        response.headers.append(WARNING, NO_TURNS)
    return response


def make_app(service: Service) -> FastAPI:
    """The application; its lifespan starts the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        service.worker.start()
        watching = asyncio.create_task(service.watch())
        yield
        watching.cancel()

    body, headers = playground()
    # Documents made by a program load their looks from elsewhere; the schema is a route like any other.
    app = FastAPI(title="open_mythos", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Gate, service.key, service.meters.refused, service.full, service.bodies)

    @app.get("/")
    async def page() -> Response:
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
            return join(messages, tokenizer) if service.config.plain else render(messages, tokenizer, reply=True)[0]

        return warned(service, await answer(service, request, body, [messages], encode))

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        service.meters.refused(REASONS.get(refusal.status, "invalid"))
        headers = {"retry-after": RETRY_S} if refusal.status in (429, 503) else None
        return JSONResponse(refusal.body, refusal.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, fault: RequestValidationError) -> Response:
        service.meters.refused("invalid")
        return JSONResponse(refused(list(fault.errors())), 400)

    @app.exception_handler(HTTPException)
    async def other(request: Request, fault: HTTPException) -> Response:
        service.meters.refused("invalid")
        said = str(fault.detail)
        if fault.status_code in (404, 405):
            called = f"{request.method} {request.scope['path']:.80}"
            said = f"{called} is no route here; a base_url ends in /v1, and docs/server.md lists the routes"
        return JSONResponse(error(said), fault.status_code, fault.headers)

    return app
