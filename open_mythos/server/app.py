"""The server: OpenAI's routes in front of an engine.

A request takes one path: its route validates it, `Service.submit` gives it to the engine, and a builder makes the
response from the engine's events, at once or as a stream. The middleware cancels a request whose client has gone.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from open_mythos.server.async_engine import Submission
from open_mythos.server.middleware import AccessControl
from open_mythos.server.playground import playground
from open_mythos.server.protocol import BaseRequest, ChatRequest, CompletionRequest, Conversation, Refusal, invalid
from open_mythos.server.responses import ResponseBuilder
from open_mythos.server.responses_api import ResponseRequest, ResponsesBuilder
from open_mythos.server.service import Service

WARNING, MAX_WARNED = "x-mythos-warning", 8
"""Header of an answer that may be unexpected, and how many paths it names of what the model does not see."""
NO_TURNS = "this model was not trained on conversations, so its answers may make no sense; ask /v1/completions"
Builder = ResponseBuilder | ResponsesBuilder


async def respond(service: Service, asked: BaseRequest, request: Request) -> Response:
    """Answer a request, at once or as a stream.

    Raises:
        Refusal: the request cannot be answered, or not now.
    """
    engine, submission = service.async_engine, await service.submit(asked)
    request.scope["stack"].callback(engine.cancel, submission)
    make = partial(_builder, service, asked, [ids for ids, _ in submission.prompts[:: asked.n_made]])
    # A prompt to send back, and log-probabilities, can be long, and the event loop has other requests.
    builder = await engine.encode(make) if asked.at("echo") else make()
    if asked.stream:
        events = _stream(service, asked, submission, builder)
        response: Response = StreamingResponse(events, 200, {"cache-control": "no-store"}, "text/event-stream")
    else:
        async for index, event in submission:
            builder.answers[index].add(event)
        response = JSONResponse(builder.whole() if asked.n_best is None else await engine.encode(builder.whole))
    for warning in _warnings(service, asked):
        response.headers.append(WARNING, warning)
    return response


def _builder(service: Service, asked: BaseRequest, prompts: list[list[int]]) -> Builder:
    """Make the builder of a request's response."""
    model = service.config.name or ""
    if isinstance(asked, ResponseRequest):
        return ResponsesBuilder(asked, prompts, model)
    assert isinstance(asked, CompletionRequest | ChatRequest)
    return ResponseBuilder(asked, prompts, model, service.tokenizer, service.texts)


async def _stream(
    service: Service, asked: BaseRequest, submission: Submission, builder: Builder
) -> AsyncGenerator[bytes]:
    """Yield the server-sent events of a response."""
    for chunk in builder.opening():
        yield chunk
    try:
        async for index, event in submission:
            piece = partial(builder.piece, index, event)
            is_long = asked.at("echo") and builder.answers[index].request is None
            for chunk in await service.async_engine.encode(piece) if is_long else piece():
                yield chunk
    except Refusal as failure:
        yield builder.failed(str(failure))
    else:
        for chunk in builder.closing():
            yield chunk


def _warnings(service: Service, asked: BaseRequest) -> list[str]:
    """Say what the model does not see of a conversation, and whether it knows turns at all."""
    if not isinstance(asked, Conversation):
        return []
    unseen, warnings = asked.unseen, []
    if unseen:
        more = f" and {len(unseen) - MAX_WARNED} more" if len(unseen) > MAX_WARNED else ""
        warnings.append(f"not shown to the model: {', '.join(unseen[:MAX_WARNED])}{more}")
    return warnings if service.knows_turns or service.config.plain else [*warnings, NO_TURNS]


def make_app(service: Service) -> FastAPI:
    """Make the application; its lifespan starts the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        service.async_engine.start()
        watching = asyncio.create_task(service.watch())
        yield
        watching.cancel()

    # The pages that document an API load their styles from elsewhere; the schema is a route like any other.
    app = FastAPI(title="open_mythos", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(AccessControl, service)
    _add_routes(app, service)
    _add_errors(app)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    body, headers = playground()

    @app.get("/")
    async def page() -> Response:
        return Response(body, headers=headers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"ready": service.is_ready}, 200 if service.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = service.metrics.text(len(asyncio.all_tasks()), service.async_engine.counts)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

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
        return await respond(service, body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await respond(service, body, request)

    @app.post("/v1/responses")
    async def responses(body: ResponseRequest, request: Request) -> Response:
        return await respond(service, body, request)


def _add_errors(app: FastAPI) -> None:
    """Turn the errors of the framework into refusals, which the middleware answers."""

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: Request, fault: RequestValidationError) -> Response:
        raise invalid(list(fault.errors()), fault.body)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, fault: HTTPException) -> Response:
        message = str(fault.detail)
        if fault.status_code in (404, 405):
            route = f"{request.method} {request.scope['path']:.80}"
            message = f"{route} is no route here; a base_url ends in /v1, and docs/server.md lists the routes"
        raise Refusal(fault.status_code, message, **(fault.headers or {}))
