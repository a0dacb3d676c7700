"""The tasks a run can train on. A new task is one file here and one line in this table."""

from open_mythos.train.tasks.addition import Addition
from open_mythos.train.tasks.brackets import Brackets
from open_mythos.train.tasks.chat import Chat
from open_mythos.train.tasks.khop import KHop
from open_mythos.train.tasks.mixed import Mixed
from open_mythos.train.tasks.parity import Parity
from open_mythos.train.tasks.shards import Shards
from open_mythos.train.tasks.stream import Stream
from open_mythos.train.tasks.text import Text

TASKS = {task.name: task for task in (Addition, KHop, Parity, Brackets, Mixed, Text, Shards, Stream, Chat)}

__all__ = ["TASKS", "Addition", "Brackets", "Chat", "KHop", "Mixed", "Parity", "Shards", "Stream", "Text"]
