"""The server: OpenAI's routes in front of an engine."""

import asyncio
import re
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from open_mythos.server.async_engine import EngineDead, Job, Wanted, Worker
from open_mythos.server.middleware import RETRY_S, Gate
from open_mythos.server.playground import playground
from open_mythos.server.protocol import (
    Asked,
    ChatRequest,
    ChoicesRequest,
    CompletionRequest,
    Conversation,
    error,
    refused,
)
from open_mythos.server.responses import DONE, Answer, Echo, Shape, best_of, sse, usage
from open_mythos.server.responses_api import ResponseRequest, ResponseShape, response_events
from open_mythos.server.service import DEAD, Encode, Refusal, Service
from open_mythos.tokenization.chat_template import BadMessages, join, render

T = TypeVar("T")
NAN = "the logits are NaN: the weights have diverged or overflow; serve earlier weights, or float32"
REASONS = {404: "invalid", 429: "busy", 500: "failed", 503: "not ready"}
"""Of refusals, by status, for the count."""

WARNING, MAX_WARNED = "x-mythos-warning", 8
"""The header of an answer that may not be what was wanted, and how many places of what was left out it names."""
NO_TURNS = "this model was not trained on conversations, so its answers may make no sense; ask /v1/completions"
GONE = 499
"""The status of an answer that nobody reads."""


class EventStream(Response):
    """Server-sent events as they come; they are closed when the client has gone."""

    def __init__(self, events: AsyncGenerator[bytes], headers: dict[str, str]) -> None:
        super().__init__(None, 200, {"cache-control": "no-store", **headers}, "text/event-stream")
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


async def submit(
    service: Service, request: Request, asked: Asked, prompts: list[Any], encode: Encode
) -> tuple[Job, list[Wanted]] | None:
    """Give a request's answers to the engine; None: its client has gone.

    Raises:
        Refusal: it cannot be answered, or not now.
    """
    worker, job = service.worker, None
    # At once, so that of many requests that come together those without a place are refused before they are read.
    n = service.admit(asked, len(prompts))
    try:
        wanted = await unless_gone(request.receive, service.prepare(asked, prompts, encode))
        if wanted is None:
            return None
        job = worker.submit(wanted)
    finally:
        if job is None:
            worker.give_back(n)
    if not await unless_gone(request.receive, service.accepted(job, asked)):
        worker.cancel(job)
        return None
    return job, wanted


async def answer(
    service: Service, request: Request, asked: ChoicesRequest, prompts: list[Any], encode: Encode
) -> Response:
    """Answer a request for choices of either kind, at once or as a stream."""
    submitted = await submit(service, request, asked, prompts, encode)
    if submitted is None:
        return Response(status_code=GONE)
    job, wanted = submitted
    worker, tokenizer, headers = service.worker, service.tokenizer, not_seen(asked)
    ids = [each for each, _ in wanted[:: asked.n_made]]
    n_prompt = [len(each) for each in ids]
    try:
        echoes: list[Echo] = []
        if asked.echoes:
            pairs = list(zip(prompts, ids, strict=True))
            echoes = await worker.encode(lambda: [Echo.of(prompt, each, tokenizer) for prompt, each in pairs])
        is_chat = isinstance(asked, ChatRequest)
        model, texts = service.config.model, service.texts
        shape = Shape(model, texts, is_chat, asked.n_best, asked.return_loops, echoes, asked.n)
        if asked.stream:
            return EventStream(pieces(worker, job, shape, asked, n_prompt), headers)

        async def collect() -> Response:
            made = await all_of(worker, job)
            best, counts = best_of(made, asked.n, asked.n_made), usage(n_prompt, made)

            def respond() -> Response:
                return JSONResponse(shape.whole(best, counts), headers=headers)

            # Log-probabilities can be long, and the event loop has others to answer.
            return respond() if asked.n_best is None else await worker.encode(respond)

        if (response := await unless_gone(request.receive, collect())) is not None:
            return response
    except BaseException:
        worker.cancel(job)
        raise
    worker.cancel(job)
    return Response(status_code=GONE)


