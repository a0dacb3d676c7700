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
from contextlib import suppress
from pathlib import Path
from typing import Any

from open_mythos.files import inside, is_text, read_text
from open_mythos.tokenization.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
END = "<|end|>"
MARKERS = (*(f"<|{role}|>" for role in ROLES), END)

MAX_TEMPLATE_BYTES = 64 * 2**10
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + (eos_token or '<|end|>') }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}\n"
)
"""The template as transformers reads it. Training on conversations puts it into the model's folder, and by it a folder
shows that its model knows them."""

Message = Mapping[str, Any]
"""{"role": one of ROLES, "content": text}; other keys are not read."""


class BadMessages(ValueError):
    """Messages that the template cannot hold. `reason` is the kind of fault in a few words, to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def render(messages: Sequence[Message], tokenizer: Tokenizer, reply: bool = False) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, and for each whether it is the assistant's: its words and the end of its turn.

    Args:
        reply: end with the assistant's marker, for a model to go on.

    Raises:
        BadMessages: there is none, a role is unknown, a content is no text or holds a marker or a special token.
    """
    check_messages(messages)
    end = tokenizer.encode(END) if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids, answer, contents = list[int](), list[bool](), list[range]()
    for message in messages:
        marker, content = _marker(message["role"], tokenizer), tokenizer.encode(message["content"])
        start = len(ids) + len(marker)
        contents.append(range(start, start + len(content)))
        ids += [*marker, *content, *end]
        answer += [False] * len(marker) + [message["role"] == "assistant"] * (len(content) + len(end))
    if reply:
        marker = _marker("assistant", tokenizer)
        ids, answer = ids + marker, answer + [False] * len(marker)
    check_ids([message["content"] for message in messages], ids, contents, tokenizer)
    return ids, answer


def join(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the messages' texts, a line break between them, for a model that knows no turns.

    Raises:
        BadMessages: as for `render`.
    """
    texts = [message["content"] for message in check_messages(messages)]
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text)
        check_ids([text], ids, [range(len(ids))], tokenizer, first=number)
    return tokenizer.encode("\n".join(texts))


def check_ids(
    texts: Sequence[str], ids: Sequence[int], places: Sequence[range], tokenizer: Tokenizer, first: int = 0
) -> None:
    """Refuse messages whose texts have become a marker or a special token: they could speak in another role.

    The ids decide, since a vocabulary may change a text before it is cut into tokens: with one that takes compatibility
    forms, case, accents or control characters away, many texts become the same marker. Ids before and behind a text
    count where they make a marker together with its own.

    Args:
        texts: the contents of the messages.
        ids: those of the whole conversation.
        places: for each text where its ids are among them.
        first: number of the first message.

    Raises:
        BadMessages: a text holds one of them.
    """
    used = MARKERS if tokenizer.eos_id is None else MARKERS[:-1]
    forms = {marker: [tokenizer.encode(marker), tokenizer.encode(marker + "\n")] for marker in used}
    for number, (text, where) in enumerate(zip(texts, places, strict=True), first):
        special = sorted(tokenizer.special_ids & set(ids[where.start : where.stop]))
        found = [f"the special token {tokenizer.token_name(i)}" for i in special]
        if tokenizer.unknown_token and tokenizer.unknown_token in text:
            found.append(f"the special token {tokenizer.unknown_token}")
        normalized = tokenizer.normalize(text)
        for marker in MARKERS:
            # A marker that grows together with the letters beside it has other ids, but still reads as one.
            spelled = {marker, tokenizer.normalize(marker) or marker}
            if any(s in normalized for s in spelled) or any(_overlaps(f, ids, where) for f in forms.get(marker, ())):
                found.append(marker)
        if found:
            raise BadMessages("marker in the text", f"messages[{number}] has {found[0]} in its content; take it out")


def _overlaps(part: Sequence[int], ids: Sequence[int], where: range) -> bool:
    """Return whether `part` stands among the ids so that at least one of it is in `where`."""
    part, n = list(part), len(part)
    at, last = max(0, where.start - n + 1), min(where.stop, len(ids) - n + 1)
    with suppress(ValueError):  # `index` finds no other
        while n:
            at = ids.index(part[0], at, last) + 1
            if list(ids[at - 1 : at - 1 + n]) == part:
                return True
    return False


def save_template(folder: Path) -> None:
    """Write the template into the folder of a model that was trained on conversations."""
    (folder / TEMPLATE_FILE).write_text(TEMPLATE, "utf-8")


def turns_unknown(folder: str | Path, remedy: str) -> str | None:
    """Return a warning about the model of a folder that was not trained on conversations in this template, or None.

    Args:
        remedy: what to do instead, as the user of that command would type it.

    Raises:
        OSError, ValueError: the folder's template cannot be read.
    """
    path = inside(Path(folder), TEMPLATE_FILE)
    if path.is_file() and read_text(path, MAX_TEMPLATE_BYTES) == TEMPLATE:
        return None
    return (
        f"{folder} was not trained on conversations (it lacks the {TEMPLATE_FILE} of 'mythos train chat'), so its "
        f"answers may make no sense; {remedy}"
    )


def check_messages(messages: object) -> Sequence[Message]:
    """Return the messages. Raise BadMessages unless they have known roles and texts without markers."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadMessages("no messages", f'messages={messages!r:.60} must be a list like [{{"role": "user", ...}}]')
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise BadMessages("unknown role", f"messages[{place}] has role={role!r}; use one of {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) or not is_text(content):
            why = f"messages[{place}] has content={content!r:.60}, which must be a string"
            raise BadMessages("content is no text", why)
        if found := next((marker for marker in MARKERS if marker in content), None):
            raise BadMessages("marker in the text", f"messages[{place}] has {found} in its content; take it out")
    return messages


def end_of_turn(tokenizer: Tokenizer) -> int | str:
    """Return what ends an answer, as `stop` of `generate` takes it."""
    return END if tokenizer.eos_id is None else tokenizer.eos_id


def _marker(role: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(f"<|{role}|>\n")
