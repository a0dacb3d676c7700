"""/v1/responses for text: what a request may hold, and the objects and events of its answer."""

import json
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from open_mythos.server.async_engine import EngineDead, Job, Worker
from open_mythos.server.fields import (
    MAX_MESSAGES,
    Count,
    Effort,
    Fields,
    Format,
    JsonSchema,
    Message,
    Text,
    without_neutral,
)
from open_mythos.server.protocol import Conversation
from open_mythos.server.responses import Answer, usage


def _as_items(value: Any) -> Any:
    """A text is a turn of the user."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class Item(Message):
    """An item of the conversation: a message, sent or copied from an answer, or an item that the model does not see."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    id: str = ""
    status: str = ""
    phase: str = ""

    @model_validator(mode="before")
    @classmethod
    def _skip(cls, values: Any) -> Any:
        # What is no message is not shown, so nothing else of it matters; other types are refused as such.
        is_message = not isinstance(values, dict) or values.get("type") in (None, "message")
        return values if is_message else {"type": values["type"], "role": "tool", "content": ""}


class Reasoning(Fields):
    """Options of the depth."""

    effort: Effort | None = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, values: Any) -> Any:
        return without_neutral(values, {"summary": (), "generate_summary": ()}, "reasoning.")


class TextFormat(Format, JsonSchema):
    """The form of an answer, with the schema beside its type."""

    @property
    def form(self) -> dict[str, Any]:
        return self.schema_


class TextOptions(Fields):
    """How the answer is written."""

    format: TextFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, values: Any) -> Any:
        return without_neutral(values, {"verbosity": ("medium",)}, "text.")


class ResponseRequest(Conversation):
    """The body of /v1/responses."""

    said = "input"
    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
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

    input: Annotated[
        list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), BeforeValidator(_as_items)
    ]
    instructions: Text = ""
    """A system turn before the others."""
    max_output_tokens: Count | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    parallel_tool_calls: bool = True

    @property
    def effort(self) -> Effort | None:
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def format(self) -> tuple[str, str | None]:
        given = None if self.text is None else self.text.format
        return "text.format", None if given is None else given.schema_text

    @property
    def limit_name(self) -> str:
        return "max_output_tokens"

    @property
    def text_format(self) -> dict[str, Any]:
        """The form of the answer, as it was asked for."""
        given = None if self.text is None else self.text.format
        return {"type": "text"} if given is None else given.model_dump(by_alias=True, exclude_unset=True)

    @property
    def turns(self) -> list[tuple[str, dict[str, str]]]:
        first = [("instructions", {"role": "system", "content": self.instructions})] if self.instructions else []
        return [*first, *super().turns]


class ResponseShape:
    """Makes the objects of one answer and the events of its stream."""

    def __init__(self, model: str, asked: ResponseRequest, n_prompt: int) -> None:
        self._n_prompt, self._n_events = n_prompt, 0
        self._item_id = "msg_" + secrets.token_hex(12)
        self._head = {
            "id": "resp_" + secrets.token_hex(12),
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": asked.instructions or None,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": asked.effort, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": asked.text_format},
            "tool_choice": "auto",
            "tools": [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "user": asked.user or None,
        }

    def begun(self) -> dict[str, Any]:
        """The answer before anything has come of it."""
        return {**self._head, "status": "in_progress", **_outcome(None), "output": [], "usage": None}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer once it has ended."""
        status = {"stop": "completed", "length": "incomplete", "error": "failed"}.get(answer.finish_reason or "")
        output = [] if status == "failed" else [self._item(status or "incomplete", answer.text)]
        outcome = {"status": status or "cancelled", **_outcome(answer.finish_reason)}
        return {**self._head, **outcome, "output": output, "usage": self._usage(answer)}

    def event(self, kind: str, **fields: Any) -> bytes:
        """An event of the stream; all have a number."""
        data = {"type": kind, "sequence_number": self._n_events, **fields}
        self._n_events += 1
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()

    def opening(self) -> list[bytes]:
        """The events before the first piece of text."""
        return [
            self.event("response.created", response=self.begun()),
            self.event("response.in_progress", response=self.begun()),
            self.event("response.output_item.added", output_index=0, item=self._item("in_progress", None)),
            self.event("response.content_part.added", **self._place, part=_part("")),
        ]

    def delta(self, text: str) -> bytes:
        """The event of a piece of text."""
        return self.event("response.output_text.delta", **self._place, delta=text, logprobs=[])

    def closing(self, answer: Answer) -> list[bytes]:
        """The events behind the last piece of text."""
        whole = self.whole(answer)
        if whole["status"] == "failed":
            return [self.event("response.failed", response=whole)]
        kind = "response.completed" if whole["status"] == "completed" else "response.incomplete"
        return [
            self.event("response.output_text.done", **self._place, text=answer.text, logprobs=[]),
            self.event("response.content_part.done", **self._place, part=_part(answer.text)),
            self.event("response.output_item.done", output_index=0, item=whole["output"][0]),
            self.event(kind, response=whole),
        ]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _usage(self, answer: Answer) -> dict[str, Any]:
        counts = usage([self._n_prompt], [answer])
        cached = counts["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
            "loops": counts["loops"],
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _outcome(finish_reason: str | None) -> dict[str, Any]:
    reason = {"reason": "max_output_tokens"} if finish_reason == "length" else None
    failed = {"code": "server_error", "message": "the logits are NaN"} if finish_reason == "error" else None
    return {"error": failed, "incomplete_details": reason}


async def response_events(worker: Worker, job: Job, shape: ResponseShape) -> AsyncGenerator[bytes]:
    """The events of a stream."""
    answer = Answer()
    try:
        for opening in shape.opening():
            yield opening
        async for _, event in worker.events(job):
            answer.add(event)
            if event.text:
                yield shape.delta(event.text)
        for closing in shape.closing(answer):
            yield closing
    except EngineDead:
        answer.finish_reason = "error"
        for closing in shape.closing(answer):
            yield closing
    finally:
        worker.cancel(job)
