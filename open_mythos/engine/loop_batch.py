"""The tokens that are in the loop, each at a loop of its own, and how they leave it.

Shapes: N tokens, D width, V vocabulary. Every token is a row of its own: (N, 1, D).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from open_mythos.engine.paged_kv_cache import Tokens
from open_mythos.nn.halting import Exit, Fixed, HaltingRule, Probe, State
from open_mythos.ops.precision import at_least_float32


@dataclass
class Left:
    """Tokens that have left the loop."""

    tokens: Tokens
    loops: np.ndarray
    """How many each has run."""
    out: Tensor
    """(N, 1, D): what the coda reads."""

    @staticmethod
    def join(parts: list["Left"]) -> "Left":
        if len(parts) == 1:
            return parts[0]
        loops = np.concatenate([part.loops for part in parts])
        return Left(Tokens.join([part.tokens for part in parts]), loops, torch.cat([part.out for part in parts]))

    def take(self, index: np.ndarray) -> "Left":
        return Left(self.tokens.take(index), self.loops[index], self.out[torch.from_numpy(index).to(self.out.device)])


class Cohort:
    """Tokens in the loop that leave it by the same rule."""

    def __init__(self, rule: HaltingRule) -> None:
        self.rule = rule
        self.tokens = Tokens.none()
        self.loop = self.tokens.row
        """The loop that each token is at, 0-based."""
        self.rows: dict[str, Tensor] = {}
        """`h` and the prepared `e` (N, 1, D), `n_loops` (N,), and under a weighted rule the sum `out` (N, 1, D)."""
        self.state: State = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def join(self, tokens: Tokens, h: Tensor, e: Tensor) -> None:
        """Take in tokens that stand before their first loop."""
        rows = {"h": h, "e": e, "n_loops": torch.from_numpy(tokens.n_loops).to(h.device)}
        if self.rule.weighted:
            rows["out"] = torch.zeros_like(at_least_float32(h))
        state = self.rule.init(h, rows["n_loops"])
        if len(self):
            rows = {name: torch.cat((self.rows[name], x)) for name, x in rows.items()}
            state = {name: torch.cat((self.state[name], x)) for name, x in state.items()}
            tokens = Tokens.join([self.tokens, tokens])
        new = np.zeros(len(tokens) - len(self), dtype=np.int64)
        self.tokens, self.loop, self.rows, self.state = tokens, np.concatenate((self.loop, new)), rows, state

    def advance(self, h: Tensor, loop_index: Tensor, probe: Probe) -> Left | None:
        """Go on with the states after a loop, `h`; those that are done leave."""
        done = self.loop + 1 == self.tokens.n_loops
        if isinstance(self.rule, Fixed):
            self.rows["h"] = h
        else:
            exit = Exit(self.rule, probe, bool(done.all()))
            self.rows, self.state, exit_mask, _ = exit.apply(self.rows, self.state, h, loop_index)
            done = exit_mask[:, 0].cpu().numpy()
        self.loop = self.loop + 1
        return self.drop(done) if done.any() else None

    def drop(self, gone: np.ndarray) -> Left:
        """Take out the tokens of a mask."""
        index, keep = np.flatnonzero(gone), np.flatnonzero(~gone)
        h = self.rows["h"]
        out = self.rows.get("out", h)
        if len(keep):
            kept = torch.from_numpy(keep).to(h.device)
            left = Left(
                self.tokens.take(index), self.loop[index], out[torch.from_numpy(index).to(h.device)].to(h.dtype)
            )
            self.rows = {name: x.index_select(0, kept) for name, x in self.rows.items()}
            self.state = {name: x.index_select(0, kept) for name, x in self.state.items()}
        else:
            left = Left(self.tokens, self.loop, out.to(h.dtype))
            self.rows, self.state = {}, {}
        self.tokens, self.loop = self.tokens.take(keep), self.loop[keep]
        return left
