"""The settings of a server, which are options of `mythos serve` too. No torch, and none of the extra `serve`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from open_mythos.checks import check_int, check_number

HARD_MAX_LOOPS = 64
"""Loops of a request that a server may allow, at most."""


@dataclass(kw_only=True)
class ServeConfig:
    """Settings of a server besides those of its engine."""

    name: str | None = None
    """What requests call the model; left out: the folder's name."""
    max_rows: int = 32
    """Answers worked on at once."""
    max_queue: int = 128
    """Answers that wait beyond those; further ones are refused."""
    max_loops: int | None = None
    """The most loops of a request, up to 64; left out: twice the model's max_loop_iters."""
    max_work: int = 2**20
    """The most loop-tokens of a request: (prompt + n x max_tokens) x n_loops."""
    plain: bool = False
    """For a model that was not trained on conversations: it continues the messages' text."""
    drain_s: Annotated[float, tyro.conf.arg(name="drain")] = 30.0
    """Seconds that answers in work get to end in, once the server is told to end."""
    stuck_s: Annotated[float, tyro.conf.arg(name="stuck")] = 60.0
    """Seconds that a step, or reading a text, may take before the server gives up and ends with an error."""

    def __post_init__(self) -> None:
        check_int("max_work", self.max_work, 1)
        check_int("max_queue", self.max_queue, 0)
        if self.max_loops is not None:
            check_int("max_loops", self.max_loops, 1, HARD_MAX_LOOPS)
        check_number("drain_s", self.drain_s, 0)
        check_number("stuck_s", self.stuck_s, 0, above=True)
