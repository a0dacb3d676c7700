"""How a run is spread over processes."""

from dataclasses import dataclass
from typing import Literal

from open_mythos.checks import check_choice, check_int


@dataclass(frozen=True)
class ParallelConfig:
    """What each process (rank) holds, and how many rows it takes at once."""

    kind: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every rank holds everything; fsdp: each holds its share of weights, gradients and moments."""
    experts: int = 1
    """Ranks over which the routed experts are spread; 1: every rank has all of them."""
    rows: int | None = None
    """Rows of one micro-batch on one rank; None: all of the rank's rows at once."""

    def __post_init__(self) -> None:
        check_choice("parallel.kind", self.kind, ("ddp", "fsdp"))
        check_int("parallel.experts", self.experts, 1)
        if self.rows is not None:
            check_int("parallel.rows", self.rows, 1)
