"""Requests over HTTP: OpenAI's fields, those of the engine, the bounds of each; and errors in OpenAI's form.

Every field has a type and a bound, so a request that passes is small and shallow. In one that does not pass few errors
are looked for: to list a megabyte of them takes seconds, in which nobody else is answered. An unknown field is
refused, since a mistyped `n_loop` would otherwise be answered at the wrong depth; a field that is not built is refused
unless its value asks for nothing.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator
from starlette.responses import JSONResponse

from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.server.fields import (
    UNSUPPORTED,
    Count,
    Effort,
    Exit,
    FieldError,
    Fields,
    Id,
    LogitBias,
    Message,
    Prompts,
    ResponseFormat,
    Stops,
    StreamOptions,
    TopK,
    bound,
)
from open_mythos.tokenization.chat_template import BadMessages, join, render
from open_mythos.tokenization.tokenizer import Tokenizer

MAX_BODY_BYTES = 2**20
RETRY_S = "1"
"""Seconds after which a refused client may ask again."""
REASONS = {401: "key", 404: "invalid", 413: "too large", 429: "busy", 431: "too large", 500: "failed", 503: "not ready"}
"""Labels of refusals in the metrics, by status; "invalid" for the others."""


def error(
    message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
) -> dict[str, Any]:
    """Build an error object in the form that OpenAI's clients read."""
    shown = None if param is None else param[:80]
    return {"error": {"message": message[:400], "type": kind, "param": shown, "code": code}}


class Refusal(Exception):
    """A request that is not answered; `response` says why, and `reason` is its label in the metrics."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        reason: str | None = None,
        **headers: str,
    ) -> None:
        super().__init__(message)
        kind = "unavailable" if status >= 500 else "overloaded" if status == 429 else "invalid_request_error"
        named = {"retry-after": RETRY_S} if status in (429, 503) else {}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        self.reason = reason or REASONS.get(status, "invalid")
        self.response = JSONResponse(error(message, param, code, kind), status, named)


class BaseRequest(Fields):
    """Fields that all kinds of request have."""

    model: Annotated[str, Field(max_length=256)] = ""
    seed: Annotated[int, bound("seed")] | None = None
    stop: Stops = Field([])
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] = Field([])
    ignore_eos: bool = False
    stream: bool = False

    temperature: Annotated[float, bound("temperature")] = 1.0
    top_p: Annotated[float, bound("top_p")] = 1.0
    top_k: TopK = 0
    min_p: Annotated[float, bound("min_p")] = 0.0
    repetition_penalty: Annotated[float, bound("repetition_penalty")] = 1.0
    frequency_penalty: Annotated[float, bound("frequency_penalty")] = 0.0
    presence_penalty: Annotated[float, bound("presence_penalty")] = 0.0
    logit_bias: LogitBias = Field({})

    n_loops: Count | None = None
    min_loops: Count | None = None
    exit: Exit | None = None
    exit_threshold: Annotated[float, bound("exit_threshold")] | None = None

    # For compatibility with other servers; these have no effect here.
    user: Annotated[str, Field(max_length=256)] = ""
    metadata: dict[str, str] = Field({})
    store: bool = False
    service_tier: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    prompt_cache_retention: str = ""

    prompt_field: ClassVar[str]
    """Name of the field with the model's input."""
    default_tokens: ClassVar[int] = 512
    """New tokens where the request gives no bound; fewer where the context or the work budget leaves fewer."""

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return 1

    @property
    def n_made(self) -> int:
        """Answers to make to each prompt."""
        return 1

    @property
    def n_best(self) -> int | None:
        """Number of best tokens to return with each token; None: no log-probabilities at all."""
        return None

    @property
    def effort(self) -> Effort | None:
        """Number of loops as one of `EFFORTS`; `n_loops` wins."""
        raise NotImplementedError

    @property
    def format(self) -> tuple[str, str | None]:
        """Name of the field that gives the form of the answer, and the JSON schema that the answer has to match."""
        raise NotImplementedError

    @property
    def limit_name(self) -> str:
        """Name of the field that bounds the new tokens, as this request gives it."""
        raise NotImplementedError

    @property
    def max_new_tokens(self) -> int | None:
        """Bound of the new tokens; None if the request gives none."""
        return getattr(self, self.limit_name)

    def encode(self, tokenizer: Tokenizer, plain: bool) -> list[list[int]]:
        """Encode the prompts; where `plain`, a conversation is its messages' text."""
        raise NotImplementedError

    def params(self, max_tokens: int, n_loops: int | None, stops: Sequence[str]) -> SamplingParams:
        """Make the engine's parameters of all answers to a prompt."""
        # The fields of this class bear the engine's names.
        names = {field.name for field in dataclasses.fields(SamplingParams)} & BaseRequest.model_fields.keys()
        given = {name: getattr(self, name) for name in names}
        given |= {"n": self.n_made, "max_tokens": max_tokens, "n_loops": n_loops, "stop": (*self.stop, *stops)}
        return SamplingParams(**given, logprobs=self.n_best, json_schema=self.format[1])


