"""What would be answered after each loop, and how the answer gets to the top: does it climb or jump?

Shapes: B rows, T tokens, L loops, V vocabulary, N chosen tokens, K kept tokens of the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.unroll import chosen, unroll
from open_mythos.checks import check_int
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating

MOVED_RANK = 4
"""A token has something to tell if its answer stands at this rank or below before the first loop."""
JUMP_SHARE = 0.5
"""One loop that does more than this share of the way is a jump."""


@dataclass(frozen=True)
class Lens:
    """The read-out of the state before the first loop, then of that after each."""

    target: Tensor
    """(N,) int64, the token whose way is followed: the first choice after the last loop."""
    rank: Tensor
    """(L + 1, N) int64, 1 + how many tokens are more probable than the target"""
    log_p: Tensor
    """(L + 1, N), of the target"""
    entropy: Tensor
    """(L + 1, N), nats"""
    top: Tensor
    """(L + 1, N, K) int64, the most probable tokens, best first"""
    top_p: Tensor
    """(L + 1, N, K), their probabilities"""


def read_lens(
    model: OpenMythos,
    input_ids: Tensor,
    n_loops: int | None = None,
    where: Tensor | None = None,
    coda: bool = True,
    n_top: int = 10,
) -> Lens:
    """Read every state.

    Args:
        where: (B, T) bool, the places to read; None: all.
        coda: through the coda, which gives what the model would answer if it stopped there; else through the last norm
            and the head alone, which sees nothing of the other tokens.
        n_top: K, at most V.
    """
    check_int("n_top", n_top, 1)
    states = unroll(model, input_ids, n_loops)

    def read(h: Tensor) -> Tensor:
        logits = model.readout(h, states.call.view) if coda else model.head(model.norm(h))
        return chosen(logits, where)

    rank, log_p, entropy, top, top_p = [], [], [], [], []
    with evaluating(model):
        target = read(states.hidden[-1]).argmax(-1)
        for h in states.hidden:
            logits = read(h).double()
            p = logits.log_softmax(-1)
            of_target = p.gather(-1, target[:, None])
            rank.append(1 + (p > of_target).sum(-1))
            log_p.append(of_target[:, 0])
            entropy.append(-(p.exp() * p).sum(-1))
            best = p.exp().topk(min(n_top, p.shape[-1]), dim=-1)
            top.append(best.indices)
            top_p.append(best.values)
    return Lens(target, *(torch.stack(x) for x in (rank, log_p, entropy, top, top_p)))


@dataclass(frozen=True)
class Climb:
    """How the ranks of `Lens.rank` came down, over the tokens that moved; NaN where none did.

    The control is the same ranks with the loops in between in random order, first and last kept: what the numbers would
    be if the order meant nothing. Mean, 2.5 % and 97.5 % points over the orders.
    """

    n_tokens: int
    n_moved: int
    """tokens whose rank was `MOVED_RANK` or worse before the first loop and 1 after the last"""
    climb: float
    """share of the moved tokens whose rank never rises and of which no loop does more than `JUMP_SHARE`"""
    jump: float
    """share of them of which one loop does more than `JUMP_SHARE` of the fall in log-rank"""
    wander: float
    """the rest: no jump, but the rank also rises"""
    monotone: float
    """share whose rank never rises"""
    largest_drop: float
    """median over tokens of the largest fall of one loop, as a share of the whole fall in log-rank; may exceed 1"""
    retraced: float
    """median over tokens of all rises in log-rank, as a share of the whole fall"""
    even_drop: float
    """1 / L: the largest drop of a climb of equal steps"""
    monotone_control: tuple[float, float, float]
    largest_drop_control: tuple[float, float, float]


def climb_or_jump(rank: Tensor, n_orders: int = 200, seed: int = 0) -> Climb:
    """Judge rank trajectories (L + 1, N), 1 the best."""
    N, L = rank.shape[1], len(rank) - 1
    log = rank[:, (rank[0] >= MOVED_RANK) & (rank[-1] == 1)].double().log()
    drop, whole = log[:-1] - log[1:], log[0] - log[-1]
    largest, monotone = drop.amax(0) / whole, (drop >= 0).all(0)
    jumps = largest > JUMP_SHARE
    rise = (-drop).clamp(min=0).sum(0) / whole
    generator = torch.Generator().manual_seed(seed)
    controls = []
    for _ in range(n_orders):
        order = torch.cat([torch.tensor([0]), 1 + torch.randperm(L - 1, generator=generator), torch.tensor([L])])
        shuffled = -log[order.to(log.device)].diff(dim=0)
        controls.append((_mean((shuffled >= 0).all(0)), _median(shuffled.amax(0) / whole)))
    monotone_control, largest_control = (_spread(values) for values in zip(*controls, strict=True))
    return Climb(
        n_tokens=N,
        n_moved=log.shape[1],
        climb=_mean(monotone & ~jumps),
        jump=_mean(jumps),
        wander=_mean(~monotone & ~jumps),
        monotone=_mean(monotone),
        largest_drop=_median(largest),
        retraced=_median(rise),
        even_drop=1 / L,
        monotone_control=monotone_control,
        largest_drop_control=largest_control,
    )


def _mean(x: Tensor) -> float:
    return x.double().mean().item()


def _median(x: Tensor) -> float:
    return x.quantile(0.5).item() if x.numel() else math.nan


def _spread(values: tuple[float, ...]) -> tuple[float, float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    low, high = x.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return x.mean().item(), low, high