async def all_of(worker: Worker, job: Job) -> list[Answer]:
    """A job's answers once all have ended.

    Raises:
        Refusal: the engine has failed, or the logits are NaN.
    """
    answers = [Answer() for _ in job.wanted]
    try:
        async for place, event in worker.events(job):
            answers[place].add(event)
    except EngineDead:
        raise Refusal(503, DEAD) from None
    if any(each.finish_reason == "error" for each in answers):
        raise Refusal(500, NAN)
    return answers


async def pieces(
    worker: Worker, job: Job, shape: Shape, asked: ChoicesRequest, n_prompt: list[int]
) -> AsyncGenerator[bytes]:
    """The events of a stream."""
    answers = [Answer() for _ in job.wanted]
    every_token = asked.return_loops or asked.n_best is not None
    try:
        for place in range(len(answers)):
            if opening := shape.opening(place):
                yield sse(opening)
        async for place, event in worker.events(job):
            echo = None if answers[place].request is not None else shape.echo(place)
            n_chars = answers[place].n_chars
            answers[place].add(event)
            if event.finish_reason == "error":
                yield sse(error(NAN, kind="server_error"))
                return
            if echo is not None:
                yield sse(await worker.encode(partial(shape.prompt, place, echo, event.request)))
            if event.text or every_token or event.finish_reason is not None:
                yield sse(shape.piece(place, event, n_chars))
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield sse(shape.closing(usage(n_prompt, answers)))
        yield DONE
    except EngineDead:
        yield sse(error(DEAD, kind="server_error"))
    finally:
        worker.cancel(job)


async def respond(service: Service, request: Request, asked: ResponseRequest, encode: Encode) -> Response:
    """Answer a request of /v1/responses, at once or as a stream."""
    submitted = await submit(service, request, asked, [asked.turns], encode)
    if submitted is None:
        return Response(status_code=GONE)
    job, ((ids, _),) = submitted
    worker, headers = service.worker, not_seen(asked)
    shape = ResponseShape(service.config.model, asked, len(ids))
    if asked.stream:
        return EventStream(response_events(worker, job, shape), headers)

    async def collect() -> Response:
        (made,) = await all_of(worker, job)
        return JSONResponse(shape.whole(made), headers=headers)

    try:
        return await unless_gone(request.receive, collect()) or Response(status_code=GONE)
    finally:
        worker.cancel(job)


def not_seen(asked: Asked) -> dict[str, str]:
    """The header that says what the model does not see of a conversation; none if it sees all."""
    unseen = asked.unseen if isinstance(asked, Conversation) else []
    more = f" and {len(unseen) - MAX_WARNED} more" if len(unseen) > MAX_WARNED else ""
    return {WARNING: f"not shown to the model: {', '.join(unseen[:MAX_WARNED])}{more}"} if unseen else {}


def chat_encoder(service: Service) -> Encode:
    """What makes ids of the turns of a conversation."""
    tokenizer, plain = service.tokenizer, service.config.plain

    def encode(turns: list[tuple[str, dict[str, str]]]) -> list[int]:
        places, messages = [place for place, _ in turns], [message for _, message in turns]
        try:
            return join(messages, tokenizer) if plain else render(messages, tokenizer, reply=True)[0]
        except BadMessages as fault:
            # The template counts the turns that it sees.
            message = re.sub(r"^messages\[(\d+)\]", lambda found: places[int(found[1])], str(fault))
            raise BadMessages(fault.reason, message) from None

    return encode


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
        return warned(service, await answer(service, request, body, [body.turns], chat_encoder(service)))

    @app.post("/v1/responses")
    async def responses(body: ResponseRequest, request: Request) -> Response:
        return warned(service, await respond(service, request, body, chat_encoder(service)))

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        service.meters.refused(REASONS.get(refusal.status, "invalid"))
        headers = {"retry-after": RETRY_S} if refusal.status in (429, 503) else None
        return JSONResponse(refusal.body, refusal.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, fault: RequestValidationError) -> Response:
        service.meters.refused("invalid")
        return JSONResponse(refused(list(fault.errors()), fault.body), 400)

    @app.exception_handler(HTTPException)
    async def other(request: Request, fault: HTTPException) -> Response:
        service.meters.refused("invalid")
        said = str(fault.detail)
        if fault.status_code in (404, 405):
            called = f"{request.method} {request.scope['path']:.80}"
            said = f"{called} is no route here; a base_url ends in /v1, and docs/server.md lists the routes"
        return JSONResponse(error(said), fault.status_code, fault.headers)

    return app