class ChoicesRequest(BaseRequest):
    """Fields of requests that are answered with a list of choices."""

    unsupported = UNSUPPORTED

    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    response_format: ResponseFormat | None = None
    return_loops: bool = False
    """Return the loops of every token, and its text."""

    @property
    def n_made(self) -> int:
        return self.n

    @property
    def effort(self) -> Effort | None:
        return self.reasoning_effort

    @property
    def format(self) -> tuple[str, str | None]:
        return "response_format", None if self.response_format is None else self.response_format.schema_text

    @property
    def limit_name(self) -> str:
        return "max_tokens"


class Conversation(BaseRequest):
    """A request whose model input is a list of messages."""

    def _messages(self) -> Sequence[Message]:
        return getattr(self, self.prompt_field)

    def _turns(self) -> list[tuple[str, dict[str, str]]]:
        """Return the turns that the model sees, each with its path."""
        messages = enumerate(self._messages())
        return [(f"{self.prompt_field}[{i}]", message.turn()) for i, message in messages if message.is_shown]

    def encode(self, tokenizer: Tokenizer, plain: bool) -> list[list[int]]:
        shown = self._turns()
        turns = [turn for _, turn in shown]
        try:
            return [join(turns, tokenizer) if plain else render(turns, tokenizer, reply=True)[0]]
        except BadMessages as fault:
            # The template counts the turns that it sees.
            message = re.sub(r"^messages\[(\d+)\]", lambda found: shown[int(found[1])][0], str(fault))
            raise BadMessages(fault.reason, message) from None

    @property
    def unseen(self) -> list[str]:
        """Paths of the messages, and of their fields, that the model does not see."""
        found = []
        for i, message in enumerate(self._messages()):
            path = f"{self.prompt_field}[{i}]"
            found += [f"{path}.{name}" for name in message.unseen] if message.is_shown else [path]
        return found


class CompletionRequest(ChoicesRequest):
    """The body of /v1/completions."""

    prompt_field = "prompt"
    default_tokens = 16

    prompt: Prompts
    logprobs: Annotated[
        int | None, Field(ge=0, le=5), BeforeValidator(lambda value: None if value is False else value)
    ] = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None

    @model_validator(mode="after")
    def _enough_to_choose_from(self) -> Self:
        best_of = f"best_of={self.n_made}"
        if self.n_made < self.n:
            raise FieldError(f"{best_of} must be at least n={self.n}; leave it out, or raise it", "best_of")
        if self.stream and self.n_made > self.n:
            remedy = f"send stream=false, or best_of={self.n}"
            raise FieldError(f"{best_of} above n={self.n} cannot be streamed; {remedy}", "best_of")
        return self

    @property
    def n_prompts(self) -> int:
        return len(self.prompt)

    @property
    def n_made(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def n_best(self) -> int | None:
        return self.logprobs

    def encode(self, tokenizer: Tokenizer, plain: bool) -> list[list[int]]:
        return [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in self.prompt]

    def params(self, max_tokens: int, n_loops: int | None, stops: Sequence[str]) -> SamplingParams:
        params = super().params(max_tokens, n_loops, stops)
        # Answers are ranked by their log-probabilities, whether or not these are returned.
        logprobs = 0 if self.n_made > self.n and self.n_best is None else self.n_best
        return dataclasses.replace(params, logprobs=logprobs, prompt_logprobs=self.n_best if self.echo else None)


class ChatRequest(ChoicesRequest, Conversation):
    """The body of /v1/chat/completions."""

    prompt_field = "messages"

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    """`max_tokens` under its newer name, which wins."""
    logprobs: bool = False
    top_logprobs: Annotated[int, bound("logprobs")] = 0
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _both(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs needs logprobs=true; send both, or neither", "top_logprobs")
        return self

    @property
    def limit_name(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def n_best(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


def invalid(errors: list[Any], body: object) -> Refusal:
    """Make the refusal of a body from the first error that pydantic found; it names the field."""
    # A field may have several forms; the error is that of the form that fits furthest.
    first = max((each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]), key=lambda each: len(each["loc"]))
    kind, fault = first["type"], first.get("ctx", {}).get("error")
    place = [part for part in first["loc"] if part != "body"]
    message = str(fault) if kind == "value_error" else first["msg"]
    if isinstance(fault, FieldError):
        return Refusal(400, message, fault.param)
    if not place and kind == "string_unicode":
        return Refusal(400, "a field's name is half of a surrogate pair, which is no text; check its spelling")
    if not place:
        return Refusal(400, "the body must be a JSON object, with content-type: application/json")
    if kind == "json_invalid":
        return Refusal(400, "the body is no JSON; send an object with the fields of docs/server.md")
    param = _path(place, body)
    if kind == "extra_forbidden":
        return Refusal(400, f"{param:.80} is no field of this request; check its spelling, or leave it out", param)
    value = first.get("input")
    shown = f"={value!r:.40}" if isinstance(value, int | float | str) else ""
    return Refusal(400, f"{param:.80}{shown}: {message:.200}", param)


def _path(place: list[int | str], body: object) -> str:
    """Write the path of a faulty field, without the form that pydantic has tried."""
    path, value = str(place[0]), body.get(place[0]) if isinstance(body, dict) else None
    for part in place[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
            value = value[part] if isinstance(value, list) and part < len(value) else None
        elif isinstance(value, dict) and (part in value or part == place[-1]):
            path += f".{part}"
            value = value.get(part)
    return path
