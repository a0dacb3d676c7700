"""What a request over HTTP may hold: OpenAI's fields, those of the engine, and how much of each.

Every field has a type and a bound, so a request that passes is small and shallow. Of one that does not few faults are
looked for: to list a megabyte of them takes seconds, in which nobody else is answered. A field that this server does
not know is refused, since a mistyped `n_loop` would otherwise be an answer at the wrong depth; one that asks for what
is not built is refused unless its value asks for nothing.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from open_mythos.serve.params import SamplingParams

MAX_BODY_BYTES = 2**20
MAX_FIELDS = 64
"""Of a request and of each object in it."""
MAX_ANSWERS = 8
"""To one prompt."""
MAX_PROMPTS = 8
MAX_MESSAGES = 1024
MAX_STOPS, MAX_STOP_CHARS = 4, 64
MAX_STOP_IDS = 64
MAX_LOGPROBS = 5
HARD_MAX_LOOPS = 64
"""Whatever the server's own bound."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields of OpenAI's that are not built, and the values that ask for nothing."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """One prompt is a list of one."""
    is_ids = isinstance(value, list) and bool(value) and not any(isinstance(item, str | list) for item in value)
    return [value] if isinstance(value, str) or is_ids else value


def _text(value: Any) -> Any:
    """The text of a content given in parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("content", "only parts of type 'text' are taken")
    return "".join(part["text"] for part in value)


def _prompt(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("prompt", "must be a string or a list of ids")
    return value


def _whole(text: str) -> str:
    """A JSON string may hold half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "half of a surrogate pair is no text") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Prompt = Annotated[Text | Annotated[list[Id], Field(fail_fast=True)], BeforeValidator(_prompt)]


class _Fields(BaseModel):
    """Nothing but the fields; null is the same as leaving one out."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if any(isinstance(each, dict) and len(each) > MAX_FIELDS for each in (values, *values.values())):
            raise PydanticCustomError("fields", "an object may have {most} fields at most", {"most": MAX_FIELDS})
        return {k: v for k, v in values.items() if v is not None}


class StreamOptions(_Fields):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Never done."""


class Message(_Fields):
    """A turn of a conversation; `name` is not shown to the model."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_text)]
    name: Annotated[str, Field(max_length=64)] = ""

    def turn(self) -> dict[str, str]:
        """As the chat template takes it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class Asked(_Fields):
    """Fields that both kinds of request have."""

    model: Annotated[str, Field(max_length=256)] = ""
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    stop: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
        Field(max_length=MAX_STOPS),
        BeforeValidator(_as_list),
    ] = []
    stop_token_ids: Annotated[list[Id], Field(max_length=MAX_STOP_IDS)] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    """0 and -1 keep every token."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0

    n_loops: Annotated[int, Field(ge=1, le=HARD_MAX_LOOPS)] | None = None
    min_loops: Annotated[int, Field(ge=1, le=HARD_MAX_LOOPS)] | None = None
    exit: Literal["fixed", "act", "latent_diff", "second_difference", "kl"] | None = None
    exit_threshold: Annotated[float, Field(ge=0)] | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    """Half of the default loops, the default, or twice as many; `n_loops` wins."""
    return_loops: bool = False
    """Tell the loops of every token, and its text."""

    # For other servers' sake; they change nothing here.
    user: Annotated[str, Field(max_length=256)] = ""
    metadata: dict[str, str] = {}
    store: bool = False
    service_tier: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name in NEUTRAL.keys() & values.keys():
            if values[name] is not None and values[name] not in NEUTRAL[name]:
                raise PydanticCustomError("named", "{name} is not supported here; leave it out", {"name": name})
        return {name: value for name, value in values.items() if name not in NEUTRAL}

    said: ClassVar[str]
    """The field that holds what the model reads."""

    @property
    def n_best(self) -> int | None:
        """How many of the best tokens to tell; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int | None:
        """`max_tokens` by whatever name; None: not told."""
        return self.max_tokens

    def params(self, max_tokens: int, n_loops: int | None, stops: list[str], place: int) -> SamplingParams:
        """What answer `place` asks of the engine."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_tokens=max_tokens,
            seed=None if self.seed is None else self.seed + place,
            stop=(*self.stop, *stops),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.n_best,
            n_loops=n_loops,
            min_loops=self.min_loops,
            exit=self.exit,
            exit_threshold=self.exit_threshold,
        )


class CompletionRequest(Asked):
    """The body of /v1/completions."""

    said = "prompt"

    prompt: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS), BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def n_best(self) -> int | None:
        return self.logprobs


class ChatRequest(Asked):
    """The body of /v1/chat/completions."""

    said = "messages"

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """`max_tokens` under its newer name, which wins."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _both(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("named", "top_logprobs needs logprobs=true; send both, or neither")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def n_best(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


Error = dict[str, Any]


def refused(errors: list[Any]) -> Error:
    """The first fault that pydantic found, as an error object that names the field."""
    # Of the ways that one field may be given the one that was followed furthest.
    first = max((each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]), key=lambda each: len(each["loc"]))
    if first["type"] == "named":  # by its first word
        return error(first["msg"], first["msg"].split()[0])
    place = [part for part in first["loc"] if part != "body"]
    param = str(place[0]) if place and first["type"] != "json_invalid" else None
    for part in place[1:]:
        if isinstance(part, int):
            param = f"{param}[{part}]"
        elif part in Message.model_fields:
            param = f"{param}.{part}"
    if first["type"] == "fields":
        return error(first["msg"])
    if not place:
        if first["type"] == "string_unicode":
            return error("a field's name is half of a surrogate pair, which is no text; check its spelling")
        return error("the body must be a JSON object, with content-type: application/json")
    if first["type"] == "json_invalid":
        return error("the body is no JSON; send an object with the fields of docs/server.md")
    if first["type"] == "extra_forbidden":
        return error(f"{param:.80} is no field of this request; check its spelling, or leave it out", param)
    value = first.get("input")
    shown = f"={value!r:.40}" if isinstance(value, int | float | str) else ""
    return error(f"{param or 'the body'}{shown}: {first['msg']:.200}", param)


def error(
    message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
) -> Error:
    """An error object as OpenAI's clients read it."""
    shown = None if param is None else param[:80]
    return {"error": {"message": message[:400], "type": kind, "param": shown, "code": code}}
