"""One answer in the making: its tokens, where it stands, and the pages it holds. No torch."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

GRID = 64
"""A token reads keys up to the multiple of it behind its position, and a chunk that does not reach the end of the known
tokens ends at one: so results do not depend on how a prompt was cut."""


class Phase(Enum):
    """Where a sequence stands. Its pages may be taken away, and given back, at a token boundary: in READY."""

    WAITING = "waiting"
    """Not admitted: holds no slot and no page."""
    READY = "ready"
    """Between two chunks: everything computed so far is in its pages."""
    LOOPING = "looping"
    """A chunk of it is in the loop."""
    EXITED = "exited"
    """Every token of the chunk has left the loop; coda and head are still to come."""
    SWAPPED = "swapped"
    """Admitted, at a token boundary, its keys and values kept outside the pages."""
    FINISHED = "finished"


@dataclass(eq=False)
class Block:
    """Pages for some consecutive tokens of a sequence: one for each layer outside the loop and each loop inside."""

    pages: tuple[int, ...]
    holders: int = 1
    """Sequences that use it."""
    key: tuple[object, ...] | None = None
    """What it holds, if others may use it too: the block before it and its tokens."""


@dataclass(eq=False)
class Sequence:
    """One answer in the making."""

    id: int
    """Unique, in the order of arrival."""
    token_ids: list[int]
    """The prompt, then what has been generated."""
    n_prompt: int
    max_tokens: int
    n_loops: int
    """The most loops of a token."""
    depth_key: Hashable
    """Equal for sequences whose equal tokens have equal keys and values: (n_loops, min_loops, rule and parameters)."""
    is_fixed: bool
    """Whether every token runs all `n_loops`."""
    pages_per_block: int
    """Layers outside the loop, and the loop's once for each of `n_loops`."""
    may_reuse: bool = True
    """False if every token of the prompt has to be computed, because something is read from each."""

    phase: Phase = Phase.WAITING
    tag: float = 0.0
    """Of those that wait, the one with the smallest is next."""
    n_computed: int = 0
    """Tokens whose keys and values are complete."""
    n_running: int = 0
    """Tokens behind those that are in the chunk being computed."""
    n_looping: int = 0
    """Tokens of the chunk that have not left the loop."""
    n_cached: int = 0
    """Tokens of the prompt found in blocks that were there already."""
    loop: int = 0
    """Loops that the chunk has done."""
    blocks: list[Block] = field(default_factory=list)

    @property
    def cost(self) -> int:
        """Loop-tokens: the most that it may compute."""
        return (self.n_prompt + self.max_tokens) * self.n_loops

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def in_prompt(self) -> bool:
        """Whether the chunk in work, or else the next one, holds tokens of the prompt before its last."""
        return self.n_computed + 1 < self.n_prompt
