"""What a request over HTTP may hold: OpenAI's fields, those of the engine, and how much of each.

Every field has a type and a bound, so a request that passes is small and shallow. Of one that does not few faults are
looked for: to list a megabyte of them takes seconds, in which nobody else is answered. A field that this server does
not know is refused, since a mistyped `n_loop` would otherwise be an answer at the wrong depth; one that asks for what
is not built is refused unless its value asks for nothing.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from open_mythos.generation.sampling_params import MAX_LOGPROBS as MAX_CHAT_LOGPROBS
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.server.fields import (
    MAX_ANSWERS,
    MAX_BEST_OF,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_STOP_IDS,
    NEUTRAL,
    Count,
    Effort,
    Exit,
    Fields,
    Id,
    LogitBias,
    Message,
    Penalty,
    Prompts,
    ResponseFormat,
    Stops,
    StreamOptions,
    without_neutral,
)

MAX_BODY_BYTES = 2**20


class Asked(Fields):
    """Fields that all kinds of request have."""

    model: Annotated[str, Field(max_length=256)] = ""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = Field([])
    stop_token_ids: Annotated[list[Id], Field(max_length=MAX_STOP_IDS)] = Field([])
    ignore_eos: bool = False
    stream: bool = False

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    """0 and -1 keep every token."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: LogitBias = Field({})

    n_loops: Count | None = None
    min_loops: Count | None = None
    exit: Exit | None = None
    exit_threshold: Annotated[float, Field(gt=0)] | None = None

    # For other servers' sake; they change nothing here.
    user: Annotated[str, Field(max_length=256)] = ""
    metadata: dict[str, str] = Field({})
    store: bool = False
    service_tier: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    prompt_cache_retention: str = ""

    neutral: ClassVar[dict[str, tuple[object, ...]]] = NEUTRAL
    """Fields that are not built, and the values that ask for nothing."""
    said: ClassVar[str]
    """The field that holds what the model reads."""

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, values: Any) -> Any:
        return without_neutral(values, cls.neutral)

    @property
    def n_best(self) -> int | None:
        """How many of the best tokens to tell; None: no log-probabilities at all."""
        return None

    @property
    def n_returned(self) -> int:
        """Answers to return to each prompt."""
        return 1

    @property
    def n_made(self) -> int:
        """Answers to make to each prompt, of which the best are returned."""
        return self.n_returned

    @property
    def echoes(self) -> bool:
        """True if prompts are sent back before their answers."""
        return False

    @property
    def effort(self) -> Effort | None:
        """A number of loops, by `EFFORTS`; `n_loops` wins."""
        raise NotImplementedError

    @property
    def format(self) -> tuple[str, str | None]:
        """The field that says what form the answer has, and the schema that it has to match, as JSON."""
        raise NotImplementedError

    @property
    def limit_name(self) -> str:
        """The field that bounds the new tokens, as this request gives it."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int | None:
        """The bound of the new tokens; None if the request gives none."""
        return getattr(self, self.limit_name)

    def params(self, max_tokens: int, n_loops: int | None, stops: list[str]) -> SamplingParams:
        """Make the engine's parameters of all answers to a prompt."""
        ranked = self.n_made > self.n_returned
        return SamplingParams(
            n=self.n_made,
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            max_tokens=max_tokens,
            seed=self.seed,
            stop=(*self.stop, *stops),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=0 if ranked and self.n_best is None else self.n_best,
            prompt_logprobs=self.n_best if self.echoes else None,
            json_schema=self.format[1],
            n_loops=n_loops,
            min_loops=self.min_loops,
            exit=self.exit,
            exit_threshold=self.exit_threshold,
        )


class ChoicesRequest(Asked):
    """Fields of requests that are answered with a list of choices."""

    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    response_format: ResponseFormat | None = None
    return_loops: bool = False
    """Tell the loops of every token, and its text."""

    @property
    def n_returned(self) -> int:
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


class Conversation(Asked):
    """A request whose model input is a list of messages, in the field `said`."""

    @property
    def said_messages(self) -> Sequence[Message]:
        """All of them."""
        return getattr(self, self.said)

    @property
    def turns(self) -> list[tuple[str, dict[str, str]]]:
        """Those that the model sees, each with its place, as the chat template takes them."""
        messages = enumerate(self.said_messages)
        return [(f"{self.said}[{place}]", message.turn()) for place, message in messages if message.is_shown]

    @property
    def unseen(self) -> list[str]:
        """Places and names of the parts that the model does not see."""
        found = []
        for place, message in enumerate(self.said_messages):
            where = f"{self.said}[{place}]"
            found += [f"{where}.{name}" for name in message.unseen] if message.is_shown else [where]
        return found


def _not_false(value: Any) -> Any:
    return None if value is False else value


class CompletionRequest(ChoicesRequest):
    """The body of /v1/completions."""

    said = "prompt"

    prompt: Prompts
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(_not_false)] = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=MAX_BEST_OF)] | None = None

    @model_validator(mode="after")
    def _enough_to_choose_from(self) -> Self:
        made = {"n": self.n, "made": self.n_made}
        if self.n_made < self.n:
            raise PydanticCustomError("named", "best_of={made} must be at least n={n}; leave it out, or raise it", made)
        if self.stream and self.n_made > self.n:
            raise PydanticCustomError(
                "named", "best_of={made} above n={n} cannot be streamed; send stream=false, or best_of={n}", made
            )
        return self

    @property
    def n_best(self) -> int | None:
        return self.logprobs

    @property
    def n_made(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def echoes(self) -> bool:
        return self.echo


class ChatRequest(ChoicesRequest, Conversation):
    """The body of /v1/chat/completions."""

    said = "messages"

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    """`max_tokens` under its newer name, which wins."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_CHAT_LOGPROBS)] = 0
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _both(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("named", "top_logprobs needs logprobs=true; send both, or neither")
        return self

    @property
    def limit_name(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def n_best(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


Error = dict[str, Any]


def refused(errors: list[Any], body: object) -> Error:
    """The first fault that pydantic found in a body, as an error object that names the field."""
    # Of the ways that one field may be given the one that was followed furthest.
    first = max((each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]), key=lambda each: len(each["loc"]))
    if first["type"] == "named":  # by its first word
        return error(first["msg"], re.split(r"[ =]", first["msg"])[0])
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "fields":
        return error(first["msg"])
    if not place:
        if first["type"] == "string_unicode":
            return error("a field's name is half of a surrogate pair, which is no text; check its spelling")
        return error("the body must be a JSON object, with content-type: application/json")
    if first["type"] == "json_invalid":
        return error("the body is no JSON; send an object with the fields of docs/server.md")
    param = _path(place, body)
    if first["type"] == "extra_forbidden":
        return error(f"{param:.80} is no field of this request; check its spelling, or leave it out", param)
    value = first.get("input")
    shown = f"={value!r:.40}" if isinstance(value, int | float | str) else ""
    return error(f"{param:.80}{shown}: {first['msg']:.200}", param)


def _path(place: list[int | str], body: object) -> str:
    """Where a fault is, as one writes it; pydantic also names the way it has tried, which is no part of that."""
    path, value = str(place[0]), body.get(place[0]) if isinstance(body, dict) else None
    for part in place[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
            value = value[part] if isinstance(value, list) and part < len(value) else None
        elif isinstance(value, dict) and (part in value or part == place[-1]):
            path += f".{part}"
            value = value.get(part)
    return path


def error(
    message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
) -> Error:
    """An error object as OpenAI's clients read it."""
    shown = None if param is None else param[:80]
    return {"error": {"message": message[:400], "type": kind, "param": shown, "code": code}}
