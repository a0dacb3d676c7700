"""The tokens that are in the loop, each at a loop of its own, and how they leave it.

Shapes: N tokens, D width, V vocabulary. Every token is a row of its own: (N, 1, D).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from open_mythos.engine.paged_kv_cache import Tokens
from open_mythos.nn.halting import Fixed, HaltingRule, State
from open_mythos.ops.precision import at_least_float32

Probe = Callable[[Tensor], Tensor]


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
        """`h`, and `e` as the injection has prepared it, (N, 1, D); `out`, the sum of states under a weighted rule."""
        self.state: State = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def join(self, tokens: Tokens, h: Tensor, e: Tensor) -> None:
        """Take in tokens that stand before their first loop."""
        rows = {"h": h, "e": e}
        if self.rule.weighted:
            rows["out"] = torch.zeros_like(at_least_float32(h))
        state = self.rule.init(h, torch.from_numpy(tokens.n_loops).to(h.device))
        if len(self):
            rows = {name: torch.cat((self.rows[name], x)) for name, x in rows.items()}
            state = {name: torch.cat((self.state[name], x)) for name, x in state.items()}
            tokens = Tokens.join([self.tokens, tokens])
        new = np.zeros(len(tokens) - len(self), dtype=np.int64)
        self.tokens, self.loop, self.rows, self.state = tokens, np.concatenate((self.loop, new)), rows, state

    def advance(self, h: Tensor, loop_index: Tensor, probe: Probe) -> Left | None:
        """Go on with the states after a loop, `h`; those that are done leave."""
        done = self.loop + 1 == self.tokens.n_loops
        if not isinstance(self.rule, Fixed):
            # Where all are at their last loop the rule has nothing to decide, but may have to weigh the state.
            if self.rule.weighted or not (self.rule.needs_probe and done.all()):
                seen = probe(h) if self.rule.needs_probe else None
                self.state, exit_mask, weight = self.rule.update(self.state, self.rows["h"], h, loop_index, seen)
                done = done | exit_mask[:, 0].cpu().numpy()
                if weight is not None:
                    self.rows["out"] = self.rows["out"] + weight[..., None] * h
        self.rows["h"] = h
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
