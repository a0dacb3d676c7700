"""The settings of a server, which are options of `mythos serve` too. No torch, and none of the extra `serve`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from open_mythos.checks import NonNegativeInt, PositiveInt, Range

HARD_MAX_LOOPS = 64
"""Loops of a request that a server may allow, at most."""


@dataclass(kw_only=True)
class ServeConfig:
    """Settings of a server besides those of its engine."""

    name: str | None = None
    """What requests call the model; left out: the folder's name."""
    max_rows: int = 32
    """Answers computed at the same time."""
    max_queue: NonNegativeInt = 128
    """Answers that wait beyond those; further ones are refused."""
    max_loops: Annotated[int, Range(1, HARD_MAX_LOOPS)] | None = None
    """The most loops of a request, up to 64; left out: twice the model's max_loop_iters."""
    max_work: PositiveInt = 2**20
    """The most loop-tokens of a request: (prompt + n x max_tokens) x n_loops."""
    plain: bool = False
    """For a model that was not trained on conversations: it continues the messages' text."""
    drain_s: Annotated[float, Range(0), tyro.conf.arg(name="drain")] = 30.0
    """Seconds that running answers have to finish, after a signal to end."""
    stuck_s: Annotated[float, Range(0, above=True), tyro.conf.arg(name="stuck")] = 60.0
    """Seconds that a step, or encoding a text, may take before the server gives up and ends with an error."""
