"""Tokens in the loop, each at its own loop, and how they leave it.

Shapes: N tokens, D width, V vocabulary. Every token is a row of its own: (N, 1, D).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from open_mythos.engine.paged_kv_cache import Tokens
from open_mythos.nn.halting import Exit, Fixed, HaltingRule, LastDecides, Probe, State
from open_mythos.ops.precision import at_least_float32


@dataclass
class ExitedTokens:
    """Tokens that have left the loop."""

    tokens: Tokens
    loops: np.ndarray
    """Loops that each token has run."""
    out: Tensor
    """(N, 1, D): input of the coda."""

    @staticmethod
    def join(parts: list["ExitedTokens"]) -> "ExitedTokens":
        if len(parts) == 1:
            return parts[0]
        loops, out = np.concatenate([part.loops for part in parts]), torch.cat([part.out for part in parts])
        return ExitedTokens(Tokens.join([part.tokens for part in parts]), loops, out)

    def take(self, index: np.ndarray) -> "ExitedTokens":
        out = self.out[torch.from_numpy(index).to(self.out.device)]
        return ExitedTokens(self.tokens.take(index), self.loops[index], out)


class LoopBatch:
    """Tokens in the loop that share a halting rule. They may join and leave in any loop."""

    def __init__(self, rule: HaltingRule) -> None:
        self.rule = rule
        self.tokens = Tokens.none()
        self.loop = self.tokens.row
        """Loops that each token has done: the 0-based index of its next one."""
        self.rows: dict[str, Tensor] = {}
        """`h` and the prepared `e` (N, 1, D), `n_loops` (N,), and under a weighted rule the sum `out` (N, 1, D)."""
        self.state: State = {}
        """The rule's own state, one row for each token."""

    def __len__(self) -> int:
        return len(self.tokens)

    def join(self, tokens: Tokens, is_last: np.ndarray, h: Tensor, e: Tensor) -> None:
        """Add tokens that stand before their first loop; `is_last`: a prompt's last one, or one of an answer."""
        rows = {"h": h, "e": e, "n_loops": torch.from_numpy(tokens.n_loops).to(h.device)}
        if self.rule.weighted:
            rows["out"] = torch.zeros_like(at_least_float32(h))
        state = self.rule.init(h, rows["n_loops"])
        if isinstance(self.rule, LastDecides):
            state["is_last"] = torch.from_numpy(is_last)[:, None].to(h.device)
            state["sequence"] = torch.from_numpy(tokens.row).to(h.device)
        # Everything that belongs to a token is a row of some tensor, so that joining is concatenation.
        if len(self):
            rows = {name: torch.cat((self.rows[name], x)) for name, x in rows.items()}
            state = {name: torch.cat((self.state[name], x)) for name, x in state.items()}
            tokens = Tokens.join([self.tokens, tokens])
        new = np.zeros(len(tokens) - len(self), dtype=np.int64)
        self.tokens, self.loop, self.rows, self.state = tokens, np.concatenate((self.loop, new)), rows, state

    def advance(self, h: Tensor, loop_index: Tensor, probe: Probe) -> ExitedTokens | None:
        """Take the states after a loop, `h`, and return the tokens that exit with it, if any."""
        exits = self.loop + 1 == self.tokens.n_loops
        if isinstance(self.rule, Fixed):
            # The host knows all exits: no device has to be waited for.
            self.rows["h"] = h
        else:
            exit = Exit(self.rule, probe, bool(exits.all()))
            self.rows, self.state, exit_mask, _ = exit.apply(self.rows, self.state, h, loop_index)
            exits = exit_mask[:, 0].cpu().numpy()
        self.loop = self.loop + 1
        return self.drop(exits) if exits.any() else None

    def drop(self, mask: np.ndarray) -> ExitedTokens:
        """Take the tokens of a mask out of the batch."""
        h = self.rows["h"]
        exited = ExitedTokens(self.tokens, self.loop, self.rows.get("out", h))
        keep = np.flatnonzero(~mask)
        if len(keep):
            exited = exited.take(np.flatnonzero(mask))
            index = torch.from_numpy(keep).to(h.device)
            self.rows = {name: x.index_select(0, index) for name, x in self.rows.items()}
            self.state = {name: x.index_select(0, index) for name, x in self.state.items()}
        else:
            self.rows, self.state = {}, {}
        self.tokens, self.loop = self.tokens.take(keep), self.loop[keep]
        exited.out = exited.out.to(h.dtype)
        return exited
