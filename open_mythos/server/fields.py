"""Types of fields, and objects inside of requests, that several routes share."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationInfo, model_validator

MAX_FIELDS = 64
"""Fields of a request and of each object in it, at most."""
MAX_SCHEMA_DEPTH = 64
EFFORTS: dict[str, float] = {"none": 0, "minimal": 0.25, "low": 0.5, "medium": 1, "high": 2, "xhigh": 4}
"""Loops of each `reasoning_effort`, in units of the model's `max_loop_iters`; always at least one loop."""
Neutral = Mapping[str, tuple[object, ...]]
"""Fields that are not built, by their path in the body, with the values that ask for nothing; null always does."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a content's part that is text, in chats and in /v1/responses."""


class FieldError(ValueError):
    """An error whose message names its field itself, and that field's path; None for a whole object."""


def _as_text(value: Any, info: ValidationInfo) -> Any:
    """Join the text of a content in parts; None is for an assistant that has called tools."""
    if value is None and info.data.get("role") not in ("assistant", None):
        raise ValueError("must be a string, or a list of text parts")
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


def _shallow(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse a deep schema: to write it out again takes a stack frame for each level."""
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
        if not level:
            return schema
    raise ValueError(f"must be nested at most {MAX_SCHEMA_DEPTH} levels deep")


Text = Annotated[str, AfterValidator(_whole)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Name = Annotated[str, Field(max_length=64)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class Fields(BaseModel, strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True):
    """An object of a request: unknown fields are refused, and null is the same as leaving a field out."""

    unsupported: ClassVar[Neutral] = {}

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


class Message(Fields):
    """A turn of a conversation; the model sees its role and its content only."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Text | None, BeforeValidator(_as_text)] = Field(None, validate_default=True)
    name: Name = ""
    tool_calls: list[Any] = []
    function_call: Any = None
    tool_call_id: str = ""
    annotations: list[Any] = []
    audio: Any = None
    refusal: str = ""
    reasoning_content: str = ""
    reasoning: Any = None

    @property
    def is_shown(self) -> bool:
        """True unless it is a tool's answer or a turn that does nothing but call tools."""
        calls = bool(self.tool_calls or self.function_call)
        return self.role not in ("tool", "function") and not (self.content is None and calls)

    @property
    def turn(self) -> dict[str, str]:
        """The turn in the form that the chat template takes."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}


UNSEEN = tuple(name for name in Message.model_fields if name not in ("role", "content", "name"))
"""Fields of a message that the model does not see."""


class JsonSchema(Fields):
    """A schema with a name; every answer matches in full, whatever `name`, `description` and `strict` say."""

    name: Name = ""
    description: str = ""
    strict: bool = True
    schema_: Annotated[dict[str, Any], Field(alias="schema"), AfterValidator(_shallow)] = Field({})


class Format(Fields):
    """Form of the answer."""

    type: Literal["text", "json_object", "json_schema"]

    @property
    def schema_text(self) -> str | None:
        """JSON schema that the answer has to match; None: any text."""
        named = getattr(self, "json_schema", self)  # in /v1/responses the schema is beside its type
        schemas = {"json_object": {"type": "object"}, "json_schema": getattr(named, "schema_", None)}
        return json.dumps(schemas[self.type]) if self.type in schemas else None


class ResponseFormat(Format):
    """Form of the answer to a completion or a chat."""

    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema with a schema")
        return self
