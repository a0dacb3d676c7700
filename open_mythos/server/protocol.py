"""Requests over HTTP: OpenAI's fields, those of the engine, the bounds of each; and errors in OpenAI's form.

Every field has a type and a bound, so a request that passes is small and shallow. In one that does not pass few errors
are looked for: to list a megabyte of them takes seconds, in which nobody else is answered. An unknown field is
refused, since a mistyped `n_loop` would otherwise be answered at the wrong depth; a field that is not built is refused
unless its value asks for nothing.
"""

import dataclasses
import re
from collections.abc import Sequence
from functools import reduce
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from starlette.responses import JSONResponse

from open_mythos.generation.sampling_params import MAX_LOGIT_BIASES, OPTIONS, SamplingParams
from open_mythos.server.fields import UNSEEN, Count, Effort, FieldError, Fields, Message, Neutral, ResponseFormat, Text
from open_mythos.tokenization.chat_template import BadMessages, join, render
from open_mythos.tokenization.tokenizer import Tokenizer

MAX_BODY_BYTES = 2**20
MAX_ALL_STOP_CHARS = 1024
"""Characters of all stop strings together, at most: each is searched for after every token."""
RETRY_S = "1"
"""Seconds after which a refused client may ask again."""
BUSY = "as many answers as may be are in work or waiting; try again later"
REASONS = {401: "key", 404: "invalid", 413: "too large", 429: "busy", 431: "too large", 500: "failed", 503: "not ready"}
"""Labels of refusals in the metrics, by status; for others the code of the error, or else "invalid"."""


def error(
    message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
) -> dict[str, Any]:
    """Build an error object in the form that OpenAI's clients read."""
    return {"error": {"message": message[:400], "type": kind, "param": param and param[:80], "code": code}}


