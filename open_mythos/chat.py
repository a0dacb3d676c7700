"""The chat template: messages to token ids, in one place for training, generation and serving.

    <|system|>
    Be brief.<eos><|user|>
    What is 2 + 2?<eos><|assistant|>
    4.<eos>

A role's marker is one token where the vocabulary has it, and plain text otherwise. A turn ends with the tokenizer's end
token; one that has none ends it with the text <|end|>. Markers and contents are tokenized apart, so that the ids of a
conversation begin with the ids of each shorter one.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from open_mythos.tokenizer import Tokenizer

if TYPE_CHECKING:
    from open_mythos.model import OpenMythos

ROLES = ("system", "user", "assistant")
END = "<|end|>"
MARKERS = (*(f"<|{role}|>" for role in ROLES), END)

Message = Mapping[str, Any]
"""{"role": one of ROLES, "content": text}; other keys are not read."""


class BadMessages(ValueError):
    """Messages that the template cannot hold. `reason` is the kind of fault in a few words, to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def render(messages: Sequence[Message], tokenizer: Tokenizer, reply: bool = False) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and for each whether it is the assistant's: what it says and the end of its turn.

    Args:
        reply: end with the assistant's marker, for a model to go on.

    Raises:
        BadMessages: there is none, a role is unknown, a content is no text or holds a marker or a special token.
    """
    check_messages(messages)
    special = {i for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if i is not None}
    end = tokenizer.encode(END) if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids: list[int] = []
    answer: list[bool] = []
    for place, message in enumerate(messages):
        marker, content = _marker(message["role"], tokenizer), tokenizer.encode(message["content"])
        # Otherwise a text could end its turn and speak in another role.
        if special & set(content):
            raise BadMessages(
                "marker in the text", f"messages[{place}] has a special token written out in its content; take it out"
            )
        ids += [*marker, *content, *end]
        answer += [False] * len(marker) + [message["role"] == "assistant"] * (len(content) + len(end))
    if reply:
        marker = _marker("assistant", tokenizer)
        ids, answer = ids + marker, answer + [False] * len(marker)
    return ids, answer


def check_messages(messages: object) -> Sequence[Message]:
    """The messages, or BadMessages for what is no list of messages with known roles and texts without markers."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadMessages("no messages", f'messages={messages!r:.60} must be a list like [{{"role": "user", ...}}]')
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise BadMessages("unknown role", f"messages[{place}] has role={role!r}; use one of {', '.join(ROLES)}")
        content = message.get("content")
        # A JSON string may hold half of a surrogate pair, which is no text either.
        if not isinstance(content, str) or any("\ud800" <= c <= "\udfff" for c in content):
            raise BadMessages(
                "content is no text", f"messages[{place}] has content={content!r:.60}, which must be a string"
            )
        if found := next((marker for marker in MARKERS if marker in content), None):
            raise BadMessages("marker in the text", f"messages[{place}] has {found} in its content; take it out")
    return messages


def end_of_turn(tokenizer: Tokenizer) -> int | str:
    """What ends an answer, as `stop` of `generate` takes it."""
    return END if tokenizer.eos_id is None else tokenizer.eos_id


def reply(
    model: "OpenMythos",
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    max_new_tokens: int = 64,
    n_loops: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = 50,
    seed: int | None = None,
) -> str:
    """The assistant's next message; the arguments are those of `generate`."""
    ids, _ = render(messages, tokenizer, reply=True)
    stop = end_of_turn(tokenizer)
    out = model.generate(ids, max_new_tokens, n_loops, temperature, top_k, stop=stop, tokenizer=tokenizer, seed=seed)
    return tokenizer.decode(out[len(ids) :]).split(END)[0]


def _marker(role: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(f"<|{role}|>\n")
