"""A request and its answer so far: the one record that engine, scheduler, runner and sampler share. No torch."""

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from open_mythos.generation.sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from open_mythos.engine.sampler import SamplerState
    from open_mythos.nn.halting import HaltingRule
    from open_mythos.tokenization.detokenizer import AnswerText

GRID = 64
"""Tokens attend to keys up to the next multiple of GRID behind their position, and a chunk that does not reach the end
of the known tokens ends at such a multiple. So results do not depend on how a prompt was cut into chunks."""


class Phase(Enum):
    """The stage of a sequence. Its pages may be swapped out, and back in, between two chunks only: in READY."""

    WAITING = "waiting"
    """Not admitted: the sequence has no row and no page."""
    READY = "ready"
    """Between two chunks: everything computed so far is in the pages."""
    LOOPING = "looping"
    """Tokens of a chunk are in the loop."""
    EXITED = "exited"
    """Every token of the chunk has left the loop; coda and head are still to come."""
    SWAPPED = "swapped"
    """Admitted and between two chunks, with keys and values stored outside the pages."""
    FINISHED = "finished"


@dataclass(eq=False)
class Block:
    """The pages of some consecutive tokens of a sequence: one for each layer outside the loop and each loop inside."""

    pages: tuple[int, ...]
    ref_count: int = 1
    """Sequences that use the block."""
    key: tuple[object, ...] | None = None
    """The block before this one and the tokens of this one, if other sequences may use it too; else None."""


@dataclass(eq=False)
class Sequence:
    """A request and its answer so far."""

    id: int
    """Unique, in the order of arrival."""
    prompt_ids: list[int]
    params: SamplingParams
    n_loops: int
    """The most loops of a token."""
    depth_key: Hashable
    """Equal for sequences whose equal tokens have equal keys and values: (n_loops, rule, threshold, min_loops)."""
    is_fixed: bool
    """True if every token runs all `n_loops`."""
    pages_per_block: int
    """One page for each layer outside the loop, and for each layer of the loop at each of `n_loops`."""

    # The answer.
    token_ids: list[int] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)
    """Loops of each token: those of the position whose logits it was drawn from."""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    """Log-probabilities of the prompt's tokens but the first, if the request asks for them."""
    prompt_top_logprobs: list[dict[int, float]] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop token or string that ended the answer; None for the tokenizer's end token and any other end."""
    arrived_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    finished_s: float | None = None

    # For the scheduler.
    whole_prompt: bool = False
    """True if all tokens of the prompt have to run together, and share no pages: their depths depend on each other."""
    phase: Phase = Phase.WAITING
    tag: float = 0.0
    """Place in the queue: the waiting sequence with the smallest tag is next."""
    blocks: list[Block] = field(default_factory=list)
    n_cached: int = 0
    """Prompt tokens found in the prefix cache."""
    n_computed: int = 0
    """Tokens whose keys and values are complete."""
    n_running: int = 0
    """Tokens of the chunk in work, which follow the computed ones."""
    n_looping: int = 0
    """Tokens of that chunk that have not left the loop."""
    loop: int = 0
    """Loops that the chunk has done."""

    # For runner and sampler.
    rule: "HaltingRule | None" = None
    sampler: "SamplerState | None" = None
    detokenizer: "AnswerText | None" = None
    stop_ids: frozenset[int] = frozenset()
    row: int = -1
    """Row in the page table; -1: none."""
    n_mapped: int = 0
    """Blocks that the page table has."""
    swapped: "Tensor | None" = None
    """Keys and values while the sequence has no pages."""

    @property
    def n_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def n_tokens(self) -> int:
        """Known tokens: the prompt and the answer so far."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def max_tokens(self) -> int:
        """The most tokens to draw; a request for none still computes its prompt as if for one."""
        return max(1, self.params.max_tokens)

    @property
    def cost(self) -> int:
        """The most loop-tokens that the request may compute."""
        return (self.n_prompt + self.max_tokens) * self.n_loops

    @property
    def in_prompt(self) -> bool:
        """True if the chunk in work, or else the next one, has prompt tokens before the last one."""
        return self.n_computed + 1 < len(self.prompt_ids)

    @property
    def scores_prompt(self) -> bool:
        """True if the chunk in work is followed by prompt tokens whose log-probabilities the request asks for."""
        return self.params.prompt_logprobs is not None and self.in_prompt

    @property
    def yields_token(self) -> bool:
        """True if the chunk in work reaches the last known token, so that a new one follows."""
        return self.n_computed + self.n_running == self.n_tokens

    @property
    def chunk(self) -> list[int]:
        """Tokens of the chunk in work."""
        return self.ids(self.n_computed, self.n_computed + self.n_running)

    def ids(self, start: int, end: int) -> list[int]:
        """Return the tokens of prompt and answer at the positions from `start` up to `end`."""
        n = len(self.prompt_ids)
        if start >= n:
            return self.token_ids[start - n : end - n]
        return self.prompt_ids[start:end] + self.token_ids[: max(0, end - n)]
