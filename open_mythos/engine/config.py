"""The configuration of an engine. No torch."""

from dataclasses import dataclass

from open_mythos.checks import check_bool, check_int
from open_mythos.engine.sequence import GRID


@dataclass(frozen=True)
class EngineConfig:
    """The sizes and the modes of an engine.

    Raises:
        TypeError, ValueError: a field is unusable.
    """

    max_rows: int = 32
    """Requests that are worked on together."""
    max_queue: int = 1024
    """Requests that wait, at most."""
    kv_tokens: int | None = None
    """Tokens that the pages have room for, at `max_loop_iters` loops each; None: a full context for each row, or what a
    quarter of the free memory has room for."""
    page_tokens: int = 16
    """Tokens of a page: 8, 16, 32 or 64."""
    max_prefill_tokens: int = 512
    """Prompt tokens in the loop at once: the more there are, the longer other requests wait between two tokens."""
    prefix_reuse: bool = True
    """Reuse the keys and values of equal prefixes."""
    batch_invariant: bool = True
    """Give every request the same bits whatever else runs, at a small cost in speed; see docs/engine.md."""
    prompts_leave_together: bool = False
    """Let all tokens of a prompt leave the loop with its last one, which then reuses no pages; see docs/engine.md."""

    def __post_init__(self) -> None:
        check_int("max_rows", self.max_rows, 1, 2**16, "use max_rows=32")
        check_int("max_queue", self.max_queue, 1, 2**31, "use max_queue=1024")
        check_int("max_prefill_tokens", self.max_prefill_tokens, GRID, 2**31, "use max_prefill_tokens=512")
        if self.kv_tokens is not None:
            check_int("kv_tokens", self.kv_tokens, 1, 2**40, "use kv_tokens=None for a quarter of the free memory")
        check_int("page_tokens", self.page_tokens, 8, GRID, "use page_tokens=16")
        if GRID % self.page_tokens:
            raise ValueError(f"page_tokens={self.page_tokens} must be 8, 16, 32 or 64; use page_tokens=16")
        check_bool("prefix_reuse", self.prefix_reuse)
        check_bool("batch_invariant", self.batch_invariant)
        check_bool("prompts_leave_together", self.prompts_leave_together)
