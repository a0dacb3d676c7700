"""/v1/responses for text: the request, and the objects and events of its answer."""

import secrets
import time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from open_mythos.engine.engine import TokenEvent
from open_mythos.server.fields import Count, Effort, Fields, Format, JsonSchema, Message, Neutral, Text
from open_mythos.server.protocol import Conversation
from open_mythos.server.responses import Answer, sse, usage


class Item(Message):
    """An item of the conversation: a message, new or from an earlier answer, or an item that the model does not see."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    id: str = ""
    status: str = ""
    phase: str = ""

    @model_validator(mode="before")
    @classmethod
    def _skip(cls, values: Any) -> Any:
        # An item that is no message is not shown, so its other fields do not matter; unknown types are refused.
        is_message = not isinstance(values, dict) or values.get("type") in (None, "message")
        return values if is_message else {"type": values["type"], "role": "tool", "content": ""}


class Reasoning(Fields):
    """Options of the depth."""

    unsupported: ClassVar[Neutral] = {"reasoning.summary": (), "reasoning.generate_summary": ()}

    effort: Effort | None = None


class TextFormat(Format, JsonSchema):
    """Form of the answer, with the schema beside its type."""


class TextOptions(Fields):
    """Options of the answer's text."""

    unsupported: ClassVar[Neutral] = {"text.verbosity": ("medium",)}

    format: TextFormat = TextFormat(type="text")


class ResponseRequest(Conversation):
    """The body of /v1/responses."""

    prompt_field, effort_field, format_field = "input", "reasoning.effort", "text.format"
    limit_fields = ("max_output_tokens",)
    unsupported: ClassVar[Neutral] = {
        **dict.fromkeys(("conversation", "max_tool_calls", "previous_response_id", "prompt"), ()),
        **dict.fromkeys(("include", "tools"), ([],)),
        "background": (False,),
        "stream_options": ({}, {"include_obfuscation": False}, {"include_obfuscation": True}),
        "tool_choice": ("none", "auto"),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: Annotated[
        list[Item],
        Field(min_length=1, max_length=1024, fail_fast=True),
        BeforeValidator(lambda value: [{"role": "user", "content": value}] if isinstance(value, str) else value),
    ]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    reasoning: Reasoning = Reasoning()
    text: TextOptions = TextOptions()
    parallel_tool_calls: bool = True

    def _turns(self) -> list[tuple[str, dict[str, str]]]:
        first = [("instructions", {"role": "system", "content": self.instructions})] if self.instructions else []
        return [*first, *super()._turns()]


ECHOED = {"instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "temperature", "top_p", "user"}
"""Fields of a request that stand in its response too."""


class ResponsesBuilder:
    """Builds the objects of one answer to one prompt, and the events of its stream."""

    def __init__(self, asked: ResponseRequest, prompts: list[list[int]], model: str) -> None:
        self._n_prompt, self._n_events = [len(ids) for ids in prompts], 0
        self.answers = [Answer()]
        item_id = "msg_" + secrets.token_hex(12)
        self._item = {"id": item_id, "type": "message", "role": "assistant"}
        self._place = {"item_id": item_id, "output_index": 0, "content_index": 0}
        self._head = {
            "id": "resp_" + secrets.token_hex(12),
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort, "summary": None},
            "store": False,
            "text": {"format": asked.text.format.model_dump(by_alias=True, exclude_unset=True)},
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            **asked.model_dump(include=ECHOED),
        }

    def whole(self) -> dict[str, Any]:
        """Build the answer once it has ended."""
        (answer,) = self.answers
        reason = answer.finish_reason
        status = {"stop": "completed", "length": "incomplete", "error": "failed"}.get(reason or "", "cancelled")
        item_status = "incomplete" if status == "cancelled" else status
        output = [] if status == "failed" else [{**self._item, "status": item_status, "content": [_part(answer.text)]}]
        counts = usage(self._n_prompt, self.answers)
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "output": output,
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
                "loops": counts["loops"],
            },
        }

    def opening(self) -> list[bytes]:
        """Write the events before the first piece of text."""
        nothing = {"error": None, "incomplete_details": None, "output": [], "usage": None}
        begun = {**self._head, "status": "in_progress", **nothing}
        item = {**self._item, "status": "in_progress", "content": []}
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._place, part=_part("")),
        ]

    def piece(self, _: int, event: TokenEvent) -> list[bytes]:
        """Write the event of one token's text."""
        self.answers[0].add(event)
        delta = {"delta": event.text, "logprobs": []}
        return [self._event("response.output_text.delta", **self._place, **delta)] if event.text else []

    def closing(self) -> list[bytes]:
        """Write the events after the last piece of text."""
        whole = self.whole()
        (item,) = whole["output"]
        (part,) = item["content"]
        kind = "response.completed" if whole["status"] == "completed" else "response.incomplete"
        return [
            self._event("response.output_text.done", **self._place, text=part["text"], logprobs=[]),
            self._event("response.content_part.done", **self._place, part=part),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(kind, response=whole),
        ]

    def failed(self, message: str) -> bytes:
        """Write the event of a stream that breaks off."""
        self.answers[0].finish_reason = "error"
        fault = {"code": "server_error", "message": message}
        return self._event("response.failed", response={**self.whole(), "error": fault})

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._n_events += 1
        return sse({"type": kind, "sequence_number": self._n_events - 1, **fields}, kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
