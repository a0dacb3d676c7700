"""The tasks a run can train on. A new task is one file here and one line in this table, or `TASKS[T.name] = T`."""

from open_mythos.tasks.addition import Addition
from open_mythos.tasks.brackets import Brackets
from open_mythos.tasks.chat import Chat
from open_mythos.tasks.khop import KHop
from open_mythos.tasks.mixed import Mixed
from open_mythos.tasks.parity import Parity
from open_mythos.tasks.shards import Shards
from open_mythos.tasks.stream import Stream
from open_mythos.tasks.task import FileTask, Task
from open_mythos.tasks.text import Text

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Addition, KHop, Parity, Brackets, Mixed, Text, Shards, Stream, Chat)
}

__all__ = [
    "TASKS", "Addition", "Brackets", "Chat", "FileTask", "KHop", "Mixed", "Parity", "Shards", "Stream", "Task", "Text",
]  # fmt: skip
