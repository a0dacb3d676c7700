"""How deep tokens go: by a prescribed law, by a trained model's own rule, or all together.

Shapes: B rows, T tokens, D width.
"""

from typing import Any

import torch
from torch import Tensor

from open_mythos.nn.halting import Decision, HaltingRule, State

DEEPEST = 16
MEAN = 4.0
"""Of the geometric law."""


def uniform() -> list[float]:
    """Probability of each depth, 1 to DEEPEST: all alike."""
    return [1 / DEEPEST] * DEEPEST


def geometric() -> list[float]:
    """Each loop is the last one with the same probability, the deepest takes the rest; MEAN on average."""
    low, high = 1 / DEEPEST, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_depth(_cut(middle)) > MEAN else (low, middle)
    return _cut(low)


def mean_depth(law: list[float]) -> float:
    """Loops per token of a law."""
    return sum(n * p for n, p in enumerate(law, 1))


def _cut(p: float) -> list[float]:
    law = [p * (1 - p) ** n for n in range(DEEPEST - 1)]
    return [*law, 1 - sum(law)]


LAWS = {"uniform": uniform(), "geometric": geometric()}


class PrescribedDepths(HaltingRule):
    """A token's depth is read off its state before the first loop, so it is the same alone, in a batch, and in
    `generate`.

    The hash is the fraction of SCALE times a fixed projection of the normalised state: it is uniform, and rounding
    moves it to another depth once in 10^5 tokens (SCALE * 16 bounds * 1e-7 each).
    """

    SCALE = 20.0

    def __init__(self, law: list[float]) -> None:
        super().__init__(0.0)
        self.law = law
        self.bounds = torch.tensor(law, dtype=torch.float64).cumsum(0)[:-1]
        self.signs: Tensor | None = None

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        if self.signs is None:
            draws = torch.rand(h.shape[-1], generator=torch.Generator().manual_seed(0))
            self.signs = (draws > 0.5).double() * 2 - 1
        # In float64 the sum does not depend on how many rows are summed beside it.
        h = h.double()
        place = (h * self.signs).sum(-1) / torch.linalg.vector_norm(h, dim=-1) * self.SCALE
        depth = torch.bucketize(place - place.floor(), self.bounds, right=True) + 1
        return {"depth": depth}

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        return state, (loop_index + 1)[:, None] >= state["depth"]


class UntilAllAreDone(HaltingRule):
    """Every token goes on until the rule has let out all that are in the call: a batch that stops with its last row."""

    def __init__(self, rule: HaltingRule) -> None:
        super().__init__(rule.threshold, rule.min_loops)
        self.rule, self.needs_probe = rule, rule.needs_probe

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        return {**self.rule.init(h, n_loops), "done": torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)}

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        inner: dict[str, Any] = {name: x for name, x in state.items() if name != "done"}
        inner, done = self.rule.update(inner, h_prev, h, loop_index, probe)
        done = state["done"] | (done & (loop_index + 1 >= self.min_loops)[:, None])
        return {**inner, "done": done}, done.all().expand_as(done)
