"""Published conversation formats converted to messages: role and content, ShareGPT, and Alpaca instructions."""

from collections.abc import Mapping
from typing import Any

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Names of roles in other formats."""


def to_messages(record: object) -> object:
    """Return the messages of a conversation, each {"role": ..., "content": ...}; None for a record of no known layout.

    The layouts are {"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]} with the roles
    human, gpt and system, and {"instruction", "input", "output"} with earlier turns in `history`, [[asked, answer],
    ...]. The latter two may have a text `system` beside them. Nothing is checked here: what is no message, or calls a
    tool, is for `open_mythos.tokenization.chat_template.check_messages` to refuse.
    """
    if not isinstance(record, Mapping):
        return None
    if "messages" in record:
        turns = record["messages"]
        return [_message(turn) for turn in turns] if isinstance(turns, list) else turns
    turns = record.get("conversations", record.get("conversation"))
    if isinstance(turns, list):
        messages = [_message(turn) for turn in turns]
    elif turns is None and "instruction" in record and "output" in record:
        asked, given = record["instruction"], record.get("input")
        if given:
            asked = f"{asked}\n\n{given}" if isinstance(asked, str) and isinstance(given, str) else None
        messages = _exchange(asked, record["output"])
        history = record.get("history") or []
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            return history
        messages = [message for pair in history for message in _exchange(*pair)] + messages
    else:
        return turns
    system = record.get("system") or record.get("system_prompt")
    has_system = any(isinstance(message, Mapping) and message["role"] == "system" for message in messages[:1])
    return [{"role": "system", "content": system}, *messages] if system and not has_system else messages


def _message(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    if turn.get("tool_calls") or turn.get("function_call"):
        return {"role": "tool call", "content": None}
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    return {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


def _exchange(asked: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
