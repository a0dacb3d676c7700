"""Answers with exits by a rule, or after depths given from outside: oracles, and null controls of a rule.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.halting import ACT, Decision, Fixed, HaltingRule, State
from open_mythos.tasks.task import Batch


class GivenDepths(HaltingRule):
    """Exits after given depths, (B, T) int64; a weighted rule, which would exit later, gives the states its weights."""

    def __init__(self, depths: Tensor, weights: HaltingRule | None = None) -> None:
        super().__init__(0.0)
        self.depths, self.rule = depths, weights or Fixed()
        self.weighted, self.weigh = self.rule.weighted, self.rule.weigh

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        return {"depth": self.depths.to(h.device)} | self.rule.init(h, n_loops)

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        after, _ = self.rule.update(state, h_prev, h, loop_index)
        return {**state, **after}, (loop_index + 1)[:, None] >= state["depth"]


def shuffled(depths: Tensor, seed: int) -> Tensor:
    """Give the same depths, in the same numbers, to other tokens."""
    order = torch.randperm(depths.numel(), generator=torch.Generator().manual_seed(seed))
    return depths.flatten()[order].view_as(depths)


def with_exits(
    model: OpenMythos,
    batch: Batch,
    exit: HaltingRule | Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    n_loops: int | None = None,
    rows: int = 100,
) -> tuple[Tensor, Tensor]:
    """Return the score of every token and the loops that it ran, (B, T) each.

    Args:
        exit: a rule, or the depths (B, T) after which tokens exit; under ACT they have its weights up to there.
        score: makes a score (B, T) of logits (B, T, V) and labels (B, T).
        rows: of one call.
    """
    act = None if model.recurrent is None or model.recurrent.act is None else ACT(model.recurrent.act, 1.0)
    found = []
    with evaluating(model):
        for part in torch.arange(len(batch.labels)).split(rows):
            rule = GivenDepths(exit[part], act) if isinstance(exit, Tensor) else exit
            out = model(batch.input_ids[part], n_loops, exit=rule, trace=True)
            found.append((score(out.logits, batch.labels[part]), out.exit_loop + 1))
    scores, loops = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(loops)
