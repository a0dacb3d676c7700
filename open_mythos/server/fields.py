"""Types and bounds of the fields of requests over HTTP, and the fields that are not built."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from open_mythos.checks import check_choice
from open_mythos.config import HALTING_RULES
from open_mythos.generation.sampling_params import MAX_LOGIT_BIASES, OPTIONS

MAX_FIELDS = 64
"""Fields of a request and of each object in it, at most."""
MAX_ALL_STOP_CHARS = 1024
"""Characters of all stop strings together, at most: each is searched for after every token."""
MAX_SCHEMA_DEPTH = 64
EFFORTS: dict[str, float] = {"none": 0, "minimal": 0.25, "low": 0.5, "medium": 1, "high": 2, "xhigh": 4}
"""Loops of each `reasoning_effort`, in units of the model's `max_loop_iters`; always at least one loop."""

Neutral = Mapping[str, tuple[object, ...]]
UNSUPPORTED: Neutral = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields of completions and chats that are not built, with the values that ask for nothing; null always does."""
RESPONSES_UNSUPPORTED: Neutral = {
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "stream_options": ({}, {"include_obfuscation": False}, {"include_obfuscation": True}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""The same for /v1/responses."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a content's part that is text, in chats and in /v1/responses."""


class FieldError(ValueError):
    """An error whose message names its field itself; `param` is the field's path, None for a whole object."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


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


def _as_text(value: Any) -> Any:
    """Join the text of a content in parts."""
    if not isinstance(value, list):
        return value
    for place, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ValueError(f'part {place} is no text; send parts like {{"type": "text", "text": "..."}}')
    return "".join(part["text"] for part in value)


def _whole(text: str) -> str:
    """Refuse half of a surrogate pair, which JSON allows and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return text


def _few_in_all(stops: list[str]) -> list[str]:
    if (n := sum(map(len, stops))) > MAX_ALL_STOP_CHARS:
        raise ValueError(f"the strings have {n} characters, at most {MAX_ALL_STOP_CHARS} are allowed")
    return stops


def _rule(name: str) -> str:
    try:
        check_choice("exit", name, tuple(HALTING_RULES))
    except ValueError as error:
        raise FieldError(str(error), "exit") from None
    return name


Text = Annotated[str, AfterValidator(_whole)]
Content = Annotated[Text, BeforeValidator(_as_text)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
TopK = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(lambda k: max(0, k))]
"""0 and -1 keep every token."""
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Exit = Annotated[str, AfterValidator(_rule)]
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


class Fields(BaseModel):
    """An object of a request: unknown fields are refused, and null is the same as leaving a field out."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
    unsupported: ClassVar[Neutral] = {}
    """Fields that are not built, by their path in the body, with the values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # `logit_bias` has a bound of its own, on its type.
        inner = [each for name, each in values.items() if name != "logit_bias"]
        if any(isinstance(each, dict) and len(each) > MAX_FIELDS for each in (values, *inner)):
            raise FieldError(f"an object may have {MAX_FIELDS} fields at most", None)
        given = {name: value for name, value in values.items() if value is not None}
        for path, neutral in cls.unsupported.items():
            if (name := path.rpartition(".")[2]) in given and given.pop(name) not in neutral:
                raise FieldError(f"{path} is not supported here; leave it out", path)
        return given


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Taken, and without effect."""


class Message(Fields):
    """A turn of a conversation; the model sees its role and its content only."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = Field(None, validate_default=True)
    """Null where an assistant has called tools."""
    name: Annotated[str, Field(max_length=64)] = ""
    tool_calls: list[Any] = []
    function_call: Any = None
    tool_call_id: str = ""
    annotations: list[Any] = []
    audio: Any = None
    refusal: str = ""
    reasoning_content: str = ""
    reasoning: Any = None

    @field_validator("content", mode="before")
    @classmethod
    def _said(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("role") not in ("assistant", None):
            raise ValueError("must be a string, or a list of text parts")
        return value

    @property
    def is_shown(self) -> bool:
        """True unless it is a tool's answer or a turn that does nothing but call tools."""
        calls = bool(self.tool_calls or self.function_call)
        return self.role not in ("tool", "function") and not (self.content is None and calls)

    @property
    def unseen(self) -> list[str]:
        """Fields with a value that the model does not see."""
        return [name for name in UNSEEN if getattr(self, name)]

    def turn(self) -> dict[str, str]:
        """Return the turn in the form that the chat template takes."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}


UNSEEN = tuple(name for name in Message.model_fields if name not in ("role", "content", "name"))
"""Fields of a message that the model does not see."""


def _shallow(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse a deep schema: to write it out again takes a stack frame for each level."""
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
        if not level:
            return schema
    raise ValueError(f"must be nested at most {MAX_SCHEMA_DEPTH} levels deep")


class JsonSchema(Fields):
    """A schema with a name; every answer matches in full, whatever `name`, `description` and `strict` say."""

    name: Annotated[str, Field(max_length=64)] = ""
    description: str = ""
    strict: bool = True
    schema_: Annotated[dict[str, Any], Field(alias="schema"), AfterValidator(_shallow)] = Field({})


class Format(Fields):
    """Form of the answer."""

    type: Literal["text", "json_object", "json_schema"]

    @property
    def schema_text(self) -> str | None:
        """JSON schema that the answer has to match; None: any text."""
        wanted = {"text": None, "json_object": {"type": "object"}, "json_schema": self._schema()}[self.type]
        return None if wanted is None else json.dumps(wanted)

    def _schema(self) -> dict[str, Any]:
        raise NotImplementedError


class ResponseFormat(Format):
    """Form of the answer to a completion or a chat."""

    json_schema: JsonSchema | None = None

    def _schema(self) -> dict[str, Any]:
        return {} if self.json_schema is None else self.json_schema.schema_

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema with a schema")
        return self
