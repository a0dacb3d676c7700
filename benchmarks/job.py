"""What one worker is asked to build and run."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """A task on a model."""

    task: str
    """Name in the table of `benchmarks.tasks`, or of the side's own tasks."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of MythosConfig (those of 0.5.0), or for transformers the class and the fields of its configuration."""
    rows: int = 1
    tokens: int = 1
    """Tokens of each row: of the sequence, the prompt, or the context before the decoded token."""
    n_loops: int = 1
    new_tokens: int = 1
    depths: tuple[int, ...] = ()
    """Loops of each row in training (ours alone can); empty: `n_loops` for all."""
    checkpoint: bool = False
    """Recompute each loop in the backward pass (ours alone can)."""
    compiled: bool = False
    """Compile a whole training step, or the decoding of a token (ours alone can)."""
    halt_at: int = 0
    """The loop, counted from 1, in which every token halts, on both sides; 0: the last one of the call. So all loops
    run and the weights of the states sum to 1, which 0.5.0 ensures only for tokens that reach the threshold."""
    seed: int = 0
    device: str = "cpu"
    load: str = ""
    """A safetensors file in the layout of open-mythos 0.5.0 to take the weights from; empty: made from the seed."""
    save: str = ""
    """Where to write the weights in that layout; only open_mythos_0_5 can."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Parameters that only this task has."""

    @property
    def halting_loop(self) -> int:
        """`halt_at`, or the call's deepest loop."""
        return self.halt_at or max(self.depths, default=self.n_loops)