class Refusal(Exception):
    """A request that is not answered; `response` says why, and `reason` is its label in the metrics."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        kind = "unavailable" if status >= 500 else "overloaded" if status == 429 else "invalid_request_error"
        named = {"retry-after": RETRY_S} if status in (429, 503) else {}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        self.reason = REASONS.get(status, code or "invalid")
        self.response = JSONResponse(error(message, param, code, kind), status, named)


def bound(name: str) -> Any:
    """Return the bound of an option of the engine as a constraint of pydantic."""
    limit = OPTIONS[name].metadata["bound"]
    return Field(gt=limit.low, le=limit.high) if limit.is_above else Field(ge=limit.low, le=limit.high)


def _as_prompts(value: Any) -> Any:
    """Make a list of a single prompt."""
    if not isinstance(value, str | list):
        raise ValueError("must be a string, a list of strings, a list of ids, or a list of such lists")
    is_ids = isinstance(value, list) and bool(value) and not any(isinstance(item, str | list) for item in value)
    return [value] if isinstance(value, str) or is_ids else value


def _as_prompt(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of ids")
    return value


def _few_in_all(stops: list[str]) -> list[str]:
    if (n := sum(map(len, stops))) > MAX_ALL_STOP_CHARS:
        raise ValueError(f"the strings have {n} characters, at most {MAX_ALL_STOP_CHARS} are allowed")
    return stops


Id = Annotated[int, Field(ge=0, lt=2**31)]
Prompts = Annotated[
    list[Annotated[Text | Annotated[list[Id], Field(fail_fast=True)], BeforeValidator(_as_prompt)]],
    Field(min_length=1, max_length=128, fail_fast=True),
    BeforeValidator(_as_prompts),
]
Stops = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=64)]],
    Field(max_length=64, fail_fast=True),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    AfterValidator(_few_in_all),
]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$"), AfterValidator(int)], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIASES),
]


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
    top_k: Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(lambda k: max(0, k))] = 0
    """0 and -1 keep every token."""
    min_p: Annotated[float, bound("min_p")] = 0.0
    repetition_penalty: Annotated[float, bound("repetition_penalty")] = 1.0
    frequency_penalty: Annotated[float, bound("frequency_penalty")] = 0.0
    presence_penalty: Annotated[float, bound("presence_penalty")] = 0.0
    logit_bias: LogitBias = Field({})

    n_loops: Count | None = None
    min_loops: Count | None = None
    exit: Annotated[str, Field(max_length=256)] | None = None
    exit_threshold: Annotated[float, bound("exit_threshold")] | None = None

    # For compatibility with other servers; these have no effect here.
    user: Annotated[str, Field(max_length=256)] | None = None
    metadata: dict[str, str] = Field({})
    store: bool = False
    service_tier: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    prompt_cache_retention: str = ""

    # Names of the fields that differ between the routes.
    prompt_field: ClassVar[str]
    effort_field: ClassVar[str] = "reasoning_effort"
    """Number of loops as one of `EFFORTS`; `n_loops` wins."""
    format_field: ClassVar[str] = "response_format"
    limit_fields: ClassVar[tuple[str, ...]] = ("max_tokens",)
    """Names of the bound of the new tokens; the first that is given wins."""
    default_tokens: ClassVar[int] = 512
    """New tokens where the request gives no bound; fewer where the context or the work budget leaves fewer."""

    def at(self, path: str) -> Any:
        """Return the value at a path such as text.format; None if a part of it is left out."""
        return reduce(lambda value, name: getattr(value, name, None), path.split("."), self)

    @property
    def n_made(self) -> int:
        """Answers to make to each prompt."""
        return 1

    @property
    def n_best(self) -> int | None:
        """Number of best tokens to return with each token; None: no log-probabilities at all."""
        return None

    @property
    def limit_name(self) -> str:
        """Name of the field that bounds the new tokens, as this request gives it."""
        given = (name for name in self.limit_fields if getattr(self, name) is not None)
        return next(given, self.limit_fields[-1])

    @property
    def json_schema(self) -> str | None:
        """JSON schema that the answer has to match; None: any text."""
        return self.at(f"{self.format_field}.schema_text")

    def encode(self, tokenizer: Tokenizer, plain: bool) -> list[list[int]]:
        """Encode the prompts; where `plain`, a conversation is its messages' text."""
        raise NotImplementedError

    def params(self, max_tokens: int, n_loops: int | None, stops: Sequence[str]) -> SamplingParams:
        """Make the engine's parameters of all answers to a prompt."""
        # The fields of this class bear the engine's names.
        given = {name: getattr(self, name) for name in OPTIONS.keys() & BaseRequest.model_fields.keys()}
        given |= {"n": self.n_made, "max_tokens": max_tokens, "n_loops": n_loops, "stop": (*self.stop, *stops)}
        return SamplingParams(**given, logprobs=self.n_best, json_schema=self.json_schema)


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted, without effect."""


class ChoicesRequest(BaseRequest):
    """Fields of requests that are answered with a list of choices."""

    unsupported: ClassVar[Neutral] = {
        **dict.fromkeys(("audio", "prediction", "web_search_options"), ()),
        **dict.fromkeys(("tools", "functions"), ([],)),
        **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
        "suffix": ("",),
        "modalities": (["text"],),
        "verbosity": ("medium",),
    }

    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    response_format: ResponseFormat | None = None
    return_loops: bool = False
    """Return the loops of every token, and its text."""

    @property
    def n_made(self) -> int:
        return self.at("best_of") or self.n


class Conversation(BaseRequest):
    """A request whose model input is a list of messages."""

    def _turns(self) -> list[tuple[str, dict[str, str]]]:
        """Return the turns that the model sees, each with its path."""
        messages = enumerate(self.at(self.prompt_field))
        return [(f"{self.prompt_field}[{i}]", message.turn) for i, message in messages if message.is_shown]

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
        for i, message in enumerate(self.at(self.prompt_field)):
            path, fields = f"{self.prompt_field}[{i}]", [name for name in UNSEEN if getattr(message, name)]
            found += [f"{path}.{name}" for name in fields] if message.is_shown else [path]
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
    limit_fields = ("max_completion_tokens", "max_tokens")

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, bound("logprobs")] = 0
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _both(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs needs logprobs=true; send both, or neither", "top_logprobs")
        return self

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
        return Refusal(400, *fault.args)
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
